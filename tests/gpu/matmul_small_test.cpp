// Every kernel at small sizes, in memory that ends with the last element: for compute-sanitizer, as in
//   compute-sanitizer --tool memcheck quantloom_gpu_tests --gtest_filter='*Small'
#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

class MatmulCudaEveryKernel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

std::shared_ptr<const Format> small_format(const KernelCell& cell, int64_t group, bool symmetric) {
  if (cell.format == "uniform") {
    return std::make_shared<const Uniform>(cell.bits, group, symmetric, symmetric ? DType::f16 : DType::f32);
  }
  throw Unsupported("no small format " + cell.format);
}

TEST_P(MatmulCudaEveryKernel, Small) {
  uint64_t seed = 0;
  for (const KernelCell& cell : matmul_cells()) {
    if (cell.bits != GetParam()) continue;
    const std::vector<std::array<int64_t, 3>> shapes = {{70, 200, 32}, {65, 129, 24}, {8, 64, 64}};
    for (const auto& [n, k, group] : shapes) {
      ProductCase c;
      c.format = small_format(cell, group, seed % 2 == 0);
      c.n = n;
      c.k = k;
      // The first number of tokens of the cell and a few more, so that tiles are not full.
      c.m = std::min(cell.first + static_cast<int64_t>(seed % 3), cell.last);
      c.dtype = cell.dtype;
      c.group_index = seed % 4 == 3;
      c.bias = true;
      c.exact = true;
      c.prepare_on_cpu = seed % 2 == 0;
      c.tight = true;
      c.x_gap = seed % 3 == 0 ? 8 : 0;
      c.seed = ++seed;
      for (const int splits : {0, 3}) {
        const CudaMatmulOptions options{.overlap = splits == 3, .kernel = cell.kernel, .splits = splits};
        if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) continue;
        SCOPED_TRACE(c.text() + ", " + text_of_options(options));
        Product product(c);
        const auto y = product.run(options);
        ASSERT_TRUE(y);
        ASSERT_EQ(product.compare(*y), "");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, MatmulCudaEveryKernel, ::testing::Range(1, 9));

}  // namespace
}  // namespace quantloom
