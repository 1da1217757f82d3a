#include "quantloom/fit/lloyd_max.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "fit/scalar_reference.hpp"
#include "quantloom/error.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;
using testing::reference_error;
using testing::reference_sweep;

constexpr std::array<TableStart, 6> kOwnStarts = {TableStart::quantile,    TableStart::kmeans_plus_plus,
                                                  TableStart::cube_root,   TableStart::uniform_minmax,
                                                  TableStart::uniform_rms, TableStart::random};

std::vector<float> some_weights(size_t count) {
  std::vector<float> weights = normal_values(static_cast<int64_t>(count), 77);
  for (float& weight : weights) weight = weight < -0.5F ? 0 : weight * weight;
  return weights;
}

TEST(LloydMax, SweepsAreThoseOfThePlainAlgorithm) {
  for (const int64_t count : {1, 2, 10, 997, 4096}) {
    const std::vector<float> values = normal_values(count, 21);
    for (const bool weighted : {false, true}) {
      const std::vector<float> weights = weighted ? some_weights(values.size()) : std::vector<float>();
      const SortedValues sample(values, weights);
      for (const int64_t entries : {1, 2, 8, 37}) {
        LloydMaxOptions options;
        options.start = TableStart::uniform_rms;
        options.threshold = 0;
        std::vector<float> expected = start_table(sample, entries, options);
        for (int64_t sweeps = 0; sweeps < 6; ++sweeps) {
          options.max_sweeps = sweeps;
          const LloydMaxResult result = lloyd_max(sample, entries, options);
          if (result.sweeps < sweeps) break;  // converged before
          for (size_t i = 0; i < expected.size(); ++i) {
            ASSERT_NEAR(result.centroids[i], expected[i], 1e-5) << count << " values, sweep " << sweeps;
          }
          const double error = reference_error(values, weights, result.centroids);
          EXPECT_NEAR(result.squared_error, error, 1e-9 * error + 1e-12);
          expected = reference_sweep(values, weights, result.centroids);
        }
      }
    }
  }
}

TEST(LloydMax, EndsAtAFixedPointFromEveryStart) {
  const std::vector<float> values = normal_values(20011, 4);
  for (const bool weighted : {false, true}) {
    const SortedValues sample(values, weighted ? some_weights(values.size()) : std::vector<float>());
    for (const TableStart start : kOwnStarts) {
      LloydMaxOptions options;
      options.start = start;
      options.threshold = 0;
      options.seed = 5;
      const std::vector<float> first = start_table(sample, 16, options);
      EXPECT_TRUE(std::is_sorted(first.begin(), first.end())) << name_of(start);
      const LloydMaxResult result = lloyd_max(sample, 16, options);
      EXPECT_TRUE(result.converged) << name_of(start);
      EXPECT_EQ(result.changed, 0);
      EXPECT_TRUE(std::is_sorted(result.centroids.begin(), result.centroids.end()));
      LloydMaxOptions again;
      again.start = TableStart::given;
      again.centroids = result.centroids;
      again.threshold = 0;
      const LloydMaxResult repeated = lloyd_max(sample, 16, again);
      EXPECT_EQ(repeated.centroids, result.centroids) << name_of(start);
      // The optimum of 16 values for a normal law has R = 0.0975 (Max, 1960).
      if (!weighted) {
        EXPECT_NEAR(std::sqrt(result.squared_error / sample.total().second), 0.0975, 0.003) << name_of(start);
      }
    }
  }
}

TEST(LloydMax, DoesNotDependOnThreadsOrOrder) {
  std::vector<float> values = normal_values(100003, 9);
  const LloydMaxResult expected = lloyd_max(SortedValues(values, {}, 1), 32, {});
  for (const int threads : {2, 4}) {
    EXPECT_EQ(lloyd_max(SortedValues(values, {}, threads), 32, {}).centroids, expected.centroids);
  }
  std::reverse(values.begin(), values.end());
  EXPECT_EQ(lloyd_max(SortedValues(values), 32, {}).centroids, expected.centroids);
  LloydMaxOptions other_seed;
  other_seed.seed = 1;
  EXPECT_NE(lloyd_max(SortedValues(values), 32, other_seed).centroids, expected.centroids);
}

