// Products straight from entropy-coded weights on the device: fused (codes go from their streams to the
// tensor cores) and decoded piece by piece for cuBLASLt, next to cuBLAS with dense float16 weights and to the
// floor of the coded bytes (a kernel that only reads them), in the same run. Weights rotate, so that no
// launch finds its data in the L2 cache; outputs are filled with NaN before a launch that is checked against
// the decoded weights.
//
//   bench_coded [--quick] [--json FILE]
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cublas_product.cuh"
#include "device.cuh"
#include "program.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/kernels/coded_product.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/random.hpp"
#include "streaming_floor.cuh"

namespace quantloom::bench {
namespace {

constexpr int kReplays = 11;

// Codes of a grid around 32 whose entropy is about log2(4.13 sigma).
std::vector<uint8_t> normal_codes(int64_t count, double sigma) {
  const CounterRandom random(1);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  constexpr size_t kPeriod = (1 << 22) + 7;
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] =
        i >= kPeriod
            ? codes[i - kPeriod]
            : static_cast<uint8_t>(std::clamp(32 + std::nearbyint(sigma * random.normal(i)), 0.0, 63.0));
  }
  return codes;
}

struct Grid {
  const char* name;
  double sigma;
  bool even;      // an evenly spaced grid
  int64_t group;  // columns of a scale; 0: the whole matrix
  double overhead = 0.01;
};

class Bench {
 public:
  Bench(nlohmann::json& report, bool quick) : report_(report), quick_(quick) {}

  void run(const Shape& shape, const std::vector<Grid>& grids) {
    const auto codes_bytes = shape.n * shape.k;
    dense_.clear();
    const int dense_copies = copies_past_cache(2 * codes_bytes);
    {
      const auto w = device_memory(2 * codes_bytes * dense_copies);
      fill_values(w.get(), DType::f16, codes_bytes * dense_copies, -1, 1, 0, 3, stream_.get());
      const CublasProduct product(stream_);
      for (const int64_t m : tokens(shape)) {
        const auto x = device_memory(2 * m * shape.k);
        const auto y = device_memory(2 * m * shape.n);
        fill_values(x.get(), DType::f16, m * shape.k, -1, 1, 0, 4, stream_.get());
        dense_[m] =
            time_launches(stream_, dense_copies, kReplays, [&](int i) {
              product(w.get() + 2 * codes_bytes * (i % dense_copies), x.get(), y.get(), DType::f16, shape, m);
            }).seconds;
      }
    }
    for (const Grid& grid : grids) measure(shape, grid);
  }

 private:
  std::vector<int64_t> tokens(const Shape& shape) const {
    if (quick_) return {1, 16};
    if (shape.n * shape.k > int64_t{1} << 28) return {1, 8, 16, 32, 256};
    return {1, 4, 8, 16, 32, 64, 256, 1024};
  }

