// Products of one token, which narrow uniform formats multiply as integers: activations of any magnitude, and
// matrices whose activations fit a processor's shared memory or do not.
#include <limits>

#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

class MatmulCudaDigits : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

INSTANTIATE_TEST_SUITE_P(Bits, MatmulCudaDigits, ::testing::Range(1, 9));

const std::vector<std::string> kKernels = {"stream", "stream_partials"};

void check(const ProductCase& c, const std::vector<int>& splits) {
  SCOPED_TRACE(c.text());
  Product product(c);
  for (const std::string& kernel : kKernels) {
    for (const int split : splits) {
      const CudaMatmulOptions options{.kernel = kernel, .splits = split, .digits = true};
      if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) continue;
      SCOPED_TRACE(text_of_options(options));
      const auto y = product.run(options);
      ASSERT_TRUE(y);
      EXPECT_EQ(product.compare(*y, kernel), "");
    }
  }
}

TEST_P(MatmulCudaDigits, RandomConfigurationsAgreeWithFloat64) {
  static const std::vector<int64_t> kGroups = {
      64, 128, 192, 256, 320, 1024, Uniform::kPerChannel, Uniform::kPerTensor};
  for (uint64_t seed = 0; seed < 64; ++seed) {
    Draws draws(seed * 31 + static_cast<uint64_t>(GetParam()));
    ProductCase c;
    c.format = std::make_shared<const Uniform>(GetParam(), draws.pick(kGroups), draws.below(2) == 0,
                                               draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}));
    c.n = 1 + draws.below(seed % 8 == 0 ? 5000 : 700);
    c.k = 1 + draws.below(seed % 8 == 1 ? 9000 : 2000);
    if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
    c.dtype = draws.below(2) == 0 ? DType::f16 : DType::bf16;
    c.group_index = draws.below(6) == 0;
    c.bias = draws.below(2) == 0;
    c.exact = draws.below(3) == 0;
    c.prepare_on_cpu = false;
    c.x_offset = draws.below(4) == 0 ? 1 + draws.below(7) : 0;
    c.x_spread = static_cast<int>(draws.below(3)) * 6;
    c.seed = seed;
    check(c, {0, static_cast<int>(1 + draws.below(8))});
  }
}

TEST_P(MatmulCudaDigits, LongRowsAgreeWithFloat64) {
  for (const int64_t k : {24576, 49152, 53248, 60000, 131072}) {
    ProductCase c;
    c.format = std::make_shared<const Uniform>(GetParam(), 128, k % 3 == 0);
    c.n = 200;
    c.k = k;
    c.prepare_on_cpu = false;
    c.seed = static_cast<uint64_t>(k);
    check(c, {0, 1, 4});
  }
}

TEST_P(MatmulCudaDigits, ActivationsThatAreNotFiniteGiveNoFiniteSum) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
      ProductCase c;
      c.format = std::make_shared<const Uniform>(GetParam(), 128, true);
      c.n = 130;
      c.k = 1000;
      c.dtype = dtype;
      c.prepare_on_cpu = false;
      const Product product(c);
      Elements x = product.x();
      x[777] = bits_from(bad, dtype);
      product.upload_x(x);
      const auto y = product.run({.digits = true});
      ASSERT_TRUE(y);
      for (const uint32_t element : *y) EXPECT_FALSE(std::isfinite(float_from(element, dtype)));
    }
  }
}

// The largest and the smallest numbers of each type.
TEST_P(MatmulCudaDigits, ExtremeActivationsAreTakenWhole) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int exponent : {-24, -14, 0, 14, -90, 90}) {
      if (dtype == DType::f16 && std::abs(exponent) > 24) continue;
      ProductCase c;
      c.format = std::make_shared<const Uniform>(GetParam(), 64, true, DType::f32);
      c.n = 70;
      c.k = 64;
      c.dtype = dtype;
      c.prepare_on_cpu = false;
      const Product product(c);
      const std::vector<float> w = product.weights();
      Elements x = product.x();
      // One activation is not zero: y is its multiple of a column of weights.
      std::ranges::fill(x, 0U);
      x[17] = bits_from(std::ldexp(1.0F, exponent), dtype);
      product.upload_x(x);
      const auto y = product.run({.digits = true});
      ASSERT_TRUE(y);
      for (int64_t row = 0; row < c.n; ++row) {
        const float expected = std::ldexp(w[static_cast<size_t>(row * c.k + 17)], exponent);
        // As numbers: a zero may lose its sign.
        EXPECT_EQ(float_from((*y)[static_cast<size_t>(row)], dtype),
                  float_from(bits_from(expected, dtype), dtype))
            << "row " << row << ", 2^" << exponent;
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
