// Vector codebooks on the device: one search for the nearest centroids of 2^20 normal vectors, and whole fits
// of 100 sweeps with their start.
//
// The yardstick of a search is the time of its minima alone: each score takes one, of which a processor
// makes 64 in a clock. Tensor cores do the rest beside them.
#include <chrono>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/device_buffer.hpp"
#include "fit/codebook_search.hpp"
#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

using cuda::DeviceBuffer;

constexpr int64_t kRows = int64_t{1} << 20;
constexpr double kMinimaPerClock = 64;

struct Case {
  int64_t entries;
  int64_t d;
};

std::vector<float> normal_values(int64_t count) {
  const CounterRandom random(1);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

nlohmann::json measure(const Case& c, const std::vector<float>& values, double minima_per_second,
                       int replays) {
  const int64_t count = kRows * c.d;
  DeviceBuffer<float> vectors(count, nullptr);
  vectors.upload(values.data(), count);
  // Rows stand in for fitted centroids.
  DeviceBuffer<float> centroids(c.entries * c.d, nullptr);
  centroids.upload(values.data() + 7, c.entries * c.d);
  const DeviceBuffer<int32_t> codes(kRows, nullptr);
  check_cuda(cudaDeviceSynchronize(), "copies");
  const CudaMatrix x{vectors.data(), DType::f32, kRows, c.d, c.d};

  const bench::Stream stream;
  cuda::CodebookSearch search(x, c.entries, 8, stream.get());
  const bench::Timing timing =
      bench::time_launches(stream, 2, replays, [&](int) { search.run(centroids.data(), codes.data()); });
  const double limit = static_cast<double>(kRows) * static_cast<double>(c.entries) / minima_per_second;

  KMeansOptions options;
  options.threshold = 0;
  double fit_seconds[2] = {};
  CudaKMeansReport report;
  for (const int64_t sweeps : {0, 100}) {
    options.max_sweeps = sweeps;
    const auto begin = std::chrono::steady_clock::now();
    report = kmeans_cuda(x, c.entries, options, nullptr, centroids.data(), codes.data(), nullptr);
    fit_seconds[sweeps == 0 ? 0 : 1] =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  const double sweep = (fit_seconds[1] - fit_seconds[0]) / static_cast<double>(report.sweeps);
  std::printf(
      "%6lld entries of %2lld: search %8.3f ms, %5.1f%% of the minima's limit; fit of %lld sweeps "
      "%7.3f s, of it the start %.3f s; a sweep %.3f ms\n",
      static_cast<long long>(c.entries), static_cast<long long>(c.d), timing.seconds * 1e3,
      100 * limit / timing.seconds, static_cast<long long>(report.sweeps), fit_seconds[1], fit_seconds[0],
      sweep * 1e3);
  std::fflush(stdout);
  return {{"entries", c.entries},
          {"d", c.d},
          {"rows", kRows},
          {"search_seconds", timing.seconds},
          {"search_spread", timing.spread},
          {"fraction_of_limit", limit / timing.seconds},
          {"fit_seconds", fit_seconds[1]},
          {"start_seconds", fit_seconds[0]},
          {"sweeps", report.sweeps},
          {"sweep_seconds", sweep}};
}

nlohmann::json run(bool quick) {
  int device = 0;
  int kilohertz = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  check_cuda(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device), "clock rate");
  const double minima_per_second = kMinimaPerClock * properties.multiProcessorCount * 1e3 * kilohertz;
  std::printf("k-means on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const std::vector<Case> cases =
      quick ? std::vector<Case>{{4096, 4}}
            : std::vector<Case>{{64, 2}, {4096, 4}, {65536, 4}, {256, 8}, {4096, 8}, {4096, 16}};
  const std::vector<float> values = normal_values(kRows * (quick ? 4 : 16));
  for (const Case& c : cases) {
    report["rows"].push_back(measure(c, values, minima_per_second, quick ? 5 : 20));
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_kmeans", argc, argv, quantloom::run);
}
