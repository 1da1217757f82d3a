// Products of coded tensors on the device against float64 products of what the CPU decodes.
#include "quantloom/kernels/coded_product.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "cuda_streams.hpp"
#include "device_memory.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

class CodedCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class CodedCudaSmall : public CodedCuda {};

struct Case {
  int64_t n;
  int64_t k;
  double sigma = 2.0;
  int64_t rows_per_scale = 1;
  int64_t columns_per_scale = int64_t{1} << 40;
  bool even = true;
  CodedOptions options = {};
};

CodedTensor random_tensor(const Case& c, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(c.n * c.k));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(std::clamp(100 + std::nearbyint(c.sigma * random.normal(i)), 0.0, 255.0));
  }
  std::vector<float> values(256);
  for (size_t i = 0; i < values.size(); ++i) {
    const double v = 0.37 * (static_cast<double>(i) - 100);
    values[i] = static_cast<float>(c.even ? v : v + 0.003 * v * std::abs(v) + 0.01);
  }
  const int64_t scale_rows = ceil_div(c.n, c.rows_per_scale);
  const int64_t scale_columns = ceil_div(c.k, c.columns_per_scale);
  std::vector<float> scales(static_cast<size_t>(scale_rows * scale_columns));
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = static_cast<float>((random.uniform(i + codes.size()) + 0.2) * (i % 3 == 0 ? -1 : 1));
  }
  return {CodedMatrix(codes, c.n, c.k, c.options), values,
          MatrixView<const float>(scales.data(), scale_rows, scale_columns), c.rows_per_scale,
          c.columns_per_scale};
}

uint16_t to_bits(float v, DType dtype) {
  return dtype == DType::f16 ? f16_from_float(v) : bf16_from_float(v);
}
float from_bits(uint16_t v, DType dtype) {
  return dtype == DType::f16 ? float_from_f16(v) : float_from_bf16(v);
}

// Gaps between rows and around them hold what they held; everything else is within `tolerance`.
void expect_product(const CodedTensor& tensor, const CudaCodedTensor& device, int64_t m, DType dtype,
                    bool bias, const std::string& kernel, int64_t gap = 0, int64_t shift = 0) {
  SCOPED_TRACE(text_of(tensor.n(), " x ", tensor.k(), ", m ", m, ", ", name_of(dtype), ", ", kernel, ", gap ",
                       gap, ", splits ", tensor.codes().splits()));
  const int64_t n = tensor.n();
  const int64_t k = tensor.k();
  const int64_t x_stride = k + gap;
  const int64_t y_stride = n + gap;
  const CounterRandom random(77);
  std::vector<uint16_t> x(static_cast<size_t>(m * x_stride + shift));
  for (size_t i = 0; i < x.size(); ++i) x[i] = to_bits(static_cast<float>(random.normal(i)), dtype);
  std::vector<uint16_t> b(static_cast<size_t>(n));
  for (size_t i = 0; i < b.size(); ++i) b[i] = to_bits(static_cast<float>(random.normal(i + 99999)), dtype);
  const auto x_memory = device_bytes(2 * std::ssize(x));
  const auto b_memory = device_bytes(2 * n);
  upload(x.data(), x_memory.get(), 2 * std::ssize(x));
  upload(b.data(), b_memory.get(), 2 * n);
  const int64_t y_bytes = 2 * (m * y_stride + shift);
  const auto y_memory = device_bytes(y_bytes);
  check_cuda(cudaMemset(y_memory.get(), 0xff, static_cast<size_t>(y_bytes)), "poison");  // NaN
  const CudaMatmulOptions options{.kernel = kernel};
  const int64_t workspace_bytes = device.workspace(m, dtype, options);
  const auto workspace = device_bytes(workspace_bytes);
  check_cuda(cudaMemset(workspace.get(), 0xff, static_cast<size_t>(workspace_bytes)), "poison");
  const CudaMatmulArguments arguments{x_memory.get() + 2 * shift,
                                      x_stride,
                                      bias ? b_memory.get() : nullptr,
                                      y_memory.get() + 2 * shift,
                                      y_stride,
                                      m,
                                      dtype,
                                      workspace.get(),
                                      workspace_bytes,
                                      nullptr};
  device.matmul(arguments, options);
  check_cuda(cudaDeviceSynchronize(), "product");
  std::vector<uint16_t> y(static_cast<size_t>(y_bytes / 2));
  const auto bytes = download(y_memory.get(), y_bytes);
  std::memcpy(y.data(), bytes.data(), bytes.size());

  std::vector<float> w(static_cast<size_t>(n * k));
  tensor.dequantize(0, {w.data(), n, k});
  for (int64_t i = 0; i < shift; ++i) ASSERT_EQ(y[static_cast<size_t>(i)], 0xffff);
  double wrong = 0;
  double total = 0;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t row = 0; row < y_stride; ++row) {
      const uint16_t bits = y[static_cast<size_t>(shift + t * y_stride + row)];
      if (row >= n) {
        ASSERT_EQ(bits, 0xffff) << "token " << t << ", column " << row;
        continue;
      }
      double sum = bias ? from_bits(b[static_cast<size_t>(row)], dtype) : 0.0;
      double size = std::abs(sum);
      for (int64_t c = 0; c < k; ++c) {
        const double term = static_cast<double>(w[static_cast<size_t>(row * k + c)]) *
                            from_bits(x[static_cast<size_t>(shift + t * x_stride + c)], dtype);
        sum += term;
        size += std::abs(term);
      }
      const double got = from_bits(bits, dtype);
      ASSERT_TRUE(std::isfinite(got)) << "token " << t << ", row " << row;
      const double unit = dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
      ASSERT_LE(std::abs(got - sum), unit * (size + 0x1p-10)) << "token " << t << ", row " << row;
      wrong += (got - sum) * (got - sum);
      total += sum * sum;
    }
  }
  EXPECT_LE(std::sqrt(wrong), (dtype == DType::f16 ? 1e-3 : 8e-3) * std::sqrt(total));
}

