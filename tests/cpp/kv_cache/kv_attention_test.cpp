#include "quantloom/kv_cache/kv_attention.hpp"

#include <gtest/gtest.h>

#include "kv_cache/kv_tokens.hpp"
#include "quantloom/error.hpp"
#include "simd_targets.hpp"

namespace quantloom {
namespace {

using testing::make_cache;
using testing::RandomTokens;

struct Case {
  const char* spec;
  int64_t dim;
  int64_t kv_heads;
  int64_t heads;
  int64_t length;
  int64_t queries;
  DType dtype;
};

const std::vector<Case> kCases = {{"kivi:2", 128, 2, 8, 700, 1, DType::f16},
                                  {"kivi:4", 64, 1, 1, 1100, 3, DType::bf16},
                                  {"kivi:3,4:g24:r24:first3", 80, 2, 6, 130, 1, DType::f32},
                                  {"kivi:8:hadamard", 96, 1, 5, 257, 2, DType::f16},
                                  {"kivi:1", 256, 1, 2, 513, 1, DType::bf16},
                                  {"token:4", 8, 3, 3, 65, 64, DType::f32},
                                  {"token:8:g20:r7", 40, 1, 4, 64, 5, DType::f16},
                                  {"sdr:4", 128, 2, 2, 300, 1, DType::f16},
                                  {"kvquant:3:1%:first1", 80, 2, 4, 200, 2, DType::f16},
                                  {"kvquant:4,2:5%:r9", 128, 1, 4, 600, 1, DType::f32},
                                  {"kivi:2", 128, 1, 3, 1, 1, DType::f32},
                                  {"token:4", 64, 1, 70, 1025, 2, DType::f16},
                                  {"kivi:4", 64, 1, 2, 1200, 100, DType::f16}};

TEST(KVAttention, IsThatOfFloat64OnEveryInstructionSet) {
  for (const Case& c : kCases) {
    const KVShape shape{2, c.kv_heads, c.dim, c.dtype};
    const RandomTokens keys(shape, c.length, 1);
    const RandomTokens values(shape, c.length, 2);
    const RandomTokens queries({2, c.heads, c.dim, c.dtype}, c.queries, 3);
    KVCache cache = make_cache(kv_format_from_spec(c.spec), shape);
    // The second sequence is shorter, perhaps than the queries.
    cache.append(keys.all(), values.all(), std::vector<int64_t>{0, c.length * 2 / 3});
    const float scale = 1 / std::sqrt(static_cast<float>(c.dim));
    const auto count = static_cast<size_t>(2 * c.queries * c.heads * c.dim);
    std::vector<double> expected(count, -1.0);
    std::vector<float> actual(count, -1.0F);
    attend_reference(cache, queries.all(), scale, expected.data());
    double largest = 0;
    std::vector<float> read(static_cast<size_t>(c.length * c.dim + 16));
    for (int64_t s = 0; s < 2; ++s) {
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        cache.read(KVSide::values, s, h, 0, cache.length(s), read.data());
        for (int64_t i = 0; i < cache.length(s) * c.dim; ++i) {
          largest = std::max(largest, std::abs(static_cast<double>(read[static_cast<size_t>(i)])));
        }
      }
    }
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      hwy::SetSupportedTargetsForTest(target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      attend(cache, queries.all(), scale, actual.data(), 1);
      hwy::SetSupportedTargetsForTest(0);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      for (size_t i = 0; i < count; ++i) {
        ASSERT_NEAR(expected[i], static_cast<double>(actual[i]), 1e-5 * largest)
            << c.spec << ", " << c.dim << ", element " << i << ", " << hwy::TargetName(target);
      }
    }
    attend(cache, queries.all(), scale, actual.data(), 1);
    for (const int threads : {2, 4}) {
      std::vector<float> more(count);
      attend(cache, queries.all(), scale, more.data(), threads);
      ASSERT_EQ(0, std::memcmp(actual.data(), more.data(), count * sizeof(float))) << c.spec;
    }
  }
}

TEST(KVAttention, OfOneTokenIsItsValueAndOfNoneIsZero) {
  const KVShape shape{2, 1, 16, DType::f32};
  const RandomTokens x(shape, 1, 4);
  const RandomTokens queries(shape, 2, 5);
  KVCache cache = make_cache(kv_format_from_spec("kivi:2"), shape);
  cache.append(x.all(), x.all(), std::vector<int64_t>{0, 1});
  std::vector<float> out(2 * 2 * 16, -1.0F);
  attend(cache, queries.all(), 1.0F, out.data());
  for (size_t d = 0; d < 16; ++d) {
    EXPECT_EQ(out[d], 0.0F);  // the first query precedes the only token
    EXPECT_EQ(out[16 + d], x.memory.values<float>()[d]);
    EXPECT_EQ(out[32 + d], 0.0F);
    EXPECT_EQ(out[48 + d], 0.0F);
  }
}

TEST(KVAttention, LargeScoresStayFinite) {
  const KVShape shape{1, 1, 16, DType::f32};
  RandomTokens keys(shape, 200, 6);
  for (int64_t i = 0; i < 200 * 16; ++i) keys.set(i, i / 16 == 77 ? 1000.0F : -1000.0F);
  const RandomTokens values(shape, 200, 7);
  RandomTokens queries(shape, 1, 8);
  for (int64_t i = 0; i < 16; ++i) queries.set(i, 1000.0F);
  KVCache cache = make_cache(kv_format_from_spec("token:8:r200"), shape);
  cache.append(keys.all(), values.all());
  std::vector<float> out(16);
  attend(cache, queries.all(), 1.0F, out.data());
  for (size_t d = 0; d < 16; ++d) EXPECT_EQ(out[d], values.memory.values<float>()[77 * 16 + d]);
}

TEST(KVAttention, RefusesBadQueries) {
  const KVShape shape{2, 2, 16, DType::f32};
  const RandomTokens x(shape, 4, 9);
  KVCache cache = make_cache(kv_format_from_spec("kivi:2"), shape);
  cache.append(x.all(), x.all());
  std::vector<float> out(1024);
  const auto refuse = [&](const KVShape& other) {
    const RandomTokens queries(other, 1, 10);
    EXPECT_THROW(attend(cache, queries.all(), 1.0F, out.data()), InvalidArgument);
  };
  refuse({2, 3, 16, DType::f32});
  refuse({1, 2, 16, DType::f32});
  refuse({2, 2, 24, DType::f32});
  EXPECT_THROW(attend(cache, x.view(0, 1), std::nanf(""), out.data()), InvalidArgument);
  EXPECT_THROW(attend(cache, x.view(0, 1), 1.0F, nullptr), InvalidArgument);
  EXPECT_THROW(attend(cache, x.view(0, 1), 1.0F, out.data(), -1), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
