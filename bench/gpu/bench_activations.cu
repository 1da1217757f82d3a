// Rounding of activations to integers, beside the streaming floor of the same run: the time of a kernel that
// reads as many bytes as rounding reads and writes. Buffers rotate, so that no run finds its data in the L2
// cache; times are of CUDA graphs of many launches that may overlap.
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "activations/produced.hpp"
#include "activations/token_rounding.hpp"
#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "gpu/streaming_floor.cuh"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom {
namespace {

constexpr int kReplays = 9;

// What a copy of the buffers holds, and its launches.
struct Work {
  int64_t bytes = 0;  // read and written
  std::function<void(int copy)> launch;
};

struct Line {
  std::string what;
  int64_t m = 0;
  int64_t k = 0;
};

nlohmann::json report_line(const bench::Stream& stream, const Line& line, const Work& work, int copies,
                           double floor) {
  const bench::Timing timing =
      bench::time_launches(stream, copies, kReplays, [&](int i) { work.launch(i % copies); });
  const double rate = 1e-9 * static_cast<double>(work.bytes) / timing.seconds;
  std::printf("%5lld x %-6lld %-34s %8.2f us %7.0f GB/s %5.2f x floor\n", static_cast<long long>(line.m),
              static_cast<long long>(line.k), line.what.c_str(), timing.seconds * 1e6, rate,
              timing.seconds / floor);
  std::fflush(stdout);
  return {{"m", line.m},
          {"k", line.k},
          {"what", line.what},
          {"seconds", timing.seconds},
          {"spread", timing.spread},
          {"floor_seconds", floor},
          {"over_floor", timing.seconds / floor}};
}

// Codes in integer order, as the products of integers read them.
void measure_tokens(const bench::Stream& stream, int64_t m, int64_t k, DType dtype, bool quick,
                    nlohmann::json& rows) {
  const int64_t outliers = k / 100;
  const int64_t x_bytes = m * k * size_of(dtype);
  const int64_t code_bytes = integers::order_bytes(m, k);
  const int copies = bench::copies_past_cache(x_bytes + code_bytes);
  std::vector<std::shared_ptr<std::byte>> x;
  std::vector<std::shared_ptr<std::byte>> codes;
  for (int i = 0; i < copies; ++i) {
    x.push_back(bench::device_memory(x_bytes));
    codes.push_back(bench::device_memory(code_bytes));
    bench::fill_values(x.back().get(), dtype, m * k, -1, 1, 0, static_cast<uint64_t>(i), stream.get());
  }
  const auto terms = bench::device_memory(16 * m);
  const auto kept = bench::device_memory(integers::order_bytes(m, 2 * outliers));
  std::vector<int32_t> columns;
  for (int64_t i = 0; i < outliers; ++i) columns.push_back(static_cast<int32_t>(i * k / outliers));
  const std::vector<int32_t> host = outlier_index(columns, k);
  const auto index = bench::device_memory(4 * std::ssize(host));
  check_cuda(cudaMemcpy(index.get(), host.data(), 4 * host.size(), cudaMemcpyHostToDevice), "outliers");
  const double floor = bench::streaming_floor(stream, x_bytes + m * k, true, kReplays).seconds;
  const auto line = [&](const char* spec, bool with_outliers) {
    const ActivationFormat format = activation_format_from_spec(spec);
    const auto launch = [&](int copy) {
      const auto at = static_cast<size_t>(copy);
      cuda::IntegerTokens out;
      out.codes = reinterpret_cast<int8_t*>(codes[at].get());
      out.terms = reinterpret_cast<integers::TokenTerms*>(terms.get());
      out.sums = !format.symmetric;
      if (with_outliers) {
        out.outlier_index = index.get();
        out.outlier_values = kept.get();
        out.outliers = outliers;
      }
      cuda::round_tokens({x[at].get(), dtype, m, k, k}, format, out, stream.get(), true);
    };
    const std::string what =
        std::string(name_of(dtype)) + " " + spec + (with_outliers ? ", 1% outliers" : "");
    rows.push_back(report_line(stream, {what, m, k}, {x_bytes + m * k, launch}, copies, floor));
  };
  line("int8:token", false);
  line("int8:token", true);
  if (quick) return;
  line("int8:token:asym", false);
  line("int4:token", false);
  line("int8:tensor:static=0.01", false);
}

// A norm or a gated activation with its rounding in one kernel, and in two with the values between them in
// memory.
void measure_produced(const bench::Stream& stream, ProducerKind kind, int64_t m, int64_t k,
                      nlohmann::json& rows) {
  const bool gated = kind == ProducerKind::silu_mul;
  const int64_t x_bytes = m * k * 2;
  const int64_t read = gated ? 2 * x_bytes : x_bytes;
  const int64_t code_bytes = integers::order_bytes(m, k);
  const int copies = bench::copies_past_cache(read + code_bytes);
  std::vector<std::shared_ptr<std::byte>> x;
  std::vector<std::shared_ptr<std::byte>> codes;
  for (int i = 0; i < copies; ++i) {
    x.push_back(bench::device_memory(read));
    codes.push_back(bench::device_memory(code_bytes));
    bench::fill_values(x.back().get(), DType::f16, read / 2, -1, 1, 0, static_cast<uint64_t>(i),
                       stream.get());
  }
  const auto terms = bench::device_memory(16 * m);
  const auto between = bench::device_memory(x_bytes);
  const auto weight = bench::device_memory(2 * k);
  bench::fill_values(weight.get(), DType::f16, k, 0.5F, 1.5F, 0, 7, stream.get());
  const ActivationFormat format = activation_format_from_spec("int8:token");
  const double floor = bench::streaming_floor(stream, read + m * k, true, kReplays).seconds;
  const auto out_of = [&](size_t at) {
    cuda::IntegerTokens out;
    out.codes = reinterpret_cast<int8_t*>(codes[at].get());
    out.terms = reinterpret_cast<integers::TokenTerms*>(terms.get());
    out.sums = false;
    return out;
  };
  const auto producer_of = [&](size_t at) {
    CudaProducer producer;
    producer.kind = kind;
    producer.dtype = DType::f16;
    if (gated) {
      producer.up = {x[at].get() + x_bytes, DType::f16, m, k, k};
    } else {
      producer.weight = weight.get();
    }
    return producer;
  };
  const auto in_one = [&](int copy) {
    const auto at = static_cast<size_t>(copy);
    cuda::round_produced_tokens({x[at].get(), DType::f16, m, k, k}, producer_of(at), format, out_of(at),
                                stream.get(), true);
  };
  const auto in_two = [&](int copy) {
    const auto at = static_cast<size_t>(copy);
    cuda::ProducedPlaces to;
    to.values = between.get();
    to.stride = k;
    const auto launch = gated ? cuda::launch_silu : cuda::launch_norm;
    launch({x[at].get(), DType::f16, m, k, k}, producer_of(at), nullptr, to, nullptr, 0, stream.get(), true);
    cuda::round_tokens({between.get(), DType::f16, m, k, k}, format, out_of(at), stream.get(), true);
  };
  const std::string name = gated ? "silu_mul" : kind == ProducerKind::rms_norm ? "rms_norm" : "layer_norm";
  rows.push_back(
      report_line(stream, {name + " and int8:token", m, k}, {read + m * k, in_one}, copies, floor));
  rows.push_back(
      report_line(stream, {name + ", then int8:token", m, k}, {read + m * k, in_two}, copies, floor));
}

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("activations on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const bench::Stream stream;
  auto& rows = report["rows"];
  for (const int64_t k : {4096, 14336}) {
    for (const int64_t m : {1, 16, 512, 4096}) {
      if (quick && m < 512) continue;
      measure_tokens(stream, m, k, DType::f16, quick, rows);
    }
  }
  for (const int64_t m : {512, 4096}) {
    measure_produced(stream, ProducerKind::rms_norm, m, 4096, rows);
    if (!quick) measure_produced(stream, ProducerKind::layer_norm, m, 4096, rows);
    measure_produced(stream, ProducerKind::silu_mul, m, 14336, rows);
  }
  if (!quick) measure_tokens(stream, 4096, 4096, DType::f32, true, rows);
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_activations", argc, argv, quantloom::run);
}
