// Products with planes of bits, against float64, and their order on the device.
#include <set>

#include "prepare_checks.hpp"

namespace quantloom {
namespace {

class BitPlaneCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
class BitPlaneCudaSmall : public BitPlaneCuda {};

constexpr std::array<const char*, 3> kKernels = {"bit_planes", "bit_planes_repeated", "decode"};

std::shared_ptr<const Format> random_format(int bits, Draws& draws) {
  static const std::vector<int64_t> kGroups = {
      8, 24, 32, 64, 96, 100, 128, 128, 128, 160, 256, 256, 300, 512, Bcq::kPerChannel};
  static const std::vector<DType> kScales = {DType::f16, DType::f16, DType::bf16, DType::f32};
  return std::make_shared<const Bcq>(bits, draws.pick(kGroups), draws.below(2) == 0, draws.pick(kScales));
}

std::set<std::string> check_case(const ProductCase& c, Draws& draws) {
  SCOPED_TRACE(c.text());
  Product product(c);
  std::set<std::string> taken;
  const auto check = [&](const CudaMatmulOptions& options) {
    std::string kernel;
    try {
      kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    } catch (const Unsupported&) {
      return;
    }
    SCOPED_TRACE(text_of_options(options));
    const auto y = product.run(options);
    EXPECT_EQ(y ? product.compare(*y, kernel) : "memory damaged", "");
    const auto again = product.run(options);
    EXPECT_TRUE(y && again && *y == *again) << "two runs differ";
    taken.insert(kernel);
  };
  check({});
  EXPECT_EQ(taken.size(), 1U) << "no kernel takes it";
  for (const char* kernel : kKernels) {
    check({.kernel = kernel});
    check({.overlap = true, .kernel = kernel, .splits = 1 << draws.below(4)});
  }
  return taken;
}

TEST_P(BitPlaneCuda, OrderEqualsTheCpuByteForByte) {
  Draws draws(static_cast<uint64_t>(GetParam()));
  static const std::vector<int64_t> kSizes = {0, 1, 2, 7, 31, 32, 33, 64, 65, 100, 127, 128, 129, 200, 333};
  for (uint64_t seed = 0; seed < 40 && !HasFailure(); ++seed) {
    ProductCase c;
    c.format = random_format(GetParam(), draws);
    c.n = draws.pick(kSizes);
    c.k = draws.pick(kSizes);
    c.group_index = dynamic_cast<const Bcq&>(*c.format).group_size > 0 && seed % 3 == 0;
    c.seed = seed;
    check_round_trip(c);
    check_decoding(c);
  }
}

TEST_P(BitPlaneCuda, AgreesWithFloat64) {
  static const std::vector<int64_t> kTokens = {1, 1, 1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 64, 65, 129};
  Draws draws(static_cast<uint64_t>(10 + GetParam()));
  std::set<std::string> taken;
  for (uint64_t seed = 0; seed < 50 && !HasFailure(); ++seed) {
    ProductCase c;
    c.format = random_format(GetParam(), draws);
    c.n = 1 + draws.below(seed % 6 == 0 ? 2000 : 300);
    c.k = 1 + draws.below(seed % 6 == 1 ? 3000 : 700);
    if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
    c.m = draws.pick(kTokens);
    c.exact = seed % 2 == 0;
    c.x_spread = draws.below(3) == 0 ? 6 : 0;
    c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
    c.group_index = dynamic_cast<const Bcq&>(*c.format).group_size > 0 && draws.below(4) == 0;
    c.bias = draws.below(2) == 0;
    c.prepare_on_cpu = draws.below(2) == 0;
    c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
    c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.seed = seed;
    taken.merge(check_case(c, draws));
  }
  EXPECT_EQ(taken.size(), kKernels.size());
}

TEST_P(BitPlaneCudaSmall, EveryKernelIsRight) {
  Draws draws(static_cast<uint64_t>(20 + GetParam()));
  for (const int64_t m : {1, 1, 5, 16, 18}) {
    ProductCase c;
    const int64_t group = draws.below(2) == 0 ? 32 : 128;
    c.format = std::make_shared<const Bcq>(GetParam(), group, draws.below(2) == 0);
    c.n = 70;
    c.k = 260;
    c.m = m;
    c.bias = true;
    c.exact = true;
    c.prepare_on_cpu = m > 1;
    c.group_index = m == 5;
    c.tight = true;
    c.seed = static_cast<uint64_t>(m);
    check_case(c, draws);
    check_round_trip(c);
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, BitPlaneCuda, ::testing::Range(1, 9));
INSTANTIATE_TEST_SUITE_P(Bits, BitPlaneCudaSmall, ::testing::Values(1, 2, 4, 5, 8));

// Shapes of models: teams of each size, activations of a window of columns.
TEST_F(BitPlaneCuda, LargerMatrices) {
  Draws draws(3);
  for (const auto& [n, k, spec] : std::vector<std::tuple<int64_t, int64_t, const char*>>{
           {4096, 4096, "bcq:4:g128:offset"}, {300, 70'000, "bcq:3:g128"}, {10'000, 1024, "bcq:2:channel"}}) {
    for (const int64_t m : {1, 4, 16}) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = n;
      c.k = k;
      c.m = m;
      c.prepare_on_cpu = false;
      c.exact = m == 1;
      check_case(c, draws);
    }
  }
}

// The sum of a stretch with an activation that is not finite is none, in every row.
TEST_F(BitPlaneCuda, ActivationsThatAreNotFinite) {
  for (const uint32_t bits : {0x7C00U, 0xFC00U, 0x7E00U}) {
    ProductCase c;
    c.format = format_from_spec("bcq:3:g128:offset");
    c.n = 130;
    c.k = 384;
    Product product(c);
    Elements x = product.x();
    x[200] = bits;
    product.upload_x(x);
    const auto y = product.run({});
    ASSERT_TRUE(y);
    for (const uint32_t value : *y) EXPECT_TRUE(std::isnan(float_from(value, c.dtype)));
  }
}

TEST_F(BitPlaneCuda, LargestAndSmallestActivations) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const float size : {65504.0F, 0x1p-24F, 0x1p-14F, 0x1p100F, 0x1p-100F}) {
      if (dtype == DType::f16 && (size > 65504.0F || size < 0x1p-24F)) continue;
      ProductCase c;
      c.format = std::make_shared<const Bcq>(4, 128, true, DType::f32);
      c.n = 65;
      c.k = 256;
      c.dtype = dtype;
      Product product(c);
      Elements x = product.x();
      std::vector<double> values(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const float value = (i % 3 == 0 ? -1.0F : 1.0F) * (i % 7 == 0 ? size : 0.0F);
        x[i] = bits_from(value, dtype);
        values[i] = float_from(x[i], dtype);
      }
      product.upload_x(x);
      const auto y = product.run({});
      ASSERT_TRUE(y);
      const std::vector<float> w = product.weights();
      for (int64_t row = 0; row < c.n; ++row) {
        double sum = 0;
        double magnitude = 0;
        for (int64_t i = 0; i < c.k; ++i) {
          const double term = w[static_cast<size_t>(row * c.k + i)] * values[static_cast<size_t>(i)];
          sum += term;
          magnitude += std::fabs(term);
        }
        const float wanted = float_from(bits_from(static_cast<float>(sum), dtype), dtype);
        const float got = float_from((*y)[static_cast<size_t>(row)], dtype);
        const double unit = unit_of(dtype);
        const double smallest = dtype == DType::f16 ? 0x1p-24 : 0x1p-133;
        if (std::isinf(wanted)) {
          EXPECT_EQ(got, wanted);
        } else {
          EXPECT_NEAR(got, wanted, 2 * unit * std::fabs(sum) + 1e-6 * magnitude + smallest)
              << "row " << row << ", " << size;
        }
      }
    }
  }
}

TEST_F(BitPlaneCuda, Refusals) {
  ProductCase c;
  c.format = format_from_spec("bcq:4:g64");
  c.n = 64;
  c.k = 256;
  c.m = 4;
  const Product product(c);
  const auto refuses = [&](const CudaMatmulOptions& options, const char* word) {
    try {
      static_cast<void>(matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options));
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_NE(std::string_view(error.what()).find(word), std::string_view::npos) << error.what();
    }
  };
  refuses({.kernel = "bit_planes_repeated"}, "17 to 64");
  refuses({.kernel = "bit_planes", .splits = 3}, "1, 2, 4 or 8");
  refuses({.kernel = "stream"}, "binary coding");
  EXPECT_EQ(matmul_cuda_kernel(product.prepared(), c.m, c.dtype, {}), "bit_planes");
  EXPECT_EQ(matmul_cuda_kernel(product.prepared(), c.m, DType::f32, {}), "decode");
}

}  // namespace
}  // namespace quantloom