  void measure(const Shape& shape, const Grid& grid) {
    const auto codes = normal_codes(shape.n * shape.k, grid.sigma);
    std::vector<float> values(64);
    for (size_t i = 0; i < values.size(); ++i) {
      const double v = 0.58 * (static_cast<double>(i) - 32);
      values[i] = static_cast<float>(grid.even ? v : v + 0.01 * v * v * v);
    }
    const int64_t group = grid.group == 0 ? shape.k : grid.group;
    const CounterRandom random(2);
    std::vector<float> scales(
        static_cast<size_t>(ceil_div(shape.k, group) * (grid.group == 0 ? 1 : shape.n)));
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<float>(0.5 + random.uniform(i));
    const CodedMatrix matrix(codes, shape.n, shape.k, {.overhead = grid.overhead});
    const double count = static_cast<double>(shape.n) * static_cast<double>(shape.k);
    const double bits = 32.0 * static_cast<double>(matrix.words().size() + matrix.begins().size()) / count;
    const double entropy = entropy_of(count_codes(codes, 64));
    const int64_t scale_rows = grid.group == 0 ? 1 : shape.n;
    const CodedTensor tensor(matrix, values,
                             MatrixView<const float>(scales.data(), scale_rows, ceil_div(shape.k, group)),
                             grid.group == 0 ? shape.n : 1, group);
    const int64_t coded_bytes = checked_pad(4 * std::ssize(matrix.words()), 16);
    const int copies = copies_past_cache(coded_bytes);
    std::vector<CudaCodedTensor> weights;
    for (int i = 0; i < copies; ++i) weights.emplace_back(tensor, stream_.get());
    const Floor floor = streaming_floor(stream_, coded_bytes, false, kReplays);
    std::printf(
        "%6lld x %-6lld %-14s entropy %.4f bits, coded %.4f, table 2^%d, %d splits, %lld streams; floor of "
        "the coded "
        "bytes %.1f us\n",
        static_cast<long long>(shape.n), static_cast<long long>(shape.k), grid.name, entropy, bits,
        matrix.table_bits(), matrix.splits(), static_cast<long long>(matrix.streams()), floor.seconds * 1e6);
    for (const int64_t m : tokens(shape)) {
      const auto x = device_memory(2 * m * shape.k);
      const auto y = device_memory(2 * m * shape.n);
      fill_values(x.get(), DType::f16, m * shape.k, -1, 1, 0, 5, stream_.get());
      for (const char* kernel : {"fused", "decode"}) {
        const CudaMatmulOptions options{.kernel = kernel};
        if (std::string(kernel) == "fused" && m > 32) continue;
        const auto workspace = device_memory(weights[0].workspace(m, DType::f16, options));
        const int64_t workspace_bytes = weights[0].workspace(m, DType::f16, options);
        const CudaMatmulArguments arguments{
            x.get(), shape.k,    nullptr,         y.get(),         shape.n,
            m,       DType::f16, workspace.get(), workspace_bytes, stream_.get()};
        check_cuda(cudaMemset(y.get(), 0xff, static_cast<size_t>(2 * m * shape.n)), "fill with NaN");
        weights[0].matmul(arguments, options);
        const double error = check(tensor, arguments);
        const Timing timing = time_launches(stream_, copies, kReplays, [&](int i) {
          weights[static_cast<size_t>(i % copies)].matmul(arguments, options);
        });
        std::printf(
            "    m %5lld %-7s %9.1f us  %6.2f x floor  %5.2f x cuBLAS (%8.1f us)  %7.1f Gcodes/s  error "
            "%.1e\n",
            static_cast<long long>(m), kernel, timing.seconds * 1e6, timing.seconds / floor.seconds,
            dense_[m] / timing.seconds, dense_[m] * 1e6, 1e-9 * count / timing.seconds, error);
        std::fflush(stdout);
        report_["rows"].push_back({{"n", shape.n},
                                   {"k", shape.k},
                                   {"grid", grid.name},
                                   {"m", m},
                                   {"kernel", kernel},
                                   {"entropy", entropy},
                                   {"bits", bits},
                                   {"table_bits", matrix.table_bits()},
                                   {"splits", matrix.splits()},
                                   {"seconds", timing.seconds},
                                   {"spread", timing.spread},
                                   {"floor_seconds", floor.seconds},
                                   {"cublas_seconds", dense_[m]},
                                   {"error", error}});
      }
    }
  }

  // The relative error of some rows of y for the first and the last token.
  double check(const CodedTensor& tensor, const CudaMatmulArguments& a) const {
    const int64_t rows = std::min<int64_t>(32, tensor.n());
    const int64_t first = (tensor.n() - rows) / 2;
    std::vector<float> w(static_cast<size_t>(rows * tensor.k()));
    tensor.dequantize(first, {w.data(), rows, tensor.k()});
    std::vector<__half> x(static_cast<size_t>(a.m * tensor.k()));
    std::vector<__half> y(static_cast<size_t>(a.m * tensor.n()));
    stream_.synchronize();
    check_cuda(cudaMemcpy(x.data(), a.x, 2 * x.size(), cudaMemcpyDeviceToHost), "x");
    check_cuda(cudaMemcpy(y.data(), a.y, 2 * y.size(), cudaMemcpyDeviceToHost), "y");
    double wrong = 0;
    double total = 0;
    for (const __half v : y) {
      if (!std::isfinite(__half2float(v))) return INFINITY;
    }
    for (const int64_t token : {int64_t{0}, a.m - 1}) {
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t c = 0; c < tensor.k(); ++c) {
          sum += static_cast<double>(w[static_cast<size_t>(row * tensor.k() + c)]) *
                 __half2float(x[static_cast<size_t>(token * tensor.k() + c)]);
        }
        const double got = __half2float(y[static_cast<size_t>(token * tensor.n() + first + row)]);
        wrong += (got - sum) * (got - sum);
        total += sum * sum;
      }
    }
    return std::sqrt(wrong / total);
  }

  nlohmann::json& report_;
  bool quick_;
  Stream stream_;
  std::map<int64_t, double> dense_;
};

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("products from entropy-coded weights on %s, CUDA %s\n", properties.name,
              cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  Bench bench(report, quick);
  const Grid three{"3 bit", 1.9, true, 0};
  const std::vector<Grid> all = {three,
                                 {"3 bit, faster", 1.9, true, 0, 0.04},
                                 {"2 bit", 0.93, true, 0},
                                 {"4 bit", 3.8, true, 0},
                                 {"3 bit, uneven", 1.9, false, 0},
                                 {"3 bit g128", 1.9, true, 128}};
  bench.run({4096, 4096}, all);
  if (quick) return report;
  bench.run({14336, 4096}, {three, {"3 bit, faster", 1.9, true, 0, 0.04}});
  bench.run({28672, 8192}, all);
  bench.run({12288, 49152}, {three});
  return report;
}

}  // namespace
}  // namespace quantloom::bench

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_coded", argc, argv, quantloom::bench::run);
}
