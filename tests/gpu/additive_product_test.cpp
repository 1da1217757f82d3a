// Products with additive codes, in fragment order and in orders of their own, against float64.
#include <set>

#include "prepare_checks.hpp"

namespace quantloom {
namespace {

class AdditiveCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
class AdditiveCudaSmall : public AdditiveCuda {};

constexpr std::array<const char*, 8> kKernels = {"lookups", "stream", "stream_partials", "stream_repeated",
                                                 "tiles",   "decode", "tiles_wgmma",     "additive_parts"};

std::set<std::string> check_case(const ProductCase& c, Draws& draws) {
  SCOPED_TRACE(c.text());
  Product product(c);
  std::set<std::string> taken;
  const auto check = [&](const CudaMatmulOptions& options) {
    std::string kernel;
    try {
      kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
    } catch (const Error&) {
      return;  // another order's kernel, or one that does not take the case
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
    check({.overlap = true, .kernel = kernel, .splits = static_cast<int>(1 + draws.below(5))});
  }
  return taken;
}

// Every kind of order and kernel: decoders of several widths, look-ups, lists by parts, rows.
constexpr std::array<const char*, 22> kFormats = {
    "additive:2x8:g8",       "additive:1x8:g8",          "additive:4x8:g8",      "additive:1x8:g4",
    "additive:2x8:g4",       "additive:2x8:g8:scale64",  "additive:1x16:g8",     "additive:1x16:g16",
    "additive:1x15:g8:bf16", "additive:1x13:g16",        "additive:1x12:g8",     "additive:3x5:g8:scale24",
    "additive:8x8:g8",       "additive:2x8:g16",         "additive:3x4:g5",      "additive:2x6:g2x4:scale64",
    "additive:1x7:g3x5",     "additive:1x16:g8:scale64", "additive:2x8:g8:bf16", "additive:2x4:g2:f32",
    "additive:1x8:g1",       "additive:2x3:g16x1:f32"};

TEST_F(AdditiveCuda, OrderEqualsTheCpuByteForByte) {
  Draws draws(1);
  static const std::vector<int64_t> kSizes = {0, 1, 2, 7, 31, 64, 65, 100, 129, 333};
  for (const char* const spec : kFormats) {
    for (uint64_t seed = 0; seed < 4 && !HasFailure(); ++seed) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = draws.pick(kSizes);
      c.k = draws.pick(kSizes);
      c.seed = seed;
      check_round_trip(c);
      check_decoding(c);
    }
  }
}

// Scales and tables as codes into levels, which are expanded when they are prepared.
TEST_F(AdditiveCuda, NumbersOfLevels) {
  Draws draws(11);
  for (const char* const spec : {"additive:2x6:g8:scale16:s2:t4", "additive:1x16:g8:t4x7",
                                 "additive:3x5:g4x3:scale6:s3:f32", "additive:1x8:g4:scale4:s4:bf16"}) {
    for (uint64_t seed = 0; seed < 6 && !HasFailure(); ++seed) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = seed == 5 ? 0 : 1 + draws.below(200);
      c.k = seed == 4 ? 0 : 1 + draws.below(400);
      c.m = 1 + draws.below(20);
      c.exact = seed % 2 == 0;
      c.prepare_on_cpu = false;
      c.seed = seed;
      check_round_trip(c);
      check_decoding(c);
      if (c.n > 0 && c.k > 0) check_case(c, draws);
    }
  }
}

// Several slices, of which the last is short.
TEST_F(AdditiveCuda, OrderOfManyColumns) {
  for (const char* const spec : {"additive:1x16:g8", "additive:1x14:g8", "additive:1x16:g16"}) {
    ProductCase c;
    c.format = format_from_spec(spec);
    c.n = 5;
    c.k = 70'001;
    check_round_trip(c);
    check_decoding(c);
  }
}

TEST_F(AdditiveCuda, AgreesWithFloat64) {
  static const std::vector<int64_t> kTokens = {1, 1, 1, 2, 3, 4, 5, 9, 16, 17, 40, 65, 129};
  Draws draws(2);
  std::set<std::string> taken;
  for (const char* const spec : kFormats) {
    for (uint64_t seed = 0; seed < 8 && !HasFailure(); ++seed) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = 1 + draws.below(seed == 6 ? 3000 : 300);
      c.k = 1 + draws.below(seed == 7 ? 5000 : 700);
      if (draws.below(2) == 0) c.k = (c.k + 63) / 64 * 64;
      c.m = draws.pick(kTokens);
      c.exact = seed % 2 == 0;
      c.dtype = draws.pick(std::vector{DType::f16, DType::f16, DType::bf16, DType::bf16, DType::f32});
      c.bias = draws.below(2) == 0;
      c.prepare_on_cpu = draws.below(2) == 0;
      c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
      c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
      c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
      c.seed = seed;
      taken.merge(check_case(c, draws));
    }
  }
  EXPECT_EQ(taken, std::set<std::string>(kKernels.begin(), kKernels.end()));
}

