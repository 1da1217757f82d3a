// Dequantization of the format "uniform" on the device, as a share of what a plain copy of the same number
// of bytes reaches in the same run. Buffers rotate, so that no run finds its data in the L2 cache; times are
// of CUDA events around many launches, the best of several repeats.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/check.cuh"
#include "gpu/program.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom {
namespace {

constexpr int64_t kMinRotatedBytes = int64_t{512} << 20;

struct Settings {
  int repeats = 7;
  int launches = 50;
};

Tensor device_tensor(DType dtype, std::vector<int64_t> shape) {
  const int64_t bytes = checked_mul(checked_product(shape), size_of(dtype));
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(bytes)), "cudaMalloc");
  std::shared_ptr<const void> owner(memory, [](void* p) { static_cast<void>(cudaFree(p)); });
  // As float16 scales: 0.0078; as codes: some of each kind.
  check_cuda(cudaMemset(memory, 0x20, static_cast<size_t>(bytes)), "cudaMemset");
  return {dtype, std::move(shape), memory, std::move(owner), Device::cuda};
}

// Seconds of one call of run(i), the best of the repeats; i counts launches.
template <class Run>
double seconds_per_launch(const Settings& settings, const Run& run) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  for (int i = 0; i < settings.launches; ++i) run(i);
  double best = std::numeric_limits<double>::infinity();
  for (int repeat = 0; repeat < settings.repeats; ++repeat) {
    check_cuda(cudaEventRecord(begin), "record");
    for (int i = 0; i < settings.launches; ++i) run(i);
    check_cuda(cudaEventRecord(end), "record");
    check_cuda(cudaEventSynchronize(end), "synchronize");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    best = std::min(best, milliseconds * 1e-3 / settings.launches);
  }
  check_cuda(cudaEventDestroy(begin), "destroy");
  check_cuda(cudaEventDestroy(end), "destroy");
  return best;
}

nlohmann::json measure(const Settings& settings, const Uniform& uniform, int64_t n, int64_t k, DType dtype) {
  const auto format = std::make_shared<const Uniform>(uniform);
  const int64_t out_bytes = n * k * size_of(dtype);
  int64_t packed_bytes = 0;
  for (const PlaneSpec& spec : uniform.planes(n, k)) {
    if (!spec.optional) packed_bytes += checked_product(spec.shape) * size_of(spec.dtype);
  }
  const int64_t traffic = packed_bytes + out_bytes;
  const int copies = static_cast<int>(std::max<int64_t>(2, ceil_div(kMinRotatedBytes, traffic)));

  std::vector<PackedTensor> inputs;
  std::vector<Tensor> outputs;
  for (int i = 0; i < copies; ++i) {
    PackedTensor packed{format, n, k, {}};
    for (const PlaneSpec& spec : uniform.planes(n, k)) {
      if (!spec.optional) {
        packed.planes.emplace(spec.name, device_tensor(spec.dtype, spec.shape));
      }
    }
    inputs.push_back(std::move(packed));
    outputs.push_back(device_tensor(dtype, {n, k}));
  }
  const double seconds = seconds_per_launch(settings, [&](int i) {
    dequantize_cuda(inputs[static_cast<size_t>(i % copies)], outputs[static_cast<size_t>(i % copies)].bytes(),
                    dtype, k, nullptr);
  });

  // The floor: a copy that moves as many bytes in all, half read and half written.
  const int64_t half = traffic / 2;
  std::vector<Tensor> blocks;
  for (int i = 0; i < 2 * copies; ++i) blocks.push_back(device_tensor(DType::u8, {half}));
  const double floor = seconds_per_launch(settings, [&](int i) {
    const auto pair = static_cast<size_t>(i % copies);
    check_cuda(cudaMemcpyAsync(blocks[2 * pair].bytes(), blocks[2 * pair + 1].bytes(),
                               static_cast<size_t>(half), cudaMemcpyDeviceToDevice),
               "copy");
  });
  const double share = 100.0 * floor / seconds;
  std::printf("%-24s %6lld x %-6lld %-9s %9.1f us %8.1f GB/s %6.1f%% of the copy's speed\n",
              uniform.spec().c_str(), static_cast<long long>(n), static_cast<long long>(k),
              std::string(name_of(dtype)).c_str(), seconds * 1e6,
              static_cast<double>(traffic) / seconds * 1e-9, share);
  std::fflush(stdout);
  return {{"format", uniform.spec()},
          {"n", n},
          {"k", k},
          {"out", name_of(dtype)},
          {"seconds", seconds},
          {"copy_seconds", floor},
          {"bytes", traffic},
          {"percent_of_copy", share}};
}

nlohmann::json run(bool quick) {
  Settings settings;
  if (quick) settings.repeats = 3;
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("dequantize on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const std::vector<std::pair<int64_t, int64_t>> shapes =
      quick
          ? std::vector<std::pair<int64_t, int64_t>>{{4096, 4096}}
          : std::vector<std::pair<int64_t, int64_t>>{{4096, 4096}, {4096, 14336}, {8192, 8192}, {128, 4096}};
  for (const auto& [n, k] : shapes) {
    for (const int bits : {2, 3, 4, 8}) {
      for (const bool symmetric : {true, false}) {
        for (const DType dtype : {DType::f16, DType::f32}) {
          if (quick && dtype == DType::f32) continue;
          report["rows"].push_back(measure(settings, Uniform(bits, 128, symmetric), n, k, dtype));
        }
      }
    }
    report["rows"].push_back(measure(settings, Uniform(4, 3), n, k, DType::f16));
    report["rows"].push_back(measure(settings, Uniform(4, Uniform::kPerChannel), n, k, DType::f16));
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_dequantize", argc, argv, quantloom::run);
}
