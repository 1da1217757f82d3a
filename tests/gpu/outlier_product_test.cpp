// Products with outliers beside other formats, against float64.
#include <algorithm>
#include <set>

#include "product_case.hpp"

namespace quantloom {
namespace {

class OutlierProductCuda : public ::testing::TestWithParam<const char*> {
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
    if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) return;
    SCOPED_TRACE(text_of_options(options));
    const std::string kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    const auto y = product.run(options);
    EXPECT_EQ(y ? product.compare(*y, kernel) : "memory damaged", "");
    const auto again = product.run(options);
    EXPECT_TRUE(y && again && *y == *again) << "two runs differ";
    taken.insert(kernel);
  };
  check({});
  EXPECT_EQ(taken.size(), 1U) << "no kernel takes it";
  for (const char* kernel : {"stream", "stream_partials", "stream_repeated", "decode"}) {
    check({.kernel = kernel});
    check({.kernel = kernel, .splits = static_cast<int>(1 + draws.below(8))});
    check({.overlap = true, .kernel = kernel});
    check({.kernel = kernel, .digits = true});
  }
  return taken;
}

// Groups of some of the columns.
bool takes_group_index(const Format& format) {
  const auto specs = format.planes(1, 1);
  return std::ranges::any_of(specs, [](const PlaneSpec& spec) { return spec.name == "group_index"; });
}

TEST_P(OutlierProductCuda, AgreesWithFloat64) {
  static const std::vector<int64_t> kTokens = {1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 129};
  static const std::vector<double> kPercents = {0.01, 0.3, 1, 5, 40};
  Draws draws(7);
  std::set<std::string> taken;
  for (uint64_t seed = 0; seed < 60 && !HasFailure(); ++seed) {
    ProductCase c;
    c.format = std::make_shared<const Outliers>(format_from_spec(GetParam()), draws.pick(kPercents));
    c.n = 1 + draws.below(seed % 6 == 0 ? 2000 : 300);
    c.k = 1 + draws.below(seed % 6 == 1 ? 2000 : 500);
    if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
    if (c.n * c.k > 200'000) {  // of many weights few
      c.format = std::make_shared<const Outliers>(format_from_spec(GetParam()), 0.3);
    }
    c.m = draws.pick(kTokens);
    c.group_index = draws.below(4) == 0 && takes_group_index(*format_from_spec(GetParam()));
    // The entries of nf3 are no whole numbers.
    c.exact = seed % 2 == 0 && std::string_view(GetParam()).find("nf3") == std::string_view::npos;
    c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
    c.bias = draws.below(2) == 0;
    c.prepare_on_cpu = draws.below(2) == 0;
    c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
    c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
    c.seed = seed;
    taken.merge(check_case(c, draws));
  }
  EXPECT_TRUE(taken.contains("stream_partials") && taken.contains("decode"));
}

INSTANTIATE_TEST_SUITE_P(Formats, OutlierProductCuda,
                         ::testing::Values("uniform:4:g128", "uniform:4:g24:asym", "uniform:3:g16:asym:bf16",
                                           "uniform:2:channel:f32", "codebook:nf3:g64", "uniform:1:tensor",
                                           "vector_codebook:256x4:g64", "vector_codebook:16x8:g32"));

TEST_F(OutlierProductCuda, WideMatricesAndNoOutliers) {
  Draws draws(3);
  ProductCase c;
  c.format = std::make_shared<const Outliers>(format_from_spec("uniform:2:g128"), int64_t{900});
  c.n = 70;
  c.k = 70'000;  // columns of 32 bits
  for (const int64_t m : {1, 2}) {
    c.m = m;
    check_case(c, draws);
  }
  c.format = std::make_shared<const Outliers>(format_from_spec("uniform:4:g128"), int64_t{0});
  c.k = 512;
  check_case(c, draws);
  for (const char* kernel : {"tiles", "tiles_wgmma"}) {
    const auto why = why_not_matmul_cuda(*c.format, 64, DType::f16, {.kernel = kernel});
    ASSERT_TRUE(why);
    EXPECT_NE(why->find("outliers"), std::string::npos) << *why;
  }
}

// Shapes of models, with and without the team's parts meeting in a cluster.
TEST_F(OutlierProductCuda, LargerMatrices) {
  Draws draws(3);
  for (const int64_t m : {1, 4, 16, 200}) {
    ProductCase c;
    c.format = std::make_shared<const Outliers>(format_from_spec("uniform:4:g128"), int64_t{20'000});
    c.n = 4096;
    c.k = 4096;
    c.m = m;
    c.prepare_on_cpu = false;
    c.exact = m == 1;
    check_case(c, draws);
  }
}

}  // namespace
}  // namespace quantloom