void expect_values(const CodedTensor& tensor, const CudaCodedTensor& device, int64_t first, int64_t rows,
                   int64_t stride) {
  SCOPED_TRACE(text_of("rows ", first, " + ", rows, ", stride ", stride));
  std::vector<float> expected(static_cast<size_t>(rows * tensor.k()));
  tensor.dequantize(first, {expected.data(), rows, tensor.k()});
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const int64_t bytes = rows * stride * size_of(dtype);
    const auto memory = device_bytes(bytes);
    check_cuda(cudaMemset(memory.get(), 0xff, static_cast<size_t>(bytes)), "poison");
    device.dequantize(first, rows, memory.get(), dtype, stride, nullptr);
    const auto got = download(memory.get(), bytes);
    for (int64_t i = 0; i < rows * stride; ++i) {
      const int64_t column = i % stride;
      const float value =
          column < tensor.k() ? expected[static_cast<size_t>(i / stride * tensor.k() + column)] : 0;
      if (dtype == DType::f32) {
        uint32_t bits = 0;
        std::memcpy(&bits, got.data() + 4 * i, 4);
        ASSERT_EQ(bits, column < tensor.k() ? __builtin_bit_cast(uint32_t, value) : 0xffffffffU) << i;
      } else {
        uint16_t bits = 0;
        std::memcpy(&bits, got.data() + 2 * i, 2);
        ASSERT_EQ(bits, column < tensor.k() ? to_bits(value, dtype) : 0xffffU) << i;
      }
    }
  }
}

TEST_F(CodedCudaSmall, ProductsAndValues) {
  for (const Case& c : {Case{17, 100}, Case{33, 256, 6.0, 1, 64}, Case{40, 333, 0.7, 7, 1 << 20, false}}) {
    const CodedTensor tensor = random_tensor(c, 1);
    const CudaCodedTensor device(tensor);
    for (const DType dtype : {DType::f16, DType::bf16}) {
      for (const int64_t m : {1, 9, 20}) expect_product(tensor, device, m, dtype, m > 1, "fused");
    }
    expect_values(tensor, device, 3, c.n - 5, c.k + 3);
  }
}

