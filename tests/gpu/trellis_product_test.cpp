// Products with trellis codes against float64: every kernel that the table lists, all codebooks and widths.
#include <set>

#include "product_case.hpp"
#include "quantloom/kernels/kernel_table.hpp"

namespace quantloom {
namespace {

class TrellisProductCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
class TrellisProductCudaSmall : public TrellisProductCuda {};

std::set<std::string> kernels_of_table() {
  std::set<std::string> kernels;
  for (const KernelEntry& row : kernel_table()) {
    if (row.device == "cuda" && row.operation == "matmul" && row.format == "trellis")
      kernels.insert(row.kernel);
  }
  return kernels;
}

bool clusters_run() {
  return !why_not_matmul_cuda(Trellis(2, "mul1"), 1, DType::f16, {.kernel = "trellis_stream"});
}

// Runs the case with the kernel that is picked and with each that takes it; returns those.
std::set<std::string> check_case(const ProductCase& c) {
  SCOPED_TRACE(c.text());
  Product product(c);
  std::set<std::string> taken;
  const auto check = [&](const CudaMatmulOptions& options) {
    if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) return;
    SCOPED_TRACE(text_of_options(options));
    std::string kernel;
    try {
      kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    } catch (const Unsupported& refusal) {
      // A forced team may have no room for long rows.
      EXPECT_GT(options.splits, 0) << refusal.what();
      return;
    }
    const auto y = product.run(options);
    taken.insert(kernel);
    EXPECT_EQ(y ? product.compare(*y, kernel) : "memory damaged", "");
    const auto again = product.run(options);
    EXPECT_TRUE(y && again && *y == *again) << "two runs differ";
  };
  check({});
  EXPECT_EQ(taken.size(), 1U) << "no kernel takes it";
  for (const std::string& kernel : kernels_of_table()) {
    check({.kernel = kernel});
    if (kernel != "trellis_stream" && kernel != "trellis_exact") continue;
    check({.overlap = true, .kernel = kernel});
    for (const int splits : {1, 2, 3, 5, 8}) check({.kernel = kernel, .splits = splits});
  }
  return taken;
}

// Those that the streaming kernels take.
std::vector<std::string> streamed_codebooks(double bits) {
  std::vector<std::string> names = {"mul1", "mul1-AD9A2EC5", "1mad", "3inst", "mcg", "mcg-FF7A83E5"};
  if (bits <= 4) names.insert(names.end(), {"octagon", "octagon", "octagon-83DCD12D"});
  return names;
}

ProductCase random_case(Draws& draws, double bits, uint64_t seed) {
  ProductCase c;
  c.format = std::make_shared<const Trellis>(bits, draws.pick(streamed_codebooks(bits)),
                                             draws.below(4) == 0 ? 0 : 128);
  c.n = 1 + draws.below(seed % 6 == 0 ? 3000 : 500);
  c.k = 1 + draws.below(seed % 6 == 1 ? 6000 : 900);
  if (draws.below(2) == 0) c.k = (c.k + 127) / 128 * 128;
  c.m = draws.pick(std::vector<int64_t>{1, 1, 1, 2, 3, 4, 4, 5, 8, 9, 16, 17, 64, 140});
  c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::f32});
  c.bias = draws.below(2) == 0;
  c.prepare_on_cpu = draws.below(2) == 0;
  c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
  c.x_spread = draws.below(4) == 0 ? 6 : 0;
  c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
  c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
  c.seed = seed;
  return c;
}

