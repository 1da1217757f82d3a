// Products with vector codebooks against float64: every decoder, every kernel that the table lists.
#include <set>

#include "product_case.hpp"
#include "quantloom/kernels/kernel_table.hpp"

namespace quantloom {
namespace {

class VectorProductCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

std::set<std::string> kernels_of_table() {
  std::set<std::string> kernels;
  for (const KernelEntry& row : kernel_table()) {
    if (row.kernel == "lookups") continue;  // additive_product_test.cpp
    if (row.device == "cuda" && row.operation == "matmul" && row.format == "vector_codebook") {
      kernels.insert(row.kernel);
    }
  }
  return kernels;
}

// Less what runs on no format of this dimension, or not on this device.
std::set<std::string> kernels_of_dim(int dim, int64_t tables) {
  std::set<std::string> kernels = kernels_of_table();
  const VectorCodebook small(16, dim, 8 * dim, DType::f16, tables);
  const VectorCodebook bytes(dim == 2 ? 16 : 256, dim, 8 * dim, DType::f16, tables);
  if (why_not_matmul_cuda(small, 1, DType::f16, {.kernel = "stream"})) {
    kernels.erase("stream");
    kernels.erase("stream_repeated");
  }
  for (const char* kernel : {"tiles", "tiles_wgmma"}) {
    if (why_not_matmul_cuda(bytes, 1, DType::f16, {.kernel = kernel})) kernels.erase(kernel);
  }
  EXPECT_EQ(kernels.contains("tiles"), dim > 2);
  return kernels;
}

// Runs the case with the kernel that is picked and with each that takes it; returns those.
std::set<std::string> check_case(const ProductCase& c, Draws& draws) {
  SCOPED_TRACE(c.text());
  Product product(c);
  std::set<std::string> taken;
  const auto check = [&](const CudaMatmulOptions& options) {
    if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) return;
    SCOPED_TRACE(text_of_options(options));
    const auto y = product.run(options);
    const std::string kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    taken.insert(kernel == "lookups" ? "stream" : kernel);
    EXPECT_EQ(y ? product.compare(*y, kernel) : "memory damaged", "");
    // The same call gives the same bytes.
    const auto again = product.run(options);
    EXPECT_TRUE(y && again && *y == *again) << "two runs differ";
  };
  check({});
  EXPECT_EQ(taken.size(), 1U) << "no kernel takes it";
  for (const std::string& kernel : kernels_of_table()) {
    check({.kernel = kernel});
    check({.kernel = kernel, .splits = static_cast<int>(1 + draws.below(8))});
    check({.overlap = true, .kernel = kernel});
  }
  return taken;
}

TEST_P(VectorProductCuda, RandomConfigurationsAgreeWithFloat64) {
  const int dim = GetParam();
  static const std::vector<int64_t> kTokens = {1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 64, 129};
  static const std::vector<int64_t> kGroups = {
      8, 16, 24, 32, 48, 64, 128, 256, ScaledFormat::kPerChannel, ScaledFormat::kPerTensor};
  Draws draws(static_cast<uint64_t>(dim));
  std::set<std::string> taken;
  for (int bits = 1; bits <= (dim == 2 ? 12 : 16); ++bits) {
    for (uint64_t seed = 0; seed < 24 && !HasFailure(); ++seed) {
      const int64_t most = int64_t{1} << bits;
      const int64_t entries = seed % 3 != 0 || most < 4 ? most : most - draws.below(most / 2 - 1);
      ProductCase c;
      c.format = std::make_shared<const VectorCodebook>(
          entries, dim, draws.pick(kGroups), draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}));
      c.n = 1 + draws.below(seed % 6 == 0 ? 3000 : 300);
      c.k = 1 + draws.below(seed % 6 == 1 ? 3000 : 600);
      if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
      c.m = draws.pick(kTokens);
      c.exact = seed % 2 == 0;
      c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
      c.bias = draws.below(2) == 0;
      c.prepare_on_cpu = draws.below(2) == 0;
      c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
      c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
      c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
      c.seed = seed + 100 * static_cast<uint64_t>(bits);
      taken.merge(check_case(c, draws));
    }
  }
  EXPECT_EQ(taken, kernels_of_dim(dim, 1));
}

// Tables that add up: every number of them, codes of all widths that have a kernel.
TEST_P(VectorProductCuda, SeveralTablesAgreeWithFloat64) {
  const int dim = GetParam();
  static const std::vector<int64_t> kTokens = {1, 1, 1, 2, 7, 8, 9, 16, 17, 64, 129};
  static const std::vector<int64_t> kGroups = {
      8, 16, 24, 64, 128, 256, ScaledFormat::kPerChannel, ScaledFormat::kPerTensor};
  Draws draws(static_cast<uint64_t>(20 + dim));
  std::set<std::string> taken;
  for (int64_t tables = 2; tables <= 8; ++tables) {
    for (int bits = 1; bits <= 16 && tables * bits <= 4 * dim; ++bits) {
      for (uint64_t seed = 0; seed < 5 && !HasFailure(); ++seed) {
        const int64_t most = int64_t{1} << bits;
        const int64_t entries = seed % 3 != 0 || most < 4 ? most : most - draws.below(most / 2 - 1);
        ProductCase c;
        c.format = std::make_shared<const VectorCodebook>(
            entries, dim, draws.pick(kGroups), draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}),
            tables);
        c.n = 1 + draws.below(seed == 4 ? 2000 : 300);
        c.k = 1 + draws.below(seed == 3 ? 2000 : 600);
        if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
        c.m = draws.pick(kTokens);
        c.exact = seed % 2 == 0;
        c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
        c.bias = draws.below(2) == 0;
        c.prepare_on_cpu = draws.below(2) == 0;
        c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
        c.seed = seed + 100 * static_cast<uint64_t>(bits) + 10000 * static_cast<uint64_t>(tables);
        taken.merge(check_case(c, draws));
      }
    }
  }
  EXPECT_EQ(taken, kernels_of_dim(dim, 2));
}