TEST_F(CodedCuda, ProductsOfManyShapes) {
  uint64_t seed = 10;
  for (const Case& c :
       {Case{1, 1}, Case{1, 31, 0.0}, Case{16, 32}, Case{5, 33, 0.3}, Case{100, 1000, 1.0},
        Case{257, 129, 3.0}, Case{64, 4096, 2.0, 1 << 20, 1 << 20},
        Case{48, 2048, 2.0, 1, 1 << 20, true, {.splits = 5}},
        Case{48, 2049, 12.0, 3, 1 << 20, true, {.splits = 16}},
        Case{31, 640, 4.0, 1, 32, true, {.splits = 3}}, Case{96, 520, 50.0, 1, 128, false, {.splits = 4}},
        Case{20, 300, 60.0, 1, 1 << 20, true, {.table_bits = 8}},
        Case{20, 3000, 30.0, 1, 1 << 20, false, {.table_bits = 14, .splits = 7}}}) {
    const CodedTensor tensor = random_tensor(c, ++seed);
    const CudaCodedTensor device(tensor);
    for (const DType dtype : {DType::f16, DType::bf16}) {
      for (const int64_t m : {1, 2, 8, 13, 16, 17, 32}) {
        expect_product(tensor, device, m, dtype, m % 2 == 0, "fused");
      }
      expect_product(tensor, device, 3, dtype, true, "fused", 3, 1);
      expect_product(tensor, device, 3, dtype, false, "fused", 8, 8);
      expect_product(tensor, device, 33, dtype, true, "");
    }
    expect_product(tensor, device, 4, DType::f16, false, "decode", 5);
    expect_values(tensor, device, 0, c.n, c.k);
    expect_values(tensor, device, c.n / 2, 1, c.k + 5);
  }
}

TEST_F(CodedCuda, ScalesThatFusedDoesNotTake) {
  const CodedTensor tensor = random_tensor({50, 200, 3.0, 2, 7}, 40);
  const CudaCodedTensor device(tensor);
  EXPECT_EQ(device.kernel(1, DType::f16), "decode");
  EXPECT_THROW(static_cast<void>(device.kernel(1, DType::f16, {.kernel = "fused"})), Unsupported);
  for (const int64_t m : {1, 5, 40}) expect_product(tensor, device, m, DType::f16, true, "");
  expect_values(tensor, device, 1, 48, 200);
}

TEST_F(CodedCuda, RepeatsItself) {
  const CodedTensor tensor = random_tensor({512, 4096, 2.0, 1, 128, true, {.splits = 8}}, 50);
  const CudaCodedTensor device(tensor);
  const int64_t m = 5;
  const auto x = device_bytes(2 * m * 4096);
  check_cuda(cudaMemset(x.get(), 0x31, 2 * m * 4096), "x");
  std::optional<std::vector<std::byte>> first;
  for (int i = 0; i < 5; ++i) {
    const auto y = device_bytes(2 * m * 512);
    check_cuda(cudaMemset(y.get(), 0xff, 2 * m * 512), "poison");
    device.matmul({x.get(), 4096, nullptr, y.get(), 512, m, DType::f16, nullptr, 0, nullptr});
    const auto got = download(y.get(), 2 * m * 512);
    EXPECT_EQ(first.value_or(got), got);
    first = got;
  }
}

