// The Hadamard transform of rows on the device, beside a copy of the same tensor in the same run. Buffers
// rotate, so that no run finds its data in the L2 cache; times are of CUDA graphs of many launches.
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/transforms/hadamard_cuda.hpp"

namespace quantloom {
namespace {

constexpr int kReplays = 15;

nlohmann::json measure(const bench::Stream& stream, int64_t rows, int64_t cols, int64_t block, DType dtype,
                       bool with_signs) {
  const int64_t bytes = rows * cols * size_of(dtype);
  const int copies = bench::copies_past_cache(2 * bytes);
  std::vector<std::shared_ptr<std::byte>> from;
  std::vector<std::shared_ptr<std::byte>> to;
  for (int i = 0; i < copies; ++i) {
    from.push_back(bench::device_memory(bytes));
    to.push_back(bench::device_memory(bytes));
    bench::fill_values(from.back().get(), dtype, rows * cols, -1, 1, 0, static_cast<uint64_t>(i),
                       stream.get());
  }
  const auto signs = bench::device_memory(sign_bytes(cols));
  bench::fill_words(signs.get(), sign_bytes(cols), 1, stream.get());
  CudaHadamardOptions options;
  options.block = block;
  if (with_signs) options.signs = reinterpret_cast<const uint8_t*>(signs.get());
  const bench::Timing timing = bench::time_launches(stream, copies, kReplays, [&](int i) {
    const auto at = static_cast<size_t>(i % copies);
    hadamard_cuda({from[at].get(), dtype, rows, cols, cols}, to[at].get(), cols, options, stream.get());
  });
  const bench::Timing copy = bench::time_launches(stream, copies, kReplays, [&](int i) {
    const auto at = static_cast<size_t>(i % copies);
    check_cuda(cudaMemcpyAsync(to[at].get(), from[at].get(), static_cast<size_t>(bytes),
                               cudaMemcpyDeviceToDevice, stream.get()),
               "copy");
  });
  const double rate = 2e-9 * static_cast<double>(bytes) / timing.seconds;
  std::printf(
      "%6lld x %-6lld blocks of %-6lld %-9s%s %9.2f us %8.1f GB/s, copy %9.2f us: %5.1f%% of its speed\n",
      static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(block),
      std::string(name_of(dtype)).c_str(), with_signs ? " signs" : "      ", timing.seconds * 1e6, rate,
      copy.seconds * 1e6, 100 * copy.seconds / timing.seconds);
  std::fflush(stdout);
  return {{"rows", rows},
          {"cols", cols},
          {"block", block},
          {"dtype", name_of(dtype)},
          {"signs", with_signs},
          {"seconds", timing.seconds},
          {"spread", timing.spread},
          {"copy_seconds", copy.seconds},
          {"copy_spread", copy.spread},
          {"percent_of_copy", 100 * copy.seconds / timing.seconds}};
}

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("hadamard on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const bench::Stream stream;
  auto& rows = report["rows"];
  constexpr int64_t kBatch = 16384;
  for (const int64_t n : {128, 256, 512, 1024, 2048, 4096, 5120, 8192, 14336, 16384, 28672, 32768}) {
    rows.push_back(measure(stream, kBatch, n, n, DType::f16, false));
    if (quick) continue;
    rows.push_back(measure(stream, kBatch, n, n, DType::f16, true));
    if (n % 4096 == 0 || n == 128 || n == 5120)
      rows.push_back(measure(stream, kBatch / 2, n, n, DType::f32, false));
  }
  rows.push_back(measure(stream, kBatch, 4096, 128, DType::f16, true));
  rows.push_back(measure(stream, kBatch, 4096, 128, DType::bf16, true));
  for (const int64_t n : {11008, 13824, 18944, 27648, 29568}) {
    if (!quick) rows.push_back(measure(stream, kBatch, n, n, DType::f16, false));
  }
  for (const int64_t m : {1, 8, 64}) {
    for (const int64_t n : {4096, 5120, 14336, 28672, 32768}) {
      if (!quick || m == 1) rows.push_back(measure(stream, m, n, n, DType::f16, true));
    }
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_hadamard", argc, argv, quantloom::run);
}