INSTANTIATE_TEST_SUITE_P(Dims, VectorProductCuda, ::testing::Values(2, 4, 8));

// Every decoder of the tile loops, with tiles that are full, or have one token more or less.
TEST_F(VectorProductCuda, ManyTokensByTiles) {
  static const std::vector<int64_t> kTokens = {1, 8, 17, 31, 32, 33, 63, 64, 65, 96, 128, 130};
  static const std::vector<int64_t> kGroups = {8, 24, 64, 128, ScaledFormat::kPerChannel};
  Draws draws(5);
  for (const auto& [tables, entries, dim] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {1, 256, 4}, {1, 256, 8}, {2, 256, 4}, {2, 256, 8}, {4, 256, 8}, {2, 77, 8}, {2, 100, 4}}) {
    for (const int64_t m : kTokens) {
      ProductCase c;
      c.format = std::make_shared<const VectorCodebook>(
          entries, dim, draws.pick(kGroups), draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}),
          tables);
      c.n = 1 + draws.below(m == 64 ? 2000 : 500);
      c.k = 1 + draws.below(m == 32 ? 3000 : 700);
      c.m = m;
      c.exact = draws.below(2) == 0;
      c.dtype = draws.below(2) == 0 ? DType::f16 : DType::bf16;
      c.bias = draws.below(2) == 0;
      c.x_gap = draws.below(5);
      c.y_gap = draws.below(5);
      c.seed = static_cast<uint64_t>(m + 1000 * entries);
      EXPECT_TRUE(check_case(c, draws).contains("tiles"));
      if (HasFailure()) return;
    }
  }
}

// Shapes of models: several row blocks to a team, tables at their largest.
TEST_F(VectorProductCuda, LargerMatrices) {
  Draws draws(3);
  for (const auto& [entries, dim] : std::vector<std::pair<int64_t, int64_t>>{
           {4096, 2}, {4096, 4}, {4096, 8}, {65536, 8}, {65536, 4}, {256, 8}}) {
    for (const int64_t m : {1, 5, 16, 200}) {
      ProductCase c;
      c.format = std::make_shared<const VectorCodebook>(entries, dim, 128);
      c.n = 4096;
      c.k = 2048;
      c.m = m;
      c.prepare_on_cpu = false;
      c.exact = m == 1;
      c.seed = static_cast<uint64_t>(entries + m);
      check_case(c, draws);
      if (HasFailure()) return;
    }
  }
}

// Tables in shared memory in many copies and in one, and read where they are.
TEST_F(VectorProductCuda, LargerMatricesOfSeveralTables) {
  Draws draws(4);
  for (const auto& [tables, entries, dim] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {2, 256, 8}, {4, 256, 8}, {2, 4096, 8}, {2, 65536, 8}, {2, 256, 4}, {2, 16, 2}}) {
    for (const int64_t m : {1, 5, 16, 200}) {
      ProductCase c;
      c.format = std::make_shared<const VectorCodebook>(entries, dim, 128, DType::f16, tables);
      c.n = 4096;
      c.k = 2048;
      c.m = m;
      c.prepare_on_cpu = false;
      c.exact = m == 1;
      c.seed = static_cast<uint64_t>(entries + m);
      check_case(c, draws);
      if (HasFailure()) return;
    }
  }
}

TEST_F(VectorProductCuda, RefusesWhatNoKernelTakes) {
  for (const VectorCodebook& format :
       {VectorCodebook(16, 3, 6), VectorCodebook(8192, 2), VectorCodebook(256, 4, 8, DType::f16, 3)}) {
    EXPECT_THROW(static_cast<void>(prepared_planes(format, 8, 8, false)), Unsupported) << format.spec();
    EXPECT_TRUE(why_not_matmul_cuda(format, 1, DType::f16)) << format.spec();
  }
  // The streaming loop has decoders for some numbers of tables, in shared memory; others are decoded.
  for (const VectorCodebook& format :
       {VectorCodebook(16, 8, 8, DType::f16, 4), VectorCodebook(4096, 8, 8, DType::f16, 2),
        VectorCodebook(64, 4, 8, DType::f16, 2)}) {
    EXPECT_TRUE(why_not_matmul_cuda(format, 1, DType::f16, {.kernel = "stream_partials"})) << format.spec();
    EXPECT_FALSE(why_not_matmul_cuda(format, 1, DType::f16)) << format.spec();
  }
  for (const char* kernel : {"tiles", "tiles_wgmma"}) {
    const auto why = why_not_matmul_cuda(VectorCodebook(16, 4), 64, DType::f16, {.kernel = kernel});
    ASSERT_TRUE(why);
    EXPECT_NE(why->find("vector"), std::string::npos) << *why;
  }
}

}  // namespace
}  // namespace quantloom