// Words that no encoder writes give wrong values, but nothing outside of memory is touched: run under
// compute-sanitizer. CodedMatrix::from_parts() would refuse them; memory of the device can still be damaged.
TEST_F(CodedCudaSmall, SurvivesDamagedWords) {
  const CodedTensor good = random_tensor({64, 600, 9.0, 1, 1 << 20, true, {.splits = 2}}, 60);
  const CounterRandom random(61);
  for (uint64_t round = 0; round < 6; ++round) {
    CodedTensor bad = good;
    auto& words = const_cast<std::vector<uint32_t>&>(bad.codes().words());
    for (size_t i = 0; i < words.size(); i += 1 + round % 3)
      words[i] = static_cast<uint32_t>(random.bits(i + round * words.size()));
    if (round == 5) std::fill(words.begin(), words.end(), ~uint32_t{0});
    const CudaCodedTensor device(bad);
    const auto x = device_bytes(2 * 600);
    const auto y = device_bytes(2 * 64);
    check_cuda(cudaMemset(x.get(), 0, 2 * 600), "x");
    device.matmul({x.get(), 600, nullptr, y.get(), 64, 1, DType::f16, nullptr, 0, nullptr});
    const auto w = device_bytes(4 * 64 * 600);
    device.dequantize(0, 64, w.get(), DType::f32, 600, nullptr);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
}

TEST_F(CodedCuda, EmptySizes) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {0, 40}, {40, 0}}) {
    const CodedTensor tensor = random_tensor({n, k}, 70);
    const CudaCodedTensor device(tensor);
    for (const int64_t m : {0, 3}) expect_product(tensor, device, m, DType::f16, true, "");
  }
}

TEST_F(CodedCuda, RefusesArguments) {
  const CodedTensor tensor = random_tensor({16, 64}, 80);
  const CudaCodedTensor device(tensor);
  const auto memory = device_bytes(1 << 20);
  CudaMatmulArguments good{memory.get(), 64, nullptr, memory.get() + 65536, 16, 2, DType::f16,
                           nullptr,      0,  nullptr};
  EXPECT_NO_THROW(device.matmul(good));
  const auto refused = [&](auto change) {
    CudaMatmulArguments bad = good;
    change(bad);
    EXPECT_THROW(device.matmul(bad), Error);
  };
  std::vector<std::byte> host(4096);
  refused([](auto& a) { a.m = -1; });
  refused([](auto& a) { a.x_stride = 63; });
  refused([](auto& a) { a.y_stride = 15; });
  refused([](auto& a) { a.x = nullptr; });
  refused([&](auto& a) { a.x = host.data(); });
  refused([&](auto& a) { a.y = host.data(); });
  refused([](auto& a) { a.x = static_cast<const std::byte*>(a.x) + 1; });
  refused([](auto& a) { a.dtype = DType::i32; });
  refused([](auto& a) { a.m = 40; });  // without a workspace
  EXPECT_THROW(device.matmul(good, {.kernel = "tiles"}), InvalidArgument);
  EXPECT_THROW(device.dequantize(0, 17, memory.get(), DType::f16, 64, nullptr), InvalidArgument);
  EXPECT_THROW(device.dequantize(0, 2, memory.get(), DType::f16, 63, nullptr), InvalidArgument);
  EXPECT_THROW(device.dequantize(0, 2, nullptr, DType::f16, 64, nullptr), InvalidArgument);
  EXPECT_THROW(device.dequantize(0, 2, memory.get(), DType::i32, 64, nullptr), TypeMismatch);
}

TEST_F(CodedCuda, CanBeCaptured) {
  const CodedTensor tensor = random_tensor({64, 512}, 90);
  const CudaCodedTensor device(tensor);
  const auto x = device_bytes(2 * 512);
  const auto y = device_bytes(2 * 64);
  check_cuda(cudaMemset(x.get(), 0x31, 2 * 512), "x");
  check_cuda(cudaMemset(y.get(), 0xff, 2 * 64), "poison");
  device.matmul({x.get(), 512, nullptr, y.get(), 64, 1, DType::f16, nullptr, 0, nullptr});
  const auto expected = download(y.get(), 2 * 64);
  check_cuda(cudaMemset(y.get(), 0xff, 2 * 64), "poison");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check_cuda(cudaDeviceSynchronize(), "poison");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  device.matmul({x.get(), 512, nullptr, y.get(), 64, 1, DType::f16, nullptr, 0, stream});
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  check_cuda(cudaGraphLaunch(executable, stream), "launch");
  check_cuda(cudaStreamSynchronize(stream), "graph");
  EXPECT_EQ(download(y.get(), 2 * 64), expected);
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
}

}  // namespace
}  // namespace quantloom
