// GPTQ on one layer against the same floating-point operations done as plain matrix products and plain
// factorizations on the same machine: the update of the columns to come (n k^2 operations) and the factor
// of the inverse Hessian (2 k^3 / 3). Both are timed in turn in each iteration.
//
//   bench_gptq [--benchmark_format=json] [--benchmark_filter=...]
//
// Counters: factor_s and feedback_s (its two halves), with_losses_s (with the report's losses, nearest
// rounding included), plain_gemm_s, plain_factor_s, ratio = (factor_s + feedback_s) / plain. cpu_ratio is the
// ratio of processor times, which other load on the machine moves less.
#include <benchmark/benchmark.h>

#include <chrono>
#include <ctime>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "algebra/dense.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "rounding/inverse_factor.hpp"

#ifdef QUANTLOOM_BENCH_OPENBLAS
extern "C" {
void openblas_set_num_threads(int threads);
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc);
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void dtrtri_(const char* uplo, const char* diag, const int* n, double* a, const int* lda, int* info);
}
#endif

namespace quantloom {
namespace {

struct Seconds {
  double wall = 0;
  double processor = 0;

  Seconds operator+(const Seconds& other) const { return {wall + other.wall, processor + other.processor}; }
};

template <class Work>
Seconds time_of(const Work& work) {
  timespec begin{};
  timespec end{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
  const auto start = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
  return {wall.count(), static_cast<double>(end.tv_sec - begin.tv_sec) +
                            1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec)};
}

// The least of all iterations: what the machine does when nothing else runs.
struct Best {
  Seconds least{std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
  void add(const Seconds& seconds) {
    least.wall = std::min(least.wall, seconds.wall);
    least.processor = std::min(least.processor, seconds.processor);
  }
};

// n x (k / 2) x k multiplications and additions: the triangle of updates, as one product.
void plain_gemm(std::vector<float>& a, std::vector<float>& b, std::vector<float>& c, int64_t n, int64_t k,
                int threads) {
#ifdef QUANTLOOM_BENCH_OPENBLAS
  openblas_set_num_threads(threads);
  const int m = static_cast<int>(n);
  const int columns = static_cast<int>(k);
  const int depth = static_cast<int>(k / 2);
  const float one = 1;
  sgemm_("N", "N", &m, &columns, &depth, &one, a.data(), &m, b.data(), &depth, &one, c.data(), &m);
#else
  algebra::gemm_tn(1, {a.data(), k / 2, n}, {b.data(), k / 2, k}, {c.data(), n, k}, threads);
#endif
  benchmark::DoNotOptimize(c.data());
}

void plain_factor(std::vector<double>& h, int64_t k, int threads) {
#ifdef QUANTLOOM_BENCH_OPENBLAS
  openblas_set_num_threads(threads);
  const int size = static_cast<int>(k);
  int info = 0;
  dpotrf_("L", &size, h.data(), &size, &info);
  dtrtri_("L", "N", &size, h.data(), &size, &info);
#else
  algebra::cholesky_lower({h.data(), k, k}, threads);
  algebra::invert_lower({h.data(), k, k}, threads);
#endif
  benchmark::DoNotOptimize(h.data());
}

void gptq(benchmark::State& state) {
  const int64_t n = state.range(0);
  const int64_t k = state.range(1);
  const auto threads = static_cast<int>(state.range(2));
  const CounterRandom random(1);
  std::vector<float> w(static_cast<size_t>(n * k));
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(random.normal(i));
  const int64_t tokens = 1024;
  std::vector<float> x(static_cast<size_t>(tokens * k));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(w.size() + i));
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), tokens, k));
  std::vector<int64_t> order(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto format = std::make_shared<Uniform>(4, 128, false);
  ErrorFeedbackOptions options;
  options.threads = threads;

  std::vector<float> a(static_cast<size_t>(n * (k / 2)), 0.5F);
  std::vector<float> b(static_cast<size_t>(k / 2 * k), 0.5F);
  std::vector<float> c(static_cast<size_t>(n * k), 0.0F);
  Best gemm;
  Best factor;
  Best own_factor;
  Best quantize;
  Best with_losses;
  const MatrixView<const float> weights(w.data(), n, k);
  for (auto _ : state) {
    gemm.add(time_of([&] { plain_gemm(a, b, c, n, k, threads); }));
    std::vector<double> h(hessian.sum().data(), hessian.sum().data() + k * k);
    for (int64_t j = 0; j < k; ++j) h[static_cast<size_t>(j * k + j)] += static_cast<double>(tokens);
    factor.add(time_of([&] { plain_factor(h, k, threads); }));
    own_factor.add(time_of([&] {
      const InverseFactor upper(hessian, order, 0.01, {}, threads);
      benchmark::DoNotOptimize(upper.upper().data());
    }));
    options.measure_losses = false;
    const Seconds seconds = time_of([&] { round_error_feedback(weights, format, hessian, options); });
    quantize.add(seconds);
    state.SetIterationTime(seconds.wall);
    options.measure_losses = true;
    with_losses.add(time_of([&] { round_error_feedback(weights, format, hessian, options); }));
  }
  const Seconds plain = gemm.least + factor.least;
  state.counters["factor_s"] = own_factor.least.wall;
  state.counters["feedback_s"] = quantize.least.wall - own_factor.least.wall;
  state.counters["quantize_s"] = quantize.least.wall;
  state.counters["with_losses_s"] = with_losses.least.wall;
  state.counters["plain_gemm_s"] = gemm.least.wall;
  state.counters["plain_factor_s"] = factor.least.wall;
  state.counters["ratio"] = quantize.least.wall / plain.wall;
  state.counters["cpu_ratio"] = quantize.least.processor / plain.processor;
  state.counters["cpu_quantize_s"] = quantize.least.processor;
  state.counters["cpu_factor_s"] = own_factor.least.processor;
  state.counters["cpu_with_losses_s"] = with_losses.least.processor;
  state.counters["cpu_plain_gemm_s"] = gemm.least.processor;
  state.counters["cpu_plain_factor_s"] = factor.least.processor;
}

BENCHMARK(gptq)
    ->ArgNames({"n", "k", "threads"})
    ->Args({4096, 4096, 1})
    ->Args({4096, 4096, 2})
    ->Iterations(3)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
#ifdef QUANTLOOM_BENCH_OPENBLAS
  benchmark::AddCustomContext("plain", "OpenBLAS");
#else
  benchmark::AddCustomContext("plain", "quantloom's own tiles (Eigen)");
#endif
  benchmark::AddCustomContext("instruction_set", quantloom::algebra::instruction_set());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
