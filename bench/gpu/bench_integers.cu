// Products of integers, the rounding of activations included, beside cuBLAS in float16 and cuBLASLt in int8
// alone (without rounding and scales), measured in turns in one run. The weights of successive launches are
// other copies, more than the L2 cache holds.
//
//   bench_integers [--quick] [--tiles] [--only NxKxM]... [--json FILE]
// --tiles times every size of tile, --only measures these products alone.
#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "activations/token_rounding.hpp"
#include "gpu/cublas_product.cuh"
#include "gpu/device.cuh"
#include "gpu/lt_integers.cuh"
#include "gpu/program.hpp"
#include "kernels/integer_product.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom {
namespace {

using bench::Shape;

constexpr int kReplays = 15;

// A matrix in integer order of random codes.
struct Weights {
  IntegerPlanes planes;
  std::vector<std::shared_ptr<std::byte>> memory;
};

Weights random_weights(const std::shared_ptr<const Format>& format, Shape shape, std::vector<int32_t> columns,
                       uint64_t seed, cudaStream_t stream) {
  Weights w;
  const int64_t outliers = std::ssize(columns);
  w.planes.format = format;
  w.planes.n = shape.n;
  w.planes.k = shape.k;
  for (const PlaneSpec& spec : integer_planes(*format, shape.n, shape.k, outliers, false)) {
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    w.memory.push_back(bench::device_memory(bytes));
    std::byte* const memory = w.memory.back().get();
    if (spec.name == "outlier_weights" || spec.name == "outlier_values") {
      bench::fill_values(memory, DType::f16, bytes / 2, -0.05F, 0.05F, 0, seed, stream);
    } else if (spec.name == "integers") {
      bench::fill_words(memory, bytes, seed, stream);
    } else {
      check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream), "plane");
    }
    if (spec.name == "rows") {
      std::vector<int32_t> rows(static_cast<size_t>(bytes / 4));
      for (size_t i = 0; i < rows.size(); i += 4) rows[i] = std::bit_cast<int32_t>(4e-4F);
      check_cuda(cudaMemcpyAsync(memory, rows.data(), rows.size() * 4, cudaMemcpyHostToDevice, stream),
                 "rows");
      check_cuda(cudaStreamSynchronize(stream), "rows");
    }
    if (spec.name == "outlier_index") {
      const std::vector<int32_t> index = outlier_index(columns, shape.k);
      check_cuda(cudaMemcpyAsync(memory, index.data(), index.size() * 4, cudaMemcpyHostToDevice, stream),
                 "outlier columns");
      check_cuda(cudaStreamSynchronize(stream), "outlier columns");
    }
    w.planes.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape, memory, w.memory.back(), Device::cuda));
  }
  w.planes.outlier_columns = std::move(columns);
  return w;
}

struct Case {
  Shape shape;
  int64_t m = 0;
  bool outliers = false;  // 1% of the columns
};