TEST(LloydMax, CellsWithoutWeightKeepTheirCentroid) {
  const std::vector<float> values = {0, 1, 2, 100, 200};
  const std::vector<float> weights = {1, 1, 2, 0, 0};
  LloydMaxOptions options;
  options.start = TableStart::given;
  options.centroids = {-50, 1, 120, 500};
  const LloydMaxResult result = lloyd_max(SortedValues(values, weights), 4, options);
  EXPECT_EQ(result.centroids, (std::vector<float>{-50, 1.25F, 120, 500}));
  EXPECT_TRUE(result.converged);

  const std::vector<float> nothing(values.size(), 0.0F);
  for (const TableStart start : kOwnStarts) {
    LloydMaxOptions own;
    own.start = start;
    for (const float centroid : lloyd_max(SortedValues(values, nothing), 3, own).centroids) {
      EXPECT_TRUE(std::isfinite(centroid)) << name_of(start);
    }
  }
}

TEST(LloydMax, TakesFewerValuesThanCentroids) {
  for (const std::vector<float>& values :
       {std::vector<float>{3}, std::vector<float>{2, 2, 2, 2}, std::vector<float>{-1, 5, 5, -1, 5}}) {
    for (const TableStart start : kOwnStarts) {
      LloydMaxOptions options;
      options.start = start;
      options.threshold = 0;
      const LloydMaxResult result = lloyd_max(SortedValues(values), 9, options);
      ASSERT_EQ(result.centroids.size(), 9);
      EXPECT_TRUE(std::is_sorted(result.centroids.begin(), result.centroids.end())) << name_of(start);
      for (const float centroid : result.centroids) EXPECT_TRUE(std::isfinite(centroid));
      if (start == TableStart::kmeans_plus_plus) {
        EXPECT_NEAR(result.squared_error, 0, 1e-12);
      }
    }
  }
}

TEST(LloydMax, StaysFiniteForExtremeValues) {
  const float huge = std::numeric_limits<float>::max();
  const float tiny = std::numeric_limits<float>::denorm_min();
  const std::vector<float> values = {-huge, -1, -tiny, 0, tiny, 1e-20F, 2, huge, huge};
  for (const TableStart start : kOwnStarts) {
    LloydMaxOptions options;
    options.start = start;
    for (const float centroid : lloyd_max(SortedValues(values), 4, options).centroids) {
      EXPECT_TRUE(std::isfinite(centroid)) << name_of(start);
    }
  }
}

TEST(LloydMax, RefusesBadOptions) {
  const SortedValues sample(normal_values(10, 1));
  const auto refuses = [&](int64_t count, const LloydMaxOptions& options) {
    EXPECT_THROW(lloyd_max(sample, count, options), InvalidArgument);
  };
  refuses(0, {});
  refuses(65537, {});
  LloydMaxOptions options;
  options.threshold = -1;
  refuses(2, options);
  options.threshold = std::numeric_limits<double>::quiet_NaN();
  refuses(2, options);
  options = {};
  options.max_sweeps = -1;
  refuses(2, options);
  options = {};
  options.start = TableStart::uniform_rms;
  options.width = 0;
  refuses(2, options);
  options = {};
  options.start = TableStart::given;
  options.centroids = {1};
  refuses(2, options);
  options.centroids = {1, 0};
  refuses(2, options);
  options.centroids = {0, std::numeric_limits<float>::infinity()};
  refuses(2, options);
  EXPECT_THROW(lloyd_max(SortedValues({}), 2, {}), InvalidArgument);
  EXPECT_THROW(table_start_from_name("kmeans"), InvalidArgument);
  for (const TableStart start : kOwnStarts) EXPECT_EQ(table_start_from_name(name_of(start)), start);
}

}  // namespace
}  // namespace quantloom
