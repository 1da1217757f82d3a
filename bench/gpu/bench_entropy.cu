// Decoding of entropy coded streams on the device: to codes, and to float16 values with a scale per row, next
// to a plain copy of as many bytes as the decoder reads and writes, in the same run. Streams and outputs
// rotate, so that no launch finds its data in the L2 cache.
//
//   bench_entropy [--quick] [--json FILE]
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/formats/entropy_cuda.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr int kReplays = 15;

std::vector<uint8_t> normal_codes(int64_t count) {
  const CounterRandom random(1);
  // A period of codes is enough: the words of its copies differ from chunk to chunk in nothing that matters.
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  constexpr size_t kPeriod = (1 << 20) + 7;
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] =
        i >= kPeriod
            ? codes[i - kPeriod]
            : static_cast<uint8_t>(std::clamp(20 + std::nearbyint(1.93 * random.normal(i)), 0.0, 40.0));
  }
  return codes;
}

void measure(nlohmann::json& report, EntropyCoder coder, int64_t n, int64_t k, int64_t chunk) {
  const int64_t count = n * k;
  const auto codes = normal_codes(count);
  const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = chunk});
  const EntropyStream host(bytes);
  const double bits = 8.0 * static_cast<double>(bytes.size()) / static_cast<double>(count);
  const int copies = bench::copies_past_cache(std::ssize(bytes));
  const bench::Stream stream;
  std::vector<CudaEntropyStream> streams;
  std::vector<std::shared_ptr<std::byte>> outputs;
  for (int i = 0; i < copies; ++i) {
    streams.emplace_back(host, stream.get());
    outputs.push_back(bench::device_memory(2 * count));
  }
  const auto table = bench::device_memory(4 * 256);
  const auto scales = bench::device_memory(2 * n);
  check_cuda(cudaMemset(table.get(), 0, 4 * 256), "table");
  check_cuda(cudaMemset(scales.get(), 0, static_cast<size_t>(2 * n)), "scales");
  const EntropyValues values{n, k, reinterpret_cast<const float*>(table.get()), 256, scales.get(), DType::f16,
                             1, k};
  check_cuda(cudaDeviceSynchronize(), "fill");

  const auto at = [&](int i) { return static_cast<size_t>(i % copies); };
  for (const bool to_values : {false, true}) {
    const int64_t written = to_values ? 2 * count : count;
    const bench::Timing timing = bench::time_launches(stream, copies, kReplays, [&](int i) {
      if (to_values) {
        streams[at(i)].decode_values(values, 0, n, outputs[at(i)].get(), DType::f16, k, stream.get());
      } else {
        streams[at(i)].decode(0, count, reinterpret_cast<uint8_t*>(outputs[at(i)].get()), stream.get());
      }
    });
    const int64_t half = (std::ssize(bytes) + written) / 2;
    const bench::Timing copy = bench::time_launches(stream, copies, kReplays, [&](int i) {
      check_cuda(cudaMemcpyAsync(outputs[at(i)].get(), outputs[at(i + 1)].get(),
                                 static_cast<size_t>(std::min(half, 2 * count)), cudaMemcpyDeviceToDevice,
                                 stream.get()),
                 "copy");
    });
    streams[0].check(stream.get());
    const char* name = coder == EntropyCoder::rans ? "rans" : "huffman";
    std::printf(
        "%-8s %6lld x %-6lld chunk %7lld %.4f bits to %-7s %9.1f us %8.1f Gcodes/s %6.1f%% of a copy\n", name,
        static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(host.chunk()), bits,
        to_values ? "float16" : "codes", timing.seconds * 1e6,
        1e-9 * static_cast<double>(count) / timing.seconds, 100 * copy.seconds / timing.seconds);
    std::fflush(stdout);
    report["rows"].push_back({{"coder", name},
                              {"n", n},
                              {"k", k},
                              {"chunk", host.chunk()},
                              {"bits_per_code", bits},
                              {"to", to_values ? "float16" : "codes"},
                              {"seconds", timing.seconds},
                              {"copy_seconds", copy.seconds},
                              {"spread", timing.spread}});
  }
}

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("entropy decoding on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  for (const auto coder : {EntropyCoder::rans, EntropyCoder::huffman}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{4096, 4096}, {14336, 4096}, {28672, 8192}}) {
      if (quick && n > 4096) continue;
      for (const int64_t chunk : {0, 8192}) measure(report, coder, n, k, chunk);
    }
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_entropy", argc, argv, quantloom::run);
}