nlohmann::json measure(const bench::Stream& stream, const Case& c, bool tiles) {
  const int64_t wide = c.shape.n * c.shape.k;
  const int copies = bench::copies_past_cache(wide);
  const auto dense = std::make_shared<const Uniform>(8, Uniform::kPerChannel);
  std::shared_ptr<const Format> format = dense;
  ActivationFormat activations = activation_format_from_spec("int8:token");
  std::vector<int32_t> columns;
  if (c.outliers) {
    columns.resize(static_cast<size_t>((c.shape.k + 50) / 100));
    for (size_t i = 0; i < columns.size(); ++i) {
      columns[i] = static_cast<int32_t>(static_cast<int64_t>(i) * c.shape.k / std::ssize(columns));
    }
    format = std::make_shared<const Outliers>(dense, std::ssize(columns) * c.shape.n);
    activations = with_columns(activation_format_from_spec("int8:token:outliers=6:static-outliers"), columns);
  }
  std::vector<Weights> weights;
  for (int i = 0; i < copies; ++i) {
    weights.push_back(random_weights(format, c.shape, columns, static_cast<uint64_t>(i), stream.get()));
  }
  const auto x = bench::device_memory(c.m * c.shape.k * 2);
  bench::fill_values(x.get(), DType::f16, c.m * c.shape.k, -2.0F, 2.0F, 0, 7, stream.get());
  const auto y = bench::device_memory(c.m * c.shape.n * 4);
  const int64_t workspace_bytes =
      matmul_integers_cuda_workspace(weights[0].planes, c.m, DType::f16, activations);
  const auto workspace = bench::device_memory(workspace_bytes);
  const auto outlier_memory =
      bench::device_memory(integers::order_bytes(c.m, 2 * std::max<int64_t>(std::ssize(columns), 1)));
  CudaMatmulArguments arguments;
  arguments.x = x.get();
  arguments.x_stride = c.shape.k;
  arguments.y = y.get();
  arguments.y_stride = c.shape.n;
  arguments.m = c.m;
  arguments.workspace = workspace.get();
  arguments.workspace_bytes = workspace_bytes;
  arguments.stream = stream.get();
  const auto multiply = [&](const std::string& tile) {
    return [&, tile](int i) {
      CudaIntegerOptions options;
      options.overlap = true;
      options.tile = tile;
      matmul_integers_cuda(weights[static_cast<size_t>(i % copies)].planes, arguments, activations, options);
    };
  };

  // cuBLAS reads as many bytes of weights from memory that integer planes of two copies fill.
  const bench::CublasProduct cublas(stream);
  const int wide_copies = bench::copies_past_cache(2 * wide);
  const auto wide_weights = bench::device_memory(wide_copies * wide * 2);
  bench::fill_values(wide_weights.get(), DType::f16, wide_copies * wide, -0.05F, 0.05F, 0, 3, stream.get());
  const auto narrow_x = bench::device_memory(c.m * c.shape.k);
  bench::fill_words(narrow_x.get(), c.m * c.shape.k, 9, stream.get());
  const auto& first = weights[0].planes.plane("integers");
  const bench::LtIntegers lt32(stream, c.shape, c.m, false, first.bytes(), narrow_x.get(), y.get());
  const bench::LtIntegers lt8(stream, c.shape, c.m, true, first.bytes(), narrow_x.get(), y.get());
  const auto multiply_lt = [&](const bench::LtIntegers& lt) {
    return [&](int i) {
      lt(weights[static_cast<size_t>(i % copies)].planes.plane("integers").bytes(), narrow_x.get(), y.get());
    };
  };

  // The first step alone: its results lie in the workspace as the product finds them.
  const double rounding = bench::time_launches(stream, 2, kReplays, [&](int) {
                            cuda::IntegerTokens tokens;
                            tokens.codes = reinterpret_cast<int8_t*>(workspace.get());
                            tokens.terms = reinterpret_cast<integers::TokenTerms*>(y.get());
                            tokens.sums = false;
                            if (!columns.empty()) {
                              tokens.outlier_index = weights[0].planes.plane("outlier_index").bytes();
                              tokens.outlier_values = outlier_memory.get();
                              tokens.outliers = std::ssize(columns);
                            }
                            cuda::round_tokens({x.get(), DType::f16, c.m, c.shape.k, c.shape.k}, activations,
                                               tokens, stream.get(), true);
                          }).seconds;
  bench::Series ours(stream, copies, multiply(""));
  bench::Series dense_series(stream, wide_copies, [&](int i) {
    cublas(wide_weights.get() + (i % wide_copies) * wide * 2, x.get(), y.get(), DType::f16, c.shape, c.m);
  });
  bench::Series series32(stream, copies, multiply_lt(lt32));
  bench::Series series8(stream, copies, multiply_lt(lt8));
  // To and fro, as each meets the device in the state that the one before it leaves.
  std::array<bench::Series*, 4> turns = {&ours, &dense_series, &series32, &series8};
  for (bench::Series* series : turns) series->warm_up();
  const int replays = ours.replays(kReplays);
  for (int i = 0; i < replays; ++i) {
    for (bench::Series* series : turns) series->replay();
    std::ranges::reverse(turns);
  }
  const double seconds = ours.timing().seconds;
  const double dense_seconds = dense_series.timing().seconds;
  const double lt_seconds = std::min(series32.timing().seconds, series8.timing().seconds);
  const std::string tile = integer_tile(c.m, c.shape.n, c.shape.k);
  std::printf(
      "%6lld x %-6lld m = %-5lld %-11s %-12s %9.2f us (rounding alone %.2f), %6.0f T/s; %5.2f x cuBLAS "
      "float16 (%9.2f us), %5.2f x "
      "cuBLASLt int8 alone (int32 %.2f us, int8 %.2f us)\n",
      static_cast<long long>(c.shape.n), static_cast<long long>(c.shape.k), static_cast<long long>(c.m),
      c.outliers ? "1% outliers" : "", tile.c_str(), seconds * 1e6, rounding * 1e6,
      2e-12 * static_cast<double>(wide) * static_cast<double>(c.m) / seconds, dense_seconds / seconds,
      dense_seconds * 1e6, lt_seconds / seconds, series32.timing().seconds * 1e6,
      series8.timing().seconds * 1e6);
  std::fflush(stdout);
  nlohmann::json row = {{"n", c.shape.n},
                        {"k", c.shape.k},
                        {"m", c.m},
                        {"outlier_columns", columns.size()},
                        {"tile", tile},
                        {"seconds", seconds},
                        {"rounding_seconds", rounding},
                        {"cublas_seconds", dense_seconds},
                        {"lt_int32_seconds", series32.timing().seconds},
                        {"lt_int8_seconds", series8.timing().seconds}};
  if (!tiles) return row;
  const std::vector<std::string> names = integer_tiles(c.shape.k);
  std::deque<bench::Series> series;
  for (const std::string& name : names) series.emplace_back(stream, copies, multiply(name));
  for (bench::Series& one : series) one.warm_up();
  for (int i = 0; i < kReplays; ++i) {
    for (bench::Series& one : series) one.replay();
  }
  for (size_t i = 0; i < names.size(); ++i) {
    const double own = series[i].timing().seconds;
    std::printf("    %-12s %9.2f us\n", names[i].c_str(), own * 1e6);
    row["tiles"][names[i]] = own;
  }
  std::fflush(stdout);
  return row;
}

