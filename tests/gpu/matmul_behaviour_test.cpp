// What products promise beyond their values: the same bytes each time, in graphs, on several streams, with
// overlapping launches, and tokens that do not touch each other.
#include "cuda_streams.hpp"
#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

class MatmulCudaBehaviour : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

// The ways to run a case: the table's choice, each kernel that claims it, and k cut into parts.
std::vector<CudaMatmulOptions> ways(const ProductCase& c) {
  std::vector<CudaMatmulOptions> all = {{}};
  const int bits = fragment_layout(*c.format, c.n, c.k, c.group_index).bits;
  for (const KernelCell& cell : matmul_cells()) {
    if (cell.format != c.format->name() || cell.bits != bits || cell.dtype != c.dtype) continue;
    if (!cell.takes(c.m)) continue;
    for (const int splits : {0, 5}) {
      const CudaMatmulOptions options{.kernel = cell.kernel, .splits = splits, .digits = splits > 0};
      if (!why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) all.push_back(options);
    }
  }
  return all;
}

ProductCase case_of(int64_t m, int bits, uint64_t seed) {
  ProductCase c;
  c.format = std::make_shared<const Uniform>(bits, 128, seed % 2 == 0);
  c.n = 1000;
  c.k = 2056;
  c.m = m;
  c.dtype = seed % 3 == 0 ? DType::bf16 : DType::f16;
  c.bias = true;
  c.prepare_on_cpu = false;
  c.seed = seed;
  return c;
}

INSTANTIATE_TEST_SUITE_P(Tokens, MatmulCudaBehaviour,
                         ::testing::Values(1, 2, 8, 9, 16, 17, 33, 64, 128, 500, 1500));

TEST_P(MatmulCudaBehaviour, GivesTheSameBytesEachTimeWhateverElseRuns) {
  const auto m = GetParam();
  const Product product(case_of(m, 1 + m % 8, static_cast<uint64_t>(m)));
  const Stream stream;
  const Stream other;
  constexpr int64_t kWords = 1 << 22;
  const auto busy = device_bytes(kWords * 4);
  check_cuda(cudaMemset(busy.get(), 1, kWords * 4), "busy");
  settle();
  for (const CudaMatmulOptions& options : ways(product.the_case())) {
    SCOPED_TRACE(product.the_case().text() + ", " + text_of_options(options));
    const auto first = product.run(options);
    ASSERT_TRUE(first);
    const GuardedMemory workspace = product.workspace(options);
    const GuardedMemory y = product.fresh_output();
    CudaMatmulArguments arguments = product.arguments(workspace, stream);
    arguments.y = y.data();
    for (int repetition = 0; repetition < 100; ++repetition) {
      if (repetition % 10 == 0) {
        keep_busy(reinterpret_cast<uint32_t*>(busy.get()), kWords, 20, other);
      }
      y.poison();
      workspace.poison();
      settle();
      matmul_cuda(product.prepared(), arguments, options);
      stream.synchronize();
      const auto again = product.read(y);
      ASSERT_TRUE(again) << "written outside y";
      ASSERT_EQ(*again == *first, true) << "repetition " << repetition;
    }
    other.synchronize();
  }
}

TEST_P(MatmulCudaBehaviour, RunsInAGraphAsItDoesWithout) {
  const auto m = GetParam();
  const Product product(case_of(m, 4, static_cast<uint64_t>(m) + 1));
  const Stream stream;
  Elements other_x = product.x();
  std::ranges::reverse(other_x);
  for (const CudaMatmulOptions& options : ways(product.the_case())) {
    SCOPED_TRACE(product.the_case().text() + ", " + text_of_options(options));
    const auto first = product.run(options);
    product.upload_x(other_x);
    const auto second = product.run(options);
    ASSERT_TRUE(first && second);
    ASSERT_FALSE(*first == *second);

    const GuardedMemory workspace = product.workspace(options);
    const GuardedMemory y = product.fresh_output();
    CudaMatmulArguments arguments = product.arguments(workspace, stream);
    arguments.y = y.data();
    const Graph graph(stream, [&] { matmul_cuda(product.prepared(), arguments, options); });
    for (const bool reversed : {false, true, false}) {
      product.upload_x(reversed ? other_x : product.x());
      y.poison();
      workspace.poison();
      settle();
      graph.launch(stream);
      stream.synchronize();
      const auto got = product.read(y);
      ASSERT_TRUE(got) << "written outside y";
      EXPECT_TRUE(*got == (reversed ? *second : *first)) << "reversed " << reversed;
    }
  }
}

