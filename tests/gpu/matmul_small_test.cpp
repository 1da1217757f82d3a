// Every kernel at small sizes, in memory that ends with the last element: for compute-sanitizer, as in
//   compute-sanitizer --tool memcheck quantloom_gpu_tests --gtest_filter='*Small.*'
#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

class MatmulCudaSmall : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

std::shared_ptr<const Format> small_format(const KernelCell& cell, int64_t group, bool symmetric) {
  if (cell.format == "uniform") {
    return std::make_shared<const Uniform>(cell.bits, group, symmetric, symmetric ? DType::f16 : DType::f32);
  }
  if (cell.format == "codebook") {
    Draws draws(static_cast<uint64_t>(group));
    return random_codebook(cell.bits, group, symmetric ? DType::f16 : DType::f32, true, draws);
  }
  throw Unsupported("no small format " + cell.format);
}

TEST_P(MatmulCudaSmall, EveryKernelIsRight) {
  constexpr std::array<std::array<int64_t, 3>, 3> kShapes = {{{70, 200, 32}, {65, 129, 24}, {8, 64, 64}}};
  uint64_t seed = static_cast<uint64_t>(GetParam());
  for (const KernelCell& cell : matmul_cells()) {
    if (cell.bits != GetParam()) continue;
    ++seed;
    // A tile that is not full, or just full, or more than one.
    const int64_t last = std::min<int64_t>(cell.last, 70);
    const std::array<int64_t, 3> tokens = {cell.first, (cell.first + last) / 2, last};
    const auto& [n, k, group] = kShapes[seed % 3];
    ProductCase c;
    c.format = small_format(cell, group, seed % 2 == 0);
    c.n = n;
    c.k = k;
    c.m = tokens[seed / 2 % 3];
    c.dtype = cell.dtype;
    c.group_index = seed % 4 == 3;
    c.bias = true;
    c.exact = true;
    c.prepare_on_cpu = seed % 2 == 0;
    c.tight = true;
    c.x_gap = seed % 5 == 0 ? 8 : 0;
    c.seed = seed;
    Product product(c);
    for (const int splits : {0, 3}) {
      const CudaMatmulOptions options{
          .overlap = splits == 3, .kernel = cell.kernel, .splits = splits, .digits = splits == 3};
      if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) continue;
      SCOPED_TRACE(c.text() + ", " + text_of_options(options));
      const auto y = product.run(options);
      if (y) {
        EXPECT_EQ(product.compare(*y, cell.kernel), "");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, MatmulCudaSmall, ::testing::Range(1, 9));

}  // namespace
}  // namespace quantloom