TEST_P(TrellisProductCuda, RandomConfigurationsAgreeWithFloat64) {
  const int bits = GetParam();
  Draws draws(static_cast<uint64_t>(bits) + 50);
  std::set<std::string> taken;
  for (uint64_t seed = 0; seed < 24 && !HasFailure(); ++seed) {
    taken.merge(check_case(random_case(draws, bits, seed + 100 * static_cast<uint64_t>(bits))));
  }
  if (clusters_run()) {
    std::set<std::string> expected = kernels_of_table();
    if (bits < 2 || bits > 4) {
      for (const char* kernel : {"trellis_tiles", "trellis_panels"}) expected.erase(kernel);
    }
    EXPECT_EQ(taken, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, TrellisProductCuda, ::testing::Range(1, 9));

// Half bits, tables, pairs and other windows are decoded.
TEST_F(TrellisProductCuda, FormatsThatAreDecoded) {
  Draws draws(7);
  const std::vector<std::shared_ptr<const Format>> formats = {
      std::make_shared<const Trellis>(1.5, "mul1"),       std::make_shared<const Trellis>(2.5, "3inst"),
      std::make_shared<const Trellis>(7.5, "1mad", 0),    std::make_shared<const Trellis>(2, "hyb"),
      std::make_shared<const Trellis>(3.5, "hyb", 0),     std::make_shared<const Trellis>(2, "rptc", 128, 12),
      std::make_shared<const Trellis>(3, "rptc2", 0, 10), std::make_shared<const Trellis>(2, "mul1", 128, 20),
      std::make_shared<const Trellis>(4, "mcg", 128, 9),  std::make_shared<const Trellis>(1, "1mad", 0, 18)};
  for (uint64_t seed = 0; seed < 2 * formats.size() && !HasFailure(); ++seed) {
    ProductCase c = random_case(draws, 2, seed + 900);
    c.format = formats[seed % formats.size()];
    check_case(c);
  }
}

// Shapes of models: several bands to a team, several rounds of chunks.
TEST_F(TrellisProductCuda, LargerMatrices) {
  for (const auto& [bits, name, n, k] :
       std::vector<std::tuple<double, std::string, int64_t, int64_t>>{{2, "mul1", 4096, 4096},
                                                                      {3, "3inst", 14336, 2048},
                                                                      {4, "mul1", 1024, 30000},
                                                                      {2, "octagon", 20000, 512}}) {
    for (const int64_t m : {1, 4, 7, 16, 70, 300}) {
      ProductCase c;
      c.format = std::make_shared<const Trellis>(bits, name);
      c.n = n;
      c.k = k;
      c.m = m;
      c.prepare_on_cpu = false;
      c.seed = static_cast<uint64_t>(n + m);
      check_case(c);
      if (HasFailure()) return;
    }
  }
}

// Activations of one input at a time, without a rotation and with scales of one: the weights themselves.
TEST_P(TrellisProductCuda, ExactProductsOfUnitVectorsAreTheWeights) {
  const CudaMatmulOptions options{.kernel = "trellis_exact"};
  for (const char* name : {"mul1", "3inst", "mcg", "octagon"}) {
    if (name == std::string("octagon") && GetParam() > 4) continue;
    ProductCase c;
    c.format = std::make_shared<const Trellis>(GetParam(), name, 0);
    if (why_not_matmul_cuda(*c.format, 4, DType::f16, options)) GTEST_SKIP() << "no clusters on this device";
    c.n = 200;
    c.k = 300;
    c.m = 4;
    c.exact = true;
    c.seed = static_cast<uint64_t>(GetParam());
    Product product(c);
    const std::vector<float> w = product.weights();
    for (int64_t input = 0; input < c.k; input += 4) {
      Elements x(static_cast<size_t>(c.m * c.k), 0);
      for (int64_t t = 0; t < c.m; ++t) {
        if (input + t < c.k) x[static_cast<size_t>(t * c.k + input + t)] = bits_from(1, c.dtype);
      }
      product.upload_x(x);
      const auto y = product.run(options);
      ASSERT_TRUE(y);
      for (int64_t t = 0; t < c.m && input + t < c.k; ++t) {
        for (int64_t row = 0; row < c.n; ++row) {
          ASSERT_EQ(float_from((*y)[static_cast<size_t>(t * c.n + row)], c.dtype),
                    w[static_cast<size_t>(row * c.k + input + t)])
              << name << " row " << row << " input " << input + t;
        }
      }
    }
  }
}

// A token with an activation that is not finite is NaN where it enters; others are as they were.
TEST_F(TrellisProductCuda, TokensThatAreNotFiniteStayAlone) {
  for (const char* kernel : {"trellis_stream", "trellis_exact"}) {
    for (const char* name : {"mul1", "3inst", "octagon"}) {
      ProductCase c;
      c.format = std::make_shared<const Trellis>(2, name);
      const CudaMatmulOptions options{.kernel = kernel};
      if (why_not_matmul_cuda(*c.format, 3, DType::bf16, options))
        GTEST_SKIP() << "no clusters on this device";
      c.n = 130;
      c.k = 700;
      c.m = 3;
      c.dtype = DType::bf16;
      Product product(c);
      const auto before = product.run(options);
      for (const float value :
           {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        Elements x = product.x();
        x[static_cast<size_t>(c.k + 650)] = bits_from(value, c.dtype);
        product.upload_x(x);
        const auto y = product.run(options);
        ASSERT_TRUE(before && y);
        for (size_t i = 0; i < y->size(); ++i) {
          const bool second = i / static_cast<size_t>(c.n) == 1;
          if (second) {
            EXPECT_TRUE(std::isnan(float_from((*y)[i], c.dtype))) << i;
          } else {
            EXPECT_EQ((*y)[i], (*before)[i]) << i;
          }
        }
      }
    }
  }
}

// Decoded rows of a matrix with the values that the CPU decodes, rounded to dtype.
void check_decoded(const Product& product, DType dtype) {
  const ProductCase& c = product.the_case();
  SCOPED_TRACE(text_of(c.text(), " to ", name_of(dtype)));
  const int64_t stride = (c.k + 127) / 128 * 128 + (c.seed % 2 == 0 ? 0 : 8);
  const GuardedMemory out(c.n * stride * size_of(dtype), 0, 512);
  decode_fragments_cuda(product.prepared(), out.data(), dtype, stride, nullptr);
  const auto bytes = out.read();
  ASSERT_TRUE(bytes) << "written outside";
  const std::vector<float> w = product.weights();
  for (int64_t row = 0; row < c.n; ++row) {
    for (int64_t column = 0; column < c.k; ++column) {
      const uint32_t expected = bits_from(w[static_cast<size_t>(row * c.k + column)], dtype);
      ASSERT_EQ(float_from(element_at(bytes->data(), row * stride + column, dtype), dtype),
                float_from(expected, dtype))
          << row << ", " << column;
    }
  }
}

TEST_F(TrellisProductCuda, DecodesToTheValuesOfTheCpu) {
  Draws draws(11);
  for (const char* name : {"mul1", "1mad", "3inst", "mcg-FF7A83E5", "octagon", "hyb", "rptc"}) {
    for (const int64_t rotation : {0, 128}) {
      for (const double bits : {1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 6.5, 7.0, 8.0}) {
        if (bits > 4 && (name == std::string("octagon") || name == std::string("hyb"))) continue;
        ProductCase c;
        c.format = std::make_shared<const Trellis>(bits, name, rotation);
        c.n = 1 + draws.below(400);
        c.k = 1 + draws.below(400);
        c.seed = static_cast<uint64_t>(draws.below(1000));
        const Product product(c);
        check_decoded(product, draws.pick(std::vector{DType::f32, DType::f32, DType::f16, DType::bf16}));
        if (HasFatalFailure()) return;
        if (bits > 4) continue;
        SCOPED_TRACE(c.text());
        const PackedTensor back = unprepare_fragments(prepare_fragments(product.packed()));
        PackedTensor there = to_device(product.packed());
        for (auto& [plane, tensor] : there.planes) {
          check_cuda(cudaMemset(tensor.bytes(), 0xAB, static_cast<size_t>(tensor.byte_count())), "memset");
        }
        unprepare_cuda(product.prepared(), there, nullptr);
        for (const auto& [plane, tensor] : product.packed().planes) {
          const auto on_device = download(there.plane(plane).bytes(), tensor.byte_count());
          EXPECT_EQ(std::memcmp(tensor.bytes(), back.plane(plane).bytes(), on_device.size()), 0) << plane;
          EXPECT_EQ(std::memcmp(tensor.bytes(), on_device.data(), on_device.size()), 0) << plane;
        }
      }
    }
  }
}

TEST_F(TrellisProductCuda, DecodesOtherWindowsAndLargerMatrices) {
  Draws draws(12);
  const std::vector<std::shared_ptr<const Format>> formats = {
      std::make_shared<const Trellis>(2, "mul1", 128, 20),
      std::make_shared<const Trellis>(4, "mcg", 128, 9),
      std::make_shared<const Trellis>(1, "1mad", 0, 18),
      std::make_shared<const Trellis>(1.5, "mul1", 128, 20),
      std::make_shared<const Trellis>(8, "3inst", 128, 13),
      std::make_shared<const Trellis>(3, "octagon", 128, 17),
      std::make_shared<const Trellis>(3, "rptc2", 0, 10),
      std::make_shared<const Trellis>(2, "rptc", 128, 12),
      std::make_shared<const Trellis>(3.5, "hyb", 0, 16),
      std::make_shared<const Trellis>(1, "hyb", 128, 19)};
  for (size_t i = 0; i < 2 * formats.size(); ++i) {
    ProductCase c;
    c.format = formats[i % formats.size()];
    c.n = 1 + draws.below(i % 5 == 0 ? 1500 : 300);
    c.k = 1 + draws.below(i % 5 == 1 ? 1500 : 300);
    c.seed = static_cast<uint64_t>(draws.below(1000));
    check_decoded(Product(c), draws.pick(std::vector{DType::f32, DType::f16, DType::bf16}));
    if (HasFatalFailure()) return;
  }
}

TEST_F(TrellisProductCuda, EmptyMatrices) {
  for (const auto& [m, n, k] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{0, 5, 7}, {2, 0, 7}, {2, 5, 0}}) {
    ProductCase c;
    c.format = std::make_shared<const Trellis>(2, "mul1");
    c.m = m;
    c.n = n;
    c.k = k;
    c.bias = n > 0;
    SCOPED_TRACE(c.text());
    Product product(c);
    const auto y = product.run({});
    EXPECT_EQ(y ? product.compare(*y, "") : "memory damaged", "");
  }
}

TEST_F(TrellisProductCuda, RefusesWhatAKernelDoesNotTake) {
  const auto why = [](const Trellis& format, int64_t m, const char* kernel, int splits = 0) {
    return why_not_matmul_cuda(format, m, DType::f16, {.kernel = kernel, .splits = splits}).value_or("");
  };
  for (const char* kernel : {"trellis_stream", "trellis_exact"}) {
    EXPECT_NE(why(Trellis(2.5, "mul1"), 1, kernel).find("whole bits"), std::string::npos);
    EXPECT_NE(why(Trellis(2, "hyb"), 1, kernel).find("1mad"), std::string::npos);
    EXPECT_NE(why(Trellis(2, "mul1", 128, 18), 1, kernel).find("windows"), std::string::npos);
    EXPECT_NE(why(Trellis(2, "mul1"), 5, kernel).find("tokens"), std::string::npos);
  }
  EXPECT_NE(why(Trellis(5, "mul1"), 8, "trellis_tiles").find("2, 3 or 4 bits"), std::string::npos);
  EXPECT_NE(why(Trellis(2, "mul1"), 500, "trellis_tiles").find("tokens"), std::string::npos);
  EXPECT_NE(why_not_matmul_cuda(Trellis(2.5, "mul1"), 5, DType::f32, {.kernel = "trellis_dense"})
                .value_or("")
                .find("float32"),
            std::string::npos);
  EXPECT_NE(why(Trellis(2, "1mad"), 1, "trellis_exact").find("1mad"), std::string::npos);
  EXPECT_NE(why(Trellis(2, "mul1"), 1, "stream").find("kernel table"), std::string::npos);
}

// For compute-sanitizer: memory that ends with the last element.
TEST_P(TrellisProductCudaSmall, EveryKernelIsRight) {
  const int bits = GetParam();
  for (const char* name : {"mul1", "3inst", "octagon"}) {
    if (name == std::string("octagon") && bits > 4) continue;
    for (const int64_t m : {1, 3, 6}) {
      ProductCase c;
      c.format = std::make_shared<const Trellis>(bits, name, bits % 3 == 0 ? 0 : 128);
      c.n = bits % 2 == 0 ? 140 : 50;
      c.k = bits % 2 == 0 ? 90 : 270;
      c.m = m;
      c.dtype = bits % 2 == 0 ? DType::f16 : DType::bf16;
      c.bias = true;
      c.prepare_on_cpu = m == 1;
      c.tight = true;
      c.seed = static_cast<uint64_t>(bits);
      Product product(c);
      for (const std::string& kernel : kernels_of_table()) {
        for (const int splits : {0, 2}) {
          const CudaMatmulOptions options{.overlap = splits == 2, .kernel = kernel, .splits = splits};
          if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) continue;
          SCOPED_TRACE(c.text() + ", " + text_of_options(options));
          const auto y = product.run(options);
          if (y) {
            EXPECT_EQ(product.compare(*y, kernel), "");
          }
        }
      }
    }
  }
}

// Memory that ends with the last row.
TEST_P(TrellisProductCudaSmall, DecodersWriteWithin) {
  const double bits = GetParam();
  for (const double half : {0.0, 0.5}) {
    if (bits + half > 8) continue;
    for (const DType dtype : {DType::f16, DType::f32}) {
      ProductCase c;
      c.format = std::make_shared<const Trellis>(bits + half, "3inst", dtype == DType::f16 ? 128 : 0);
      c.n = 130;
      c.k = 200;
      c.seed = 2;
      const Product product(c);
      const int64_t stride = 256;
      const auto out = device_bytes(c.n * stride * size_of(dtype));
      decode_fragments_cuda(product.prepared(), out.get(), dtype, stride, nullptr);
      check_cuda(cudaDeviceSynchronize(), "decode");
      const auto bytes = download(out.get(), c.n * stride * size_of(dtype));
      const std::vector<float> w = product.weights();
      for (int64_t row = 0; row < c.n; row += 43) {
        EXPECT_EQ(float_from(element_at(bytes.data(), row * stride + 199, dtype), dtype),
                  float_from(bits_from(w[static_cast<size_t>(row * c.k + 199)], dtype), dtype));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, TrellisProductCudaSmall, ::testing::Range(1, 9));

}  // namespace
}  // namespace quantloom
