// Beam search of additive codes on the device: the tables' fit, the first codes, one sweep, one refit, and a
// whole layer to the published end (a round that gains less than 1%).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/device_buffer.hpp"
#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"

namespace quantloom {
namespace {

using cuda::DeviceBuffer;

template <class Body>
double seconds_of(int rounds, const Body& body) {
  double least = INFINITY;
  for (int i = 0; i < rounds; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return least;
}

// Inputs whose neighbours are alike: the covariance of a first-order process.
Hessian neighbours(int64_t k) {
  std::vector<double> sum(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      sum[static_cast<size_t>(i * k + j)] = std::pow(0.8, std::abs(static_cast<double>(i - j)));
    }
  }
  return {MatrixView<const double>(sum.data(), k, k), 1};
}

nlohmann::json measure(const char* spec, int64_t n, const DeviceBuffer<float>& weights,
                       const CudaHessian& hessian, bool whole) {
  const int64_t k = hessian.k();
  const CudaMatrix w{weights.data(), DType::f32, n, k, k};
  const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
  std::shared_ptr<const Additive> fitted;
  const double fit = seconds_of(1, [&] { fitted = fit_additive_cuda(*format, w, {}, nullptr); });
  PackedTensor packed = empty_packed_cuda(fitted, n, k);
  BeamSearchOptions options;
  options.max_rounds = 0;
  options.refit_steps = 0;
  options.measure_losses = false;
  const double start = seconds_of(2, [&] {
    packed.format = fitted;
    static_cast<void>(round_beam_search_cuda(w, packed, hessian, options, nullptr, nullptr));
  });
  std::printf("%-18s [%lld, %lld]: fit of tables %.3f s, first codes %.1f ms", spec,
              static_cast<long long>(n), static_cast<long long>(k), fit, start * 1e3);
  nlohmann::json report = {
      {"format", spec}, {"n", n}, {"k", k}, {"fit_s", fit}, {"first_codes_ms", start * 1e3}};
  for (const int beam : {1, 4}) {
    const double sweep = seconds_of(beam == 1 ? 3 : 1, [&] {
      search_codes_cuda(w, packed, hessian, {.beam = beam, .code_penalties = {}}, {}, nullptr);
    });
    std::printf(", sweep with beam %d %.2f ms", beam, sweep * 1e3);
    report["sweep_ms"][std::to_string(beam)] = sweep * 1e3;
  }
  const double refit = seconds_of(2, [&] { refit_tables_cuda(w, packed, hessian, {}, nullptr); });
  std::printf(", refit %.1f ms\n", refit * 1e3);
  report["refit_ms"] = refit * 1e3;
  if (whole) {
    BeamSearchOptions all;
    all.measure_losses = false;
    CudaBeamSearched found;
    const double layer = seconds_of(1, [&] {
      packed.format = format;
      found = round_beam_search_cuda(w, packed, hessian, all, nullptr, nullptr);
    });
    std::printf("  whole layer: %.3f s, losses", layer);
    for (const double loss : found.losses) std::printf(" %.5g", loss);
    std::printf("\n");
    report["layer_s"] = layer;
    report["losses"] = found.losses;
  }
  std::fflush(stdout);
  return report;
}

nlohmann::json run(bool quick) {
  const int64_t k = 4096;
  const int64_t most = quick ? 4096 : 11008;
  const CounterRandom random(1);
  std::vector<float> values(static_cast<size_t>(most * k));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(random.normal(i % (size_t{1} << 22)) * (1 + 0.1 * random.uniform(i)));
  }
  DeviceBuffer<float> weights(most * k, nullptr);
  weights.upload(values.data(), most * k);
  const CudaHessian hessian(neighbours(k));
  nlohmann::json report;
  for (const char* const spec : {"additive:2x8:g8", "additive:1x16:g8"}) {
    report["cases"].push_back(measure(spec, 4096, weights, hessian, true));
    if (!quick) report["cases"].push_back(measure(spec, most, weights, hessian, false));
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_beam_search", argc, argv, quantloom::run);
}
