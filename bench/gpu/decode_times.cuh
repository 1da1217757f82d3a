// Rows decoded from the order of the kernels (decode_fragments_cuda), to the bit of the CPU, beside a fill of
// the same output. Outputs rotate, so that they leave the L2 cache; times are of CUDA graphs of many
// launches.
#pragma once

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/product_case.cuh"
#include "gpu/program.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom::bench {

constexpr int kDecodeReplays = 9;

inline nlohmann::json measure_decode(const Stream& stream, const std::string& spec, int64_t n, int64_t k,
                                     DType dtype) {
  const ProductCase matrix(stream, format_from_spec(spec), n, k);
  const int64_t bytes = n * k * size_of(dtype);
  const int copies = copies_past_cache(bytes);
  std::vector<std::shared_ptr<std::byte>> out;
  for (int i = 0; i < copies; ++i) out.push_back(device_memory(bytes));
  const auto place = [&](int i) { return out[static_cast<size_t>(i % copies)].get(); };
  const Timing timing = time_launches(stream, copies, kDecodeReplays, [&](int i) {
    decode_fragments_cuda(matrix.copy(i), place(i), dtype, k, stream.get());
  });
  const Timing fill = time_launches(stream, copies, kDecodeReplays, [&](int i) {
    check_cuda(cudaMemsetAsync(place(i), 0, static_cast<size_t>(bytes), stream.get()), "fill");
  });
  const double rate = static_cast<double>(n * k) / timing.seconds;
  std::printf("%-22s %6lld x %-6lld %-9s %9.1f us %8.1f * 10^9 weights/s %6.2f x fill\n", spec.c_str(),
              static_cast<long long>(n), static_cast<long long>(k), std::string(name_of(dtype)).c_str(),
              timing.seconds * 1e6, rate * 1e-9, timing.seconds / fill.seconds);
  std::fflush(stdout);
  return {{"format", spec},
          {"n", n},
          {"k", k},
          {"out", name_of(dtype)},
          {"seconds", timing.seconds},
          {"spread", timing.spread},
          {"fill_seconds", fill.seconds},
          {"weights_per_second", rate}};
}

inline nlohmann::json decode_report(const char* what) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("%s decoded on %s, CUDA %s\n", what, properties.name, cuda_toolkit_version().c_str());
  return {{"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
}

}  // namespace quantloom::bench
