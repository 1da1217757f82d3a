// The float16 parts of scores for tensor cores, compiled as host code: their products add up to the score, to
// within the bound that the search relies on.
#include "fit/score_slots.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "test_matrices.hpp"

namespace quantloom::cuda {
namespace {

using testing::normal_values;

double sum_of_slots(int d, const std::vector<float>& x, const std::vector<float>& c) {
  const auto x_at = [&](int j) { return x[static_cast<size_t>(j)]; };
  const auto c_at = [&](int j) { return c[static_cast<size_t>(j)]; };
  double sum = 0;
  for (int slot = 0; slot < steps_of(d) * kSlotsPerStep; ++slot) {
    const float row = row_slot(d, slot, x_at);
    const float entry = entry_slot(d, slot, c_at);
    sum += static_cast<double>(__half2float(__float2half_rn(row))) *
           static_cast<double>(__half2float(__float2half_rn(entry)));
  }
  return sum;
}

TEST(ScoreSlots, FitTheStepsThatTheyTake) {
  for (int d = 1; d <= 16; ++d) {
    EXPECT_GE(steps_of(d) * kSlotsPerStep, 3 * d + 3);
    EXPECT_LT((steps_of(d) - 1) * kSlotsPerStep, 3 * d + 3);
    EXPECT_EQ(row_slot(d, 3 * d + 3, [](int) { return 1.0F; }), 0);
    EXPECT_EQ(entry_slot(d, 3 * d + 3, [](int) { return 1.0F; }), 0);
  }
  EXPECT_EQ(steps_of(4), 1);
}

TEST(ScoreSlots, AddUpToTheScore) {
  constexpr float kLargest = 4095;
  uint64_t seed = 1;
  for (const int d : {1, 2, 3, 4, 5, 8, 13, 16}) {
    for (const float scale : {1e-12F, 1e-7F, 1e-4F, 0.03F, 1.0F, 40.0F, 900.0F}) {
      for (const float ratio : {1e-3F, 1.0F, 1e3F}) {
        for (int trial = 0; trial < 20; ++trial) {
          std::vector<float> x = normal_values(d, seed++);
          std::vector<float> c = normal_values(d, seed++);
          for (float& value : x) value = std::clamp(value * scale, -kLargest, kLargest);
          for (float& value : c) value = std::clamp(value * scale * ratio, -kLargest, kLargest);
          if (trial == 0) std::fill(x.begin(), x.end(), kLargest);
          if (trial <= 1) std::fill(c.begin(), c.end(), -kLargest);
          double square = 0;
          double norm = 0;
          double product = 0;
          for (int j = 0; j < d; ++j) {
            const double a = x[static_cast<size_t>(j)];
            const double b = c[static_cast<size_t>(j)];
            square += a * a;
            norm += b * b;
            product += a * b;
          }
          const double score = norm - 2 * product;
          const double distance = std::sqrt(score + square);
          // Without the additions of the tensor cores: 3 * 2^-22 of |x||2c|, and parts below 2^-24.
          const double bound =
              0x1.8p-20 * std::sqrt(square * norm) + 0x1p-11 + 0x1p-22 * (std::sqrt(square) + distance);
          EXPECT_NEAR(sum_of_slots(d, x, c), score, bound) << "d=" << d << " scale=" << scale;
          // The slack covers that error of two scores, and the additions' as well.
          const double additions = 18.0 * steps_of(d) * 0x1p-23 * (norm + 2 * std::sqrt(square * norm));
          EXPECT_LE(2 * (bound + additions),
                    score_slack(steps_of(d), static_cast<float>(square), static_cast<float>(score)));
        }
      }
    }
  }
}

TEST(ScoreSlots, PaddingScoresAboveAnyEntry) {
  // The largest score: values of opposite signs at the largest magnitude.
  constexpr double kLargest = 4096;
  const double most = 16 * 3 * kLargest * kLargest;
  EXPECT_GT(3.0 * static_cast<double>(kPadding) * static_cast<double>(kNormUnit), 2 * most);
  EXPECT_EQ(__half2float(__float2half_rn(kPadding)), kPadding);
  EXPECT_EQ(__half2float(__float2half_rn(kNormUnit)), kNormUnit);
}

}  // namespace
}  // namespace quantloom::cuda
