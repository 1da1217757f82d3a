#include "rounding/scale_search.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "formats/uniform_reference.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

struct Problem {
  std::shared_ptr<const Uniform> format;
  int64_t n = 0;
  int64_t k = 0;
  std::vector<float> w;        // [n, k]
  std::vector<float> columns;  // [k, n]
  std::vector<float> weights;  // [k] or empty
  ScaleSearch search;
};

Problem random_problem(uint64_t seed) {
  const CounterRandom random(seed);
  Problem p;
  const int64_t group_size = random.below(0, 4) == 0 ? Uniform::kPerTensor : Uniform::kPerChannel;
  p.format = std::make_shared<const Uniform>(static_cast<int>(1 + random.below(1, 8)), group_size,
                                             random.below(2, 2) == 0);
  p.n = static_cast<int64_t>(1 + random.below(3, 70));
  p.k = static_cast<int64_t>(1 + random.below(4, 40));
  p.w = testing::normal_values(p.n * p.k, seed);
  for (float& value : p.w) value = value * value * value;  // heavy tails make shrinking pay
  p.columns.resize(p.w.size());
  for (int64_t r = 0; r < p.n; ++r) {
    for (int64_t c = 0; c < p.k; ++c) p.columns[c * p.n + r] = p.w[r * p.k + c];
  }
  if (random.below(5, 2) == 0) {
    for (int64_t c = 0; c < p.k; ++c) p.weights.push_back(static_cast<float>(random.uniform(100 + c)));
  }
  p.search = {.steps = static_cast<int>(1 + random.below(6, 12)),
              .smallest = 0.2 + 0.7 * random.uniform(7),
              .norm = random.below(8, 2) == 0 ? 2.0 : 2.4};
  return p;
}

// Weighted error of rows [first, last) at a factor.
double error_at(const Problem& p, float factor, int64_t first, int64_t last) {
  const auto codes = reference::quantize(p.w, p.n, p.k, *p.format,
                                         std::vector<int32_t>(static_cast<size_t>(p.k), 0), factor);
  double total = 0;
  for (int64_t r = first; r < last; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < p.k; ++c) {
      const double error = static_cast<double>(codes.decoded[r * p.k + c]) - p.w[r * p.k + c];
      const double weight = p.weights.empty() ? 1.0 : p.weights[c];
      sum += weight * (p.search.norm == 2.0 ? error * error : std::pow(std::abs(error), p.search.norm));
    }
    total += sum;
  }
  return total;
}

TEST(ScaleSearch, FindsTheBestFactorOfEachRow) {
  int shrunk = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const Problem p = random_problem(seed);
    SCOPED_TRACE(text_of(p.format->spec(), " [", p.n, ", ", p.k, "] seed ", seed));
    const auto encoder = p.format->column_encoder(p.format, p.n, p.k, {});
    std::vector<int64_t> indices(static_cast<size_t>(p.k));
    for (int64_t c = 0; c < p.k; ++c) indices[c] = c;
    const auto found = search_shrink(*encoder, 0, 0, MatrixView<const float>(p.columns.data(), p.k, p.n),
                                     indices, p.weights, p.search);
    const bool shared = p.format->group_size == Uniform::kPerTensor;
    ASSERT_EQ(found.size(), shared ? 1U : static_cast<size_t>(p.n));
    for (size_t f = 0; f < found.size(); ++f) {
      const int64_t first = shared ? 0 : static_cast<int64_t>(f);
      const int64_t last = shared ? p.n : first + 1;
      float best = 1;
      double least = error_at(p, 1, first, last);
      for (int i = 1; i < p.search.steps; ++i) {
        const auto factor = static_cast<float>(1.0 - (1.0 - p.search.smallest) * i / (p.search.steps - 1));
        const double error = error_at(p, factor, first, last);
        if (error < least) {
          least = error;
          best = factor;
        }
      }
      ASSERT_NEAR(found[f], best, 1e-6F) << "row " << f;
      shrunk += found[f] < 1 ? 1 : 0;
    }
  }
  EXPECT_GT(shrunk, 100);
}

TEST(ScaleSearch, KeepsTheLargerFactorOnATie) {
  const auto format = std::make_shared<const Uniform>(4, Uniform::kPerChannel);
  const auto encoder = format->column_encoder(format, 2, 3, {});
  const std::vector<float> zeros(6, 0.0F);
  const std::vector<int64_t> indices = {0, 1, 2};
  EXPECT_EQ(search_shrink(*encoder, 0, 0, MatrixView<const float>(zeros.data(), 3, 2), indices, {}, {}),
            (std::vector<float>{1, 1}));
}

// A row's error in the metric of the search, over all groups.
TEST(ScaleSearch, NearestRoundingIsNeverWorseInItsMetric) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      const auto format = format_from_spec(example);
      constexpr int64_t kRows = 33;
      constexpr int64_t kCols = 140;
      auto w = testing::normal_values(kRows * kCols, 12);
      for (float& value : w) value = value * value * value;
      const MatrixView<const float> matrix(w.data(), kRows, kCols);
      const Rounded plain = round_nearest(matrix, format, {.threads = 1});
      for (const double norm : {2.0, 1.0, 2.4}) {
        const Rounded searched = round_nearest(
            matrix, format, {.scale_search = ScaleSearch{.steps = 12, .norm = norm}, .threads = 1});
        const auto error = [&](const PackedTensor& packed) {
          const auto decoded = testing::decoded_values(packed);
          double sum = 0;
          for (size_t i = 0; i < w.size(); ++i) {
            sum += std::pow(std::abs(static_cast<double>(decoded[i]) - w[i]), norm);
          }
          return sum;
        };
        EXPECT_LE(error(searched.tensor), error(plain.tensor) * (1 + 1e-9)) << example << ", norm " << norm;
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
