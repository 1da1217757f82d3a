// Products from memory of the CPU, as quantloom doctor makes them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "device_memory.hpp"
#include "quantloom/kernels/cuda_check.hpp"
#include "quantloom/kernels/integer_cuda.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

class CheckProductSmall : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

bool has_product(std::string_view format) {
  for (const KernelEntry& entry : kernel_table()) {
    if (entry.operation == "matmul" && entry.device == "cuda" && entry.format == format &&
        entry.activations == "float16") {
      return true;
    }
  }
  return false;
}

TEST_F(CheckProductSmall, EqualsTheDecodedProduct) {
  constexpr int64_t kRows = 37;
  constexpr int64_t kColumns = 200;
  constexpr int64_t kTokens = 3;
  const CounterRandom random(5);
  std::vector<float> w(kRows * kColumns);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(random.normal(i));
  std::vector<float> x(kTokens * kColumns);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random.below(w.size() + i, 17)) / 8.0F - 1.0F;  // exact in float16
  }
  int products = 0;
  for (const FormatEntry& entry : format_table()) {
    if (!has_product(entry.name)) continue;
    for (const std::string& spec : entry.examples) {
      SCOPED_TRACE(spec);
      ++products;
      const PackedTensor packed =
          round_nearest(MatrixView<const float>(w.data(), kRows, kColumns), format_from_spec(spec)).tensor;
      std::vector<float> decoded(w.size());
      dequantize(packed, MatrixView<float>(decoded.data(), kRows, kColumns));
      std::vector<float> y(kTokens * kRows, std::nanf(""));
      multiply_on_cuda(packed, MatrixView<const float>(x.data(), kTokens, kColumns),
                       MatrixView<float>(y.data(), kTokens, kRows));
      for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t row = 0; row < kRows; ++row) {
          double sum = 0;
          double magnitude = 0;
          for (int64_t c = 0; c < kColumns; ++c) {
            const double term = static_cast<double>(decoded[static_cast<size_t>(row * kColumns + c)]) *
                                static_cast<double>(x[static_cast<size_t>(token * kColumns + c)]);
            sum += term;
            magnitude += std::abs(term);
          }
          const auto got = static_cast<double>(y[static_cast<size_t>(token * kRows + row)]);
          ASSERT_NEAR(got, sum, 1e-3 * magnitude + 1e-6) << token << " " << row;
        }
      }
    }
  }
  EXPECT_GT(products, 0);
}

TEST_F(CheckProductSmall, IntegersAgreeWithTheCpu) {
  constexpr int64_t kRows = 37;
  constexpr int64_t kColumns = 256;
  constexpr int64_t kTokens = 3;
  const ActivationFormat activations = activation_format_from_spec("int8:token");
  const CounterRandom random(6);
  std::vector<float> w(kRows * kColumns);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(random.normal(i));
  std::vector<float> halves(kTokens * kColumns);
  for (size_t i = 0; i < halves.size(); ++i) {
    halves[i] = float_from_f16(f16_from_float(static_cast<float>(random.normal(w.size() + i))));
  }
  const MatrixView<const float> x(halves.data(), kTokens, kColumns);
  for (const char* spec : {"uniform:8:channel", "uniform:4:channel:asym", "sdr:4:g16"}) {
    SCOPED_TRACE(spec);
    const PackedTensor packed =
        round_nearest(MatrixView<const float>(w.data(), kRows, kColumns), format_from_spec(spec)).tensor;
    std::vector<float> results(kTokens * kRows, std::nanf(""));
    std::vector<float> expected(results.size());
    const MatrixView<float> y(results.data(), kTokens, kRows);
    if (why_not_matmul_integers_cuda(*packed.format, activations, kColumns, DType::f16)) {
      EXPECT_THROW(multiply_integers_on_cuda(packed, x, activations, y), Unsupported);
      continue;
    }
    multiply_integers_on_cuda(packed, x, activations, y);
    matmul(x, *prepare(packed), MatrixView<float>(expected.data(), kTokens, kRows), activations);
    for (size_t i = 0; i < results.size(); ++i) {
      ASSERT_NEAR(results[i], expected[i], 1e-3F * std::abs(expected[i]) + 1e-4F) << i;
    }
    const ActivationFormat outliers = activation_format_from_spec("int8:token:outliers=6");
    EXPECT_THROW(multiply_integers_on_cuda(packed, x, outliers, y), Unsupported);
  }
}

TEST_F(CheckProductSmall, KernelsAreNamedAsInTheTable) {
  for (const FormatEntry& entry : format_table()) {
    if (!has_product(entry.name)) continue;
    const PreparedPlanes w{format_from_spec(entry.examples.front()), 64, 128, {}};
    for (const int64_t m : {1, 8, 16, 17, 64, 1000, 100'000}) {
      const std::string name = matmul_cuda_kernel(w, m, DType::f16);
      const auto table = kernel_table();
      EXPECT_TRUE(std::ranges::any_of(table, [&](const KernelEntry& row) {
        return row.device == "cuda" && row.operation == "matmul" && row.kernel == name;
      })) << name;
      EXPECT_EQ(matmul_cuda_kernel(w, m, DType::f16, {.kernel = name}), name);
    }
    EXPECT_THROW(matmul_cuda_kernel(w, 1, DType::f64), Unsupported);
    EXPECT_THROW(matmul_cuda_kernel(w, 1, DType::f16, {.kernel = "no such kernel"}), InvalidArgument);
  }
}

TEST_F(CheckProductSmall, RefusesWrongShapes) {
  const PackedTensor packed = random_packed(Uniform(4, 32), 5, 64, 1);
  std::vector<float> values(1024);
  const MatrixView<const float> x(values.data(), 2, 64);
  const MatrixView<const float> narrow(values.data(), 2, 63);
  const MatrixView<float> y(values.data() + 512, 2, 5);
  const MatrixView<float> wide(values.data() + 512, 2, 6);
  EXPECT_THROW(multiply_on_cuda(packed, narrow, y), InvalidArgument);
  EXPECT_THROW(multiply_on_cuda(packed, x, wide), InvalidArgument);
  EXPECT_THROW(multiply_on_cuda(to_device(packed), x, y), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
