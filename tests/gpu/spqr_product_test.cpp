// Products with the format "spqr", alone and with outliers, against float64.
#include <algorithm>
#include <set>

#include "product_case.hpp"

namespace quantloom {
namespace {

class SpqrProductCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

std::set<std::string> check_case(const ProductCase& c, Draws& draws) {
  SCOPED_TRACE(c.text());
  Product product(c);
  std::set<std::string> taken;
  const auto check = [&](const CudaMatmulOptions& options) {
    if (!options.kernel.empty() && why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) return;
    SCOPED_TRACE(text_of_options(options));
    const std::string kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    const auto y = product.run(options);
    EXPECT_EQ(y ? product.compare(*y, kernel) : "memory damaged", "");
    const auto again = product.run(options);
    EXPECT_TRUE(y && again && *y == *again) << "two runs differ";
    taken.insert(kernel);
  };
  check({});
  for (const char* kernel : {"spqr_stream", "spqr_partials", "spqr_repeated", "decode"}) {
    check({.kernel = kernel});
    check({.kernel = kernel, .splits = static_cast<int>(1 + draws.below(8))});
    check({.overlap = true, .kernel = kernel});
  }
  return taken;
}

// Whether weights of an exact case are numbers of `dtype`.
bool takes_exact(const Spqr& format, DType dtype) {
  const int bits = format.scale_bits + std::max(format.bits, format.zero_bits) + 2;
  return bits <= (dtype == DType::f16 ? 11 : dtype == DType::bf16 ? 8 : 20);
}

TEST_P(SpqrProductCuda, AgreesWithFloat64) {
  static const std::vector<int64_t> kTokens = {1, 1, 1, 1, 2, 3, 7, 8, 9, 15, 17, 33, 129};
  static const std::vector<int64_t> kGroups = {1, 16, 16, 16, 24, 32, 48, 64, 100, 128, 512};
  static const std::vector<int64_t> kBlocks = {1, 7, 16, 16, 16, 32, 48, 64, 128, 4096};
  Draws draws(static_cast<uint64_t>(40 + GetParam()));
  std::set<std::string> taken;
  for (uint64_t seed = 0; seed < 60 && !HasFailure(); ++seed) {
    ProductCase c;
    const auto format = std::make_shared<const Spqr>(
        GetParam(), draws.pick(kGroups), static_cast<int>(1 + draws.below(seed % 3 == 0 ? 8 : 3)),
        static_cast<int>(1 + draws.below(seed % 3 == 0 ? 8 : 4)), draws.pick(kBlocks));
    c.format = format;
    c.n = 1 + draws.below(seed % 6 == 0 ? 2000 : 300);
    c.k = 1 + draws.below(seed % 6 == 1 ? 2000 : 500);
    if (draws.below(2) == 0) c.k = (c.k + 127) / 128 * 128;
    if (seed % 2 == 1)
      c.format = std::make_shared<const Outliers>(format, c.n * c.k / (c.n * c.k > 200'000 ? 300 : 10));
    c.m = draws.pick(kTokens);
    c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
    c.exact = draws.below(2) == 0 && takes_exact(*format, c.dtype);
    c.group_index = draws.below(3) == 0;
    c.bias = draws.below(2) == 0;
    c.prepare_on_cpu = draws.below(2) == 0;
    c.x_spread = draws.below(3) == 0 ? 6 : 0;
    c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
    c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.seed = seed;
    taken.merge(check_case(c, draws));
  }
  EXPECT_TRUE(taken.contains("spqr_partials") && taken.contains("decode"));
}

INSTANTIATE_TEST_SUITE_P(Bits, SpqrProductCuda, ::testing::Range(1, 9));

// Small, for memory checkers: no guard zones.
class SpqrProductSmall : public SpqrProductCuda {};

TEST_P(SpqrProductSmall, AgreesWithFloat64) {
  Draws draws(9);
  for (const int64_t m : {1, 3, 9}) {
    ProductCase c;
    c.format = std::make_shared<const Outliers>(
        std::make_shared<const Spqr>(GetParam(), 16, m == 3 ? 5 : 3, 3, 16), int64_t{70});
    c.n = 67;
    c.k = 200;
    c.m = m;
    c.group_index = m != 1;
    c.bias = true;
    c.tight = true;
    check_case(c, draws);
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, SpqrProductSmall, ::testing::Values(1, 3, 8));

TEST_F(SpqrProductCuda, ExtremesOfGridsAndActivations) {
  Draws draws(5);
  ProductCase c{.format = std::make_shared<const Spqr>(3, 16, 3, 3, 16), .n = 130, .k = 384};
  for (const int64_t m : {1, 5, 200}) {
    c.m = m;
    c.dtype = DType::bf16;
    c.x_spread = 20;
    check_case(c, draws);
  }
  // Grids far from zero, and as small and as large as they come.
  for (const float step : {0x1p-24F, 1.0F, 512.0F}) {
    for (const float zero : {-1024.0F, 0.0F, 60.0F}) {
      c.m = 1;
      c.x_spread = 0;
      PackedTensor packed = random_planes(c, draws);
      for (const char* name : {"scale_grids", "zero_grids"}) {
        const auto numbers = packed.planes.at(name).values<uint16_t>();
        for (size_t i = 0; i < numbers.size(); i += 2) {
          numbers[i] = f16_from_float(step);
          numbers[i + 1] = f16_from_float(zero);
        }
      }
      std::vector<float> w(static_cast<size_t>(c.n * c.k));
      dequantize(packed, MatrixView<float>(w.data(), c.n, c.k));
      const PreparedPlanes prepared = prepared_on_device(packed, false);
      Elements x;
      for (int64_t i = 0; i < c.k; ++i) x.push_back(bits_from(draws.normal(), DType::bf16));
      const auto x_memory = device_bytes(c.k * 2);
      upload_elements(x, DType::bf16, x_memory.get());
      const auto y = device_bytes(c.n * 2);
      CudaMatmulArguments a{.x = x_memory.get(), .y = y.get(), .m = 1, .dtype = DType::bf16};
      matmul_cuda(prepared, a, {.kernel = "spqr_stream"});
      check_cuda(cudaDeviceSynchronize(), "spqr_stream");
      const auto bytes = download(y.get(), c.n * 2);
      for (int64_t row = 0; row < c.n; ++row) {
        double sum = 0;
        double size = 0;
        for (int64_t i = 0; i < c.k; ++i) {
          const double term = static_cast<double>(w[static_cast<size_t>(row * c.k + i)]) *
                              float_from(x[static_cast<size_t>(i)], DType::bf16);
          sum += term;
          size += std::fabs(term);
        }
        const float got = float_from(element_at(bytes.data(), row, DType::bf16), DType::bf16);
        ASSERT_NEAR(got, sum, 0x1p-8 * std::fabs(sum) + 0x1p-13 * size)
            << "step " << step << ", zero " << zero << ", row " << row;
      }
    }
  }
}

TEST_F(SpqrProductCuda, ShapesOfModels) {
  Draws draws(3);
  for (const int64_t m : {1, 4, 16, 40, 200}) {
    ProductCase c;
    c.format =
        std::make_shared<const Outliers>(std::make_shared<const Spqr>(3, 16, 3, 3, 16), int64_t{40'000});
    c.n = 4096;
    c.k = 4096;
    c.m = m;
    c.prepare_on_cpu = false;
    c.group_index = m == 4;
    c.exact = m == 1;
    check_case(c, draws);
  }
}

// Activations of fewer tokens than there are fit in shared memory at a time.
TEST_F(SpqrProductCuda, OutliersOfWideMatrices) {
  Draws draws(4);
  for (const int64_t k : {20'000, 19'999, 50'000}) {
    for (const int64_t m : {1, 3, 8}) {
      ProductCase c;
      c.format =
          std::make_shared<const Outliers>(std::make_shared<const Spqr>(3, 16, 3, 3, 16), int64_t{20'000});
      c.n = 130;
      c.k = k;
      c.m = m;
      c.x_gap = k % 8 == 0 ? 8 : 1;
      c.prepare_on_cpu = false;
      check_case(c, draws);
    }
  }
}

TEST_F(SpqrProductCuda, SaysWhatItTakes) {
  const Spqr odd(3, 16, 3, 3, 24);
  const auto why = why_not_matmul_cuda(odd, 1, DType::f16, {.kernel = "spqr_stream"});
  ASSERT_TRUE(why);
  EXPECT_NE(why->find("16 rows"), std::string::npos) << *why;
  EXPECT_FALSE(why_not_matmul_cuda(odd, 1, DType::f16));
  EXPECT_TRUE(why_not_matmul_cuda(odd, 1, DType::f16, {.kernel = "stream"}));
  EXPECT_TRUE(why_not_matmul_cuda(Spqr(3), 9, DType::f16, {.kernel = "spqr_stream"}));
  EXPECT_TRUE(why_not_matmul_cuda(Spqr(3), 1, DType::f32, {.kernel = "spqr_stream"}));
  EXPECT_FALSE(why_not_matmul_cuda(Spqr(3), 1, DType::f32));
}

}  // namespace
}  // namespace quantloom