TEST_P(MatmulCudaBehaviour, TwoStreamsShareTheMatrix) {
  const auto m = GetParam();
  const Product product(case_of(m, 3, static_cast<uint64_t>(m) + 2));
  const Stream streams[2];
  Elements x[2] = {product.x(), product.x()};
  std::ranges::reverse(x[1]);
  for (const CudaMatmulOptions& options : ways(product.the_case())) {
    SCOPED_TRACE(product.the_case().text() + ", " + text_of_options(options));
    Elements expected[2];
    std::vector<GuardedMemory> inputs;
    std::vector<GuardedMemory> outputs;
    std::vector<GuardedMemory> workspaces;
    std::vector<CudaMatmulArguments> arguments;
    for (int i = 0; i < 2; ++i) {
      product.upload_x(x[i]);
      const auto y = product.run(options);
      ASSERT_TRUE(y);
      expected[i] = *y;
      inputs.emplace_back(static_cast<int64_t>(x[i].size()) * size_of(product.the_case().dtype), 0,
                          product.guard());
      upload_elements(x[i], product.the_case().dtype, inputs.back().data());
      outputs.push_back(product.fresh_output());
      workspaces.push_back(product.workspace(options));
      arguments.push_back(product.arguments(workspaces.back(), streams[i]));
      arguments.back().x = inputs.back().data();
      arguments.back().y = outputs.back().data();
    }
    product.upload_x(product.x());
    settle();
    for (int repetition = 0; repetition < 30; ++repetition) {
      for (const CudaMatmulArguments& a : arguments) matmul_cuda(product.prepared(), a, options);
    }
    for (int i = 0; i < 2; ++i) {
      streams[i].synchronize();
      const auto got = product.read(outputs[static_cast<size_t>(i)]);
      ASSERT_TRUE(got) << "written outside y";
      EXPECT_TRUE(*got == expected[i]) << "stream " << i;
    }
  }
}

// Each product reads what the one before has written, so that a kernel that begins early must wait.
TEST_P(MatmulCudaBehaviour, OverlappingLaunchesWaitForTheirInput) {
  const auto m = GetParam();
  ProductCase c = case_of(m, 4, static_cast<uint64_t>(m) + 3);
  c.n = c.k = 512;
  const Product product(c);
  const Stream stream;
  constexpr int kSteps = 6;
  for (CudaMatmulOptions options : ways(c)) {
    const auto chain = [&](bool overlap) {
      options.overlap = overlap;
      const GuardedMemory workspace = product.workspace(options);
      std::vector<GuardedMemory> values;
      CudaMatmulArguments arguments = product.arguments(workspace, stream);
      for (int step = 0; step < kSteps; ++step) values.push_back(product.fresh_output());
      settle();
      for (const GuardedMemory& y : values) {
        arguments.y = y.data();
        matmul_cuda(product.prepared(), arguments, options);
        arguments.x = arguments.y;
        arguments.x_stride = arguments.y_stride;
      }
      stream.synchronize();
      const auto last = product.read(values.back());
      EXPECT_TRUE(last) << "written outside y";
      return last.value_or(Elements());
    };
    SCOPED_TRACE(c.text() + ", " + text_of_options(options));
    const Elements expected = chain(false);
    for (int repetition = 0; repetition < 5; ++repetition) {
      ASSERT_TRUE(chain(true) == expected) << "repetition " << repetition;
    }
  }
}

TEST_P(MatmulCudaBehaviour, ATokenThatIsNotFiniteSpoilsNoOther) {
  const auto m = GetParam();
  for (const bool symmetric : {true, false}) {
    ProductCase c = case_of(m, 4, static_cast<uint64_t>(m) + 4);
    c.format = std::make_shared<const Uniform>(4, 128, symmetric);
    const Product product(c);
    for (const CudaMatmulOptions& options : ways(c)) {
      SCOPED_TRACE(c.text() + ", " + text_of_options(options));
      product.upload_x(product.x());
      const auto clean = product.run(options);
      ASSERT_TRUE(clean);
      const float inf = std::numeric_limits<float>::infinity();
      const float nan = std::numeric_limits<float>::quiet_NaN();
      Elements x = product.x();
      const int64_t bad[2] = {m / 2, m - 1};
      x[static_cast<size_t>(bad[0] * product.x_stride() + 77)] = bits_from(nan, c.dtype);
      x[static_cast<size_t>(bad[1] * product.x_stride() + c.k - 1)] = bits_from(inf, c.dtype);
      product.upload_x(x);
      const auto spoilt = product.run(options);
      ASSERT_TRUE(spoilt);
      for (int64_t t = 0; t < m; ++t) {
        for (int64_t r = 0; r < c.n; ++r) {
          const auto i = static_cast<size_t>(t * c.n + r);
          if (t == bad[0] || t == bad[1]) {
            ASSERT_FALSE(std::isfinite(float_from((*spoilt)[i], c.dtype))) << t << " " << r;
          } else {
            ASSERT_EQ((*spoilt)[i], (*clean)[i]) << t << " " << r;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
