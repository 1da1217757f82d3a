// Products of integers of 4 bits and in groups, the rounding of activations included, beside cuBLAS in
// float16, measured in turns in one run. The weights of successive launches are other copies, more than the
// L2 cache holds.
//
//   bench_integer_groups [--quick] [--tiles] [--json FILE]
// --tiles times every size of tile.
#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/cublas_product.cuh"
#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/activations/activation_format.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom {
namespace {

using bench::Shape;

constexpr int kReplays = 15;

struct Weights {
  IntegerPlanes planes;
  std::vector<std::shared_ptr<std::byte>> memory;
};

// A matrix in register order, from random planes.
Weights random_records(const std::shared_ptr<const Format>& format, Shape shape, uint64_t seed,
                       cudaStream_t stream) {
  PackedTensor packed{format, shape.n, shape.k, {}};
  for (const PlaneSpec& spec : format->planes(shape.n, shape.k)) {
    if (spec.optional) continue;
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    auto memory = bench::device_memory(bytes);
    if (spec.dtype == DType::f16) {
      bench::fill_values(memory.get(), DType::f16, bytes / 2, 2e-3F, 8e-3F, 0, seed, stream);
    } else {
      bench::fill_words(memory.get(), bytes, seed, stream);
    }
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape, memory.get(), memory, Device::cuda));
  }
  Weights w;
  w.planes.format = format;
  w.planes.n = shape.n;
  w.planes.k = shape.k;
  for (const PlaneSpec& spec : integer_planes(*format, shape.n, shape.k, 0, false)) {
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    w.memory.push_back(bench::device_memory(bytes));
    w.planes.planes.emplace(
        spec.name, Tensor(spec.dtype, spec.shape, w.memory.back().get(), w.memory.back(), Device::cuda));
  }
  prepare_integers_cuda(packed, w.planes, stream);
  check_cuda(cudaStreamSynchronize(stream), "weights");
  return w;
}

// Weights in register order.
nlohmann::json measure_records(const bench::Stream& stream, const std::string& name, Shape shape, int64_t m,
                               bool tiles) {
  const int64_t wide = shape.n * shape.k;
  const auto format = format_from_spec(name);
  const ActivationFormat activations = activation_format_from_spec("int8:token");
  const int copies = bench::copies_past_cache(wide / (name[8] == '4' ? 2 : 1));
  std::vector<Weights> weights;
  for (int i = 0; i < copies; ++i) {
    weights.push_back(random_records(format, shape, static_cast<uint64_t>(i), stream.get()));
  }
  const auto x = bench::device_memory(m * shape.k * 2);
  bench::fill_values(x.get(), DType::f16, m * shape.k, -2.0F, 2.0F, 0, 7, stream.get());
  const auto y = bench::device_memory(m * shape.n * 2);
  CudaMatmulArguments arguments;
  arguments.x = x.get();
  arguments.x_stride = shape.k;
  arguments.y = y.get();
  arguments.y_stride = shape.n;
  arguments.m = m;
  arguments.workspace_bytes = matmul_integers_cuda_workspace(weights[0].planes, m, DType::f16, activations);
  const auto workspace = bench::device_memory(arguments.workspace_bytes);
  arguments.workspace = workspace.get();
  arguments.stream = stream.get();
  const auto multiply = [&](const std::string& tile) {
    return [&, tile](int i) {
      matmul_integers_cuda(weights[static_cast<size_t>(i % copies)].planes, arguments, activations,
                           {.overlap = true, .tile = tile});
    };
  };
  const bench::CublasProduct cublas(stream);
  const int wide_copies = bench::copies_past_cache(2 * wide);
  const auto wide_weights = bench::device_memory(wide_copies * wide * 2);
  bench::fill_values(wide_weights.get(), DType::f16, wide_copies * wide, -0.05F, 0.05F, 0, 3, stream.get());
  bench::Series ours(stream, copies, multiply(""));
  bench::Series dense(stream, wide_copies, [&](int i) {
    cublas(wide_weights.get() + (i % wide_copies) * wide * 2, x.get(), y.get(), DType::f16, shape, m);
  });
  std::array<bench::Series*, 2> turns = {&ours, &dense};
  for (bench::Series* series : turns) series->warm_up();
  const int replays = ours.replays(kReplays);
  for (int i = 0; i < replays; ++i) {
    for (bench::Series* series : turns) series->replay();
    std::ranges::reverse(turns);
  }
  const double seconds = ours.timing().seconds;
  const double dense_seconds = dense.timing().seconds;
  const std::string tile = integer_tile(weights[0].planes, m);
  std::printf("%6lld x %-6lld m = %-5lld %-20s %-9s %9.2f us, %6.0f T/s; %5.2f x cuBLAS float16 (%9.2f us)",
              static_cast<long long>(shape.n), static_cast<long long>(shape.k), static_cast<long long>(m),
              name.c_str(), tile.c_str(), seconds * 1e6,
              2e-12 * static_cast<double>(wide) * static_cast<double>(m) / seconds, dense_seconds / seconds,
              dense_seconds * 1e6);
  nlohmann::json row = {{"n", shape.n},
                        {"k", shape.k},
                        {"m", m},
                        {"format", name},
                        {"tile", tile},
                        {"seconds", seconds},
                        {"cublas_seconds", dense_seconds}};
  if (tiles) {
    const std::vector<std::string> names = integer_tiles(weights[0].planes);
    std::deque<bench::Series> series;
    for (const std::string& one : names) series.emplace_back(stream, copies, multiply(one));
    for (bench::Series& one : series) one.warm_up();
    for (int i = 0; i < kReplays; ++i) {
      for (bench::Series& one : series) one.replay();
    }
    for (size_t i = 0; i < names.size(); ++i) {
      std::printf("  %s %.1f", names[i].c_str(), series[i].timing().seconds * 1e6);
      row["tiles"][names[i]] = series[i].timing().seconds;
    }
  }
  std::printf("\n");
  std::fflush(stdout);
  return row;
}

// Groups, and 4 bits.
nlohmann::json run_records(bool quick, bool tiles) {
  nlohmann::json rows = nlohmann::json::array();
  const bench::Stream stream;
  const std::vector<Shape> shapes = {{4096, 14336}, {14336, 4096}};
  const std::vector<std::string> formats =
      quick ? std::vector<std::string>{"uniform:4:channel", "uniform:4:g128", "uniform:8:g128"}
            : std::vector<std::string>{"uniform:4:channel", "uniform:4:g128", "uniform:4:g128:asym",
                                       "uniform:4:g64",     "uniform:8:g128", "uniform:8:g128:asym"};
  const std::vector<int64_t> tokens = quick
                                          ? std::vector<int64_t>{1, 64, 256, 1024, 4096}
                                          : std::vector<int64_t>{1, 16, 64, 128, 256, 512, 1024, 2048, 4096};
  for (const Shape& shape : shapes) {
    for (const std::string& format : formats) {
      for (const int64_t m : tokens) rows.push_back(measure_records(stream, format, shape, m, tiles));
    }
  }
  return rows;
}

nlohmann::json run(bool quick, bool tiles) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("integer products in groups on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  return {{"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", run_records(quick, tiles)}};
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  std::vector<char*> rest;
  bool tiles = false;
  for (int i = 0; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--tiles") {
      tiles = true;
    } else {
      rest.push_back(argv[i]);
    }
  }
  return quantloom::bench::run_program("bench_integer_groups", static_cast<int>(rest.size()), rest.data(),
                                       [&](bool quick) { return quantloom::run(quick, tiles); });
}
