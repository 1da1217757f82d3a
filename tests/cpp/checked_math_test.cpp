#include "quantloom/checked_math.hpp"

#include <gtest/gtest.h>

#include <array>

#include "quantloom/random.hpp"

namespace quantloom {
namespace {

TEST(CheckedMath, AgreesWithWideArithmeticOrThrows) {
  const CounterRandom random(1);
  int refused = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    const auto a = static_cast<int64_t>(random.bits(2 * i)) >> random.below(i + 100000, 64);
    const auto b = static_cast<int64_t>(random.bits(2 * i + 1)) >> random.below(i + 200000, 64);
    const __int128 sum = static_cast<__int128>(a) + b;
    const __int128 product = static_cast<__int128>(a) * b;
    const auto fits = [](__int128 value) { return value >= INT64_MIN && value <= INT64_MAX; };
    if (fits(sum)) {
      ASSERT_EQ(checked_add(a, b), static_cast<int64_t>(sum));
    } else {
      ASSERT_THROW(checked_add(a, b), InvalidArgument);
      ++refused;
    }
    if (fits(product)) {
      ASSERT_EQ(checked_mul(a, b), static_cast<int64_t>(product));
    } else {
      ASSERT_THROW(checked_mul(a, b), InvalidArgument);
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(CheckedMath, DividesAndPadsUpwards) {
  for (int64_t a = 0; a < 100; ++a) {
    for (int64_t b = 1; b < 20; ++b) {
      const int64_t quotient = ceil_div(a, b);
      EXPECT_TRUE(quotient * b >= a && (quotient - 1) * b < a);
      EXPECT_EQ(checked_pad(a, b), quotient * b);
    }
  }
  EXPECT_EQ(ceil_div(INT64_MAX, 1), INT64_MAX);
  EXPECT_EQ(ceil_div(INT64_MAX, 2), INT64_MAX / 2 + 1);
  EXPECT_EQ(ceil_div(INT64_MAX, INT64_MAX), 1);
  EXPECT_THROW(checked_pad(INT64_MAX, 64), InvalidArgument);
}

TEST(CheckedMath, CountsElementsOfShapes) {
  EXPECT_EQ(checked_product({}), 1);
  EXPECT_EQ(checked_product(std::array<int64_t, 3>{2, 3, 5}), 30);
  EXPECT_EQ(checked_product(std::array<int64_t, 3>{INT64_MAX, INT64_MAX, 0}), 0);
  EXPECT_THROW(checked_product(std::array<int64_t, 2>{INT64_MAX, 2}), InvalidArgument);
  EXPECT_THROW(checked_product(std::array<int64_t, 2>{-1, 0}), InvalidArgument);
  EXPECT_THROW(checked_product(std::array<int64_t, 2>{-1, -1}), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