// One token with every order of look-ups and of parts: the columns of a pass, of several, and a part of one.
TEST_F(AdditiveCuda, OneToken) {
  Draws draws(3);
  for (const char* const spec :
       {"additive:1x8:g8", "additive:2x8:g8", "additive:4x8:g8", "additive:1x8:g4", "additive:2x8:g4",
        "additive:1x16:g8", "additive:1x14:g8", "additive:1x16:g16", "vector_codebook:2x256x8:channel",
        "vector_codebook:200x4:channel", "vector_codebook:256x8:tensor"}) {
    for (uint64_t seed = 0; seed < 12 && !HasFailure(); ++seed) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = 1 + draws.below(seed % 4 == 3 ? 5000 : 200);
      c.k = seed % 3 == 0 ? 64 * (1 + draws.below(12)) : 1 + draws.below(seed % 3 == 1 ? 4000 : 300);
      c.exact = seed % 2 == 0;
      c.dtype = seed % 3 == 2 ? DType::bf16 : DType::f16;
      c.bias = seed % 5 == 0;
      c.prepare_on_cpu = c.n < 300;
      c.seed = seed;
      const std::set<std::string> taken = check_case(c, draws);
      EXPECT_TRUE(taken.contains("lookups") || taken.contains("additive_parts")) << spec;
    }
  }
}

// Tokens that share what is read of the table, and one or two left.
TEST_F(AdditiveCuda, FewTokensWithATableInParts) {
  Draws draws(6);
  for (const char* const spec : {"additive:1x16:g8", "additive:1x14:g8:bf16", "additive:1x15:g16"}) {
    for (int64_t m = 2; m <= 8 && !HasFailure(); ++m) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = 1 + draws.below(200);
      c.k = 1 + draws.below(m == 5 ? 40'000 : 900);
      c.m = m;
      c.exact = m % 2 == 0;
      c.dtype = m % 3 == 0 ? DType::bf16 : DType::f16;
      c.bias = m % 2 == 1;
      c.x_gap = draws.below(5);
      c.y_gap = draws.below(5);
      c.seed = static_cast<uint64_t>(m);
      EXPECT_TRUE(check_case(c, draws).contains("additive_parts"));
    }
  }
}

TEST_F(AdditiveCuda, LargerMatrices) {
  Draws draws(4);
  for (const auto& [n, k, spec] :
       std::vector<std::tuple<int64_t, int64_t, const char*>>{{4096, 4096, "additive:2x8:g8"},
                                                              {4096, 4096, "additive:1x16:g8"},
                                                              {300, 70'000, "additive:1x16:g8"},
                                                              {300, 70'000, "additive:2x8:g8"},
                                                              {10'000, 1024, "additive:1x16:g16"}}) {
    for (const int64_t m : {1, 4, 16, 64, 200}) {
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

TEST_F(AdditiveCudaSmall, EveryKernelIsRight) {
  Draws draws(5);
  for (const char* const spec : {"additive:2x8:g8", "additive:1x8:g4", "additive:4x8:g8", "additive:1x14:g8",
                                 "additive:1x13:g16", "additive:2x6:g2x4:scale64", "additive:8x8:g8"}) {
    for (const int64_t m : {1, 5}) {
      ProductCase c;
      c.format = format_from_spec(spec);
      c.n = 70;
      c.k = 260;
      c.m = m;
      c.bias = true;
      c.exact = true;
      c.prepare_on_cpu = m > 1;
      c.tight = true;
      c.seed = static_cast<uint64_t>(m);
      check_case(c, draws);
      check_round_trip(c);
    }
  }
}

TEST_F(AdditiveCuda, Refusals) {
  const auto why = [](const char* spec, const CudaMatmulOptions& options, DType dtype = DType::f16) {
    return why_not_matmul_cuda(*format_from_spec(spec), 1, dtype, options).value_or("taken");
  };
  EXPECT_EQ(why("additive:2x8:g8", {.kernel = "lookups"}), "taken");
  EXPECT_EQ(why("additive:1x16:g8", {.kernel = "additive_parts"}), "taken");
  EXPECT_NE(why("additive:2x8:g8:scale64", {.kernel = "lookups"}).find("one scale"), std::string::npos);
  EXPECT_NE(why("additive:2x7:g8", {.kernel = "lookups"}).find("8 bits"), std::string::npos);
  EXPECT_NE(why("additive:2x8:g8", {.kernel = "lookups"}, DType::f32).find("float32"), std::string::npos);
  EXPECT_NE(why("additive:2x8:g16", {.kernel = "additive_parts"}).find("one table"), std::string::npos);
  EXPECT_NE(why("additive:2x8:g16", {.kernel = "stream"}).find("additive codes"), std::string::npos);
  EXPECT_NE(why("additive:1x16:g8", {.kernel = "additive_parts"}, DType::f32).find("float32"),
            std::string::npos);
}

}  // namespace
}  // namespace quantloom
