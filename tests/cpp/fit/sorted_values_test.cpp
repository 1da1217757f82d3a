#include "quantloom/fit/sorted_values.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "quantloom/error.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;

std::vector<float> random_weights(size_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> weights(count);
  // One in four is zero.
  for (size_t i = 0; i < count; ++i) {
    weights[i] = static_cast<float>(std::max(0.0, random.uniform(i) - 0.25));
  }
  return weights;
}

TEST(SortedValues, AreInOrderWithTheirWeights) {
  for (const int64_t count : {0, 1, 2, 63, 64, 65, 127, 1009, 65536, 100003}) {
    std::vector<float> values = normal_values(count, 7);
    for (size_t i = 0; i < values.size(); i += 3) values[i] = std::round(values[i]);  // many equal ones
    for (size_t i = 0; i < values.size(); i += 7) values[i] *= 1e30F;
    const std::vector<float> weights = random_weights(values.size(), 8);
    std::vector<std::pair<float, float>> expected;
    for (size_t i = 0; i < values.size(); ++i) expected.emplace_back(values[i], weights[i]);
    std::stable_sort(expected.begin(), expected.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const int threads : {1, 2, 4}) {
      const SortedValues plain(values, {}, threads);
      const SortedValues weighted(values, weights, threads);
      ASSERT_EQ(plain.count(), count);
      EXPECT_FALSE(plain.weighted());
      ASSERT_EQ(weighted.weights().size(), weights.empty() ? 0 : values.size());
      for (size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(plain.values()[i], expected[i].first) << i << " of " << count;
        ASSERT_EQ(weighted.values()[i], expected[i].first);
        ASSERT_EQ(weighted.weights()[i], expected[i].second);
      }
    }
  }
}

TEST(SortedValues, SumsAreThoseOfTheRange) {
  for (const int64_t count : {1, 100, 1009, 70001}) {
    std::vector<float> values = normal_values(count, 17);
    values.front() = -1e9F;  // outliers, whose squares hold 20 more digits
    values.back() = 3e9F;
    const std::vector<float> weights = random_weights(values.size(), 18);
    for (const bool weighted : {false, true}) {
      const SortedValues sample(values, weighted ? weights : std::vector<float>());
      const CounterRandom random(19);
      for (uint64_t trial = 0; trial < 200; ++trial) {
        const auto bound = static_cast<uint64_t>(count) + 1;
        auto first = static_cast<int64_t>(random.below(2 * trial, bound));
        auto last = static_cast<int64_t>(random.below(2 * trial + 1, bound));
        if (first > last) std::swap(first, last);
        long double weight = 0;
        long double moment = 0;
        long double second = 0;
        long double magnitude = 0;
        for (auto i = static_cast<size_t>(first); i < static_cast<size_t>(last); ++i) {
          const long double x = sample.values()[i];
          const long double w = weighted ? sample.weights()[i] : 1.0F;
          weight += w;
          moment += w * x;
          second += w * x * x;
          magnitude += w * std::abs(x);
        }
        const Moments sums = sample.sums(first, last);
        EXPECT_NEAR(sums.weight, static_cast<double>(weight), 1e-10 * static_cast<double>(weight));
        // Relative to what lies no further from zero than the range.
        EXPECT_NEAR(sums.first, static_cast<double>(moment), 1e-9 * static_cast<double>(magnitude) + 1e-9);
        EXPECT_NEAR(sums.second, static_cast<double>(second), 1e-9 * static_cast<double>(second) + 1e-9);
      }
    }
  }
}

TEST(SortedValues, SumsAreTheSameForAnyNumberOfThreads) {
  const std::vector<float> values = normal_values(300007, 3);
  const SortedValues one(values, {}, 1);
  for (const int threads : {2, 3, 4}) {
    const SortedValues other(values, {}, threads);
    for (const int64_t end : {1000, 150000, 299999, 300007}) {
      EXPECT_EQ(one.sums(17, end).first, other.sums(17, end).first);
      EXPECT_EQ(one.sums(17, end).second, other.sums(17, end).second);
    }
  }
}

TEST(SortedValues, RefuseBadInput) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values = normal_values(70000, 5);
  const std::vector<float> ones(values.size(), 1.0F);
  for (const float bad : {nan, infinity, -infinity}) {
    std::vector<float> broken = values;
    broken[69990] = bad;
    broken[69995] = bad;
    try {
      const SortedValues sample(broken, {}, 2);
      FAIL() << bad;
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find("values: got"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("index 69990"), std::string::npos) << error.what();
    }
    EXPECT_THROW(SortedValues(values, broken), NumericError);
  }
  std::vector<float> negative = ones;
  negative[3] = -1e-30F;
  EXPECT_THROW(SortedValues(values, negative), InvalidArgument);
  EXPECT_THROW(SortedValues(values, std::span(ones).first(5)), InvalidArgument);
  EXPECT_THROW(SortedValues(values, {}, -1), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
