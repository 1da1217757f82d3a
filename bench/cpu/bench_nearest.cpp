// Nearest rounding and the reference decoder on one thread, against the time of copying the matrix once
// in memory: the least that a pass over the weights can cost.
//
//   bench_nearest [--benchmark_format=json] [--benchmark_filter=...]
//
// Counters, from the processor time of the best iteration: weights_per_s, copy_fraction = time of a copy of
// the float32 matrix / time of the work. The scale search tries each weight 40 times.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <limits>
#include <string>
#include <vector>

#include "quantloom/random.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

constexpr int64_t kRows = 4096;
constexpr int64_t kCols = 4096;

const std::vector<float>& weights() {
  static const std::vector<float> values = [] {
    const CounterRandom random(1);
    std::vector<float> normal(static_cast<size_t>(kRows * kCols));
    for (size_t i = 0; i < normal.size(); ++i) normal[i] = static_cast<float>(0.02 * random.normal(i));
    return normal;
  }();
  return values;
}

template <class Work>
double seconds_of(const Work& work) {
  timespec begin{};
  timespec end{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
  work();
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
  return static_cast<double>(end.tv_sec - begin.tv_sec) +
         1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
}

template <class Work>
void report(benchmark::State& state, int64_t count, const Work& work) {
  const auto used = static_cast<size_t>(count);
  std::vector<float> copy(used);
  double best = std::numeric_limits<double>::infinity();
  double best_copy = best;
  for (auto _ : state) {
    best_copy = std::min(best_copy, seconds_of([&] {
                           std::memcpy(copy.data(), weights().data(), used * sizeof(float));
                           benchmark::DoNotOptimize(copy.data());
                         }));
    best = std::min(best, seconds_of(work));
  }
  state.counters["weights_per_s"] = static_cast<double>(count) / best;
  state.counters["copy_fraction"] = best_copy / best;
}

void quantize(benchmark::State& state, const std::string& spec, bool search) {
  const auto format = format_from_spec(spec);
  const int64_t rows = search ? kRows / 16 : kRows;
  const MatrixView<const float> w(weights().data(), rows, kCols);
  NearestOptions options{.threads = 1};
  if (search) options.scale_search = ScaleSearch{};
  report(state, rows * kCols, [&] { benchmark::DoNotOptimize(round_nearest(w, format, options)); });
}

void decode(benchmark::State& state, const std::string& spec) {
  const MatrixView<const float> w(weights().data(), kRows, kCols);
  const Rounded rounded = round_nearest(w, format_from_spec(spec));
  std::vector<float> out(static_cast<size_t>(kRows * kCols));
  report(state, kRows * kCols, [&] {
    dequantize(rounded.tensor, MatrixView<float>(out.data(), kRows, kCols), 1);
    benchmark::DoNotOptimize(out.data());
  });
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  for (const quantloom::FormatEntry& entry : quantloom::format_table()) {
    for (const std::string& spec : entry.examples) {
      benchmark::RegisterBenchmark(("quantize/" + spec).c_str(), quantloom::quantize, spec, false)
          ->Unit(benchmark::kMillisecond);
      benchmark::RegisterBenchmark(("decode/" + spec).c_str(), quantloom::decode, spec)
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::RegisterBenchmark("scale_search/uniform:4:g128:sym", quantloom::quantize, "uniform:4:g128:sym",
                               true)
      ->Unit(benchmark::kMillisecond);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