// "4096x14336x512": outputs, inputs, tokens.
Case case_of(const std::string& text) {
  Case c;
  char end = 0;
  long long n = 0;
  long long k = 0;
  long long m = 0;
  if (std::sscanf(text.c_str(), "%lldx%lldx%lld%c", &n, &k, &m, &end) != 3 || n < 1 || k < 1 || m < 1) {
    throw InvalidArgument("--only", text, "outputs x inputs x tokens, such as 4096x14336x512");
  }
  c.shape = {n, k};
  c.m = m;
  return c;
}

nlohmann::json run(bool quick, bool tiles, const std::vector<std::string>& only) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("integer products on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  if (tiles) {
    for (const cuda::IntegerKernel& kernel : cuda::integer_kernels()) {
      std::printf("tiles of %d tokens, %d x %d blocks%s: %d clusters at the same time\n", kernel.shape.tokens,
                  kernel.shape.rows, kernel.shape.parts, kernel.outliers ? ", outliers" : "",
                  cuda::resident_clusters(kernel, current_device()));
    }
  }
  const bench::Stream stream;
  std::vector<Shape> shapes = {{4096, 14336}, {14336, 4096}};
  if (!quick) shapes.insert(shapes.end(), {{4096, 4096}, {28672, 8192}, {8192, 28672}});
  const std::vector<int64_t> tokens =
      quick ? std::vector<int64_t>{16, 64, 128, 256, 512, 1024, 4096}
            : std::vector<int64_t>{1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  std::vector<Case> cases;
  for (const std::string& text : only) cases.push_back(case_of(text));
  if (only.empty()) {
    for (const Shape& shape : shapes) {
      for (const int64_t m : tokens) cases.push_back({shape, m, false});
    }
  }
  for (Case& c : cases) {
    for (const bool outliers : {false, true}) {
      c.outliers = outliers;
      report["rows"].push_back(measure(stream, c, tiles && !outliers));
    }
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  std::vector<char*> rest;
  bool tiles = false;
  std::vector<std::string> only;
  for (int i = 0; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--tiles") {
      tiles = true;
    } else if (std::string_view(argv[i]) == "--only" && i + 1 < argc) {
      only.emplace_back(argv[++i]);
    } else {
      rest.push_back(argv[i]);
    }
  }
  return quantloom::bench::run_program("bench_integers", static_cast<int>(rest.size()), rest.data(),
                                       [&](bool quick) { return quantloom::run(quick, tiles, only); });
}
