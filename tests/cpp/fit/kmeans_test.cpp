#include "quantloom/fit/kmeans.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "fit/vector_reference.hpp"
#include "kernels/hwy_targets.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::make_vectors;
using testing::normal_values;
using testing::reference_codes;
using testing::reference_update;
using testing::VectorCase;

std::vector<int32_t> codes_of(const VectorCase& c, int threads = 1) {
  std::vector<int32_t> codes(static_cast<size_t>(c.x.rows()), -7);
  nearest_neighbour(c.x, c.centroids, codes, threads);
  return codes;
}

template <class Body>
void for_each_target(const Body& body) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    body(hwy::TargetName(target));
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(NearestNeighbour, IsThatOfTheDefinitionOnEveryInstructionSet) {
  uint64_t seed = 100;
  for (const int64_t d : {1, 2, 3, 4, 5, 7, 8, 9, 13, 16}) {
    for (const int64_t entries : {1, 2, 15, 16, 17, 100, 513}) {
      const VectorCase c = make_vectors(entries == 513 ? 131 : 67, entries, d, seed++);
      const std::vector<int32_t> expected = reference_codes(c.x, c.centroids);
      for_each_target([&](const char* target) {
        ASSERT_EQ(codes_of(c), expected) << target << " d=" << d << " K=" << entries;
      });
    }
  }
}

TEST(NearestNeighbour, TakesTheLowestIndexOnTies) {
  for (const int64_t d : {1, 2, 4, 8, 16}) {
    // Vectors on a coarse grid: many exact ties, and centroids that occur several times.
    VectorCase c = make_vectors(501, 90, d, 5);
    for (float& value : c.values) value = std::round(value * 2) / 2;
    for (float& value : c.entries) value = std::round(value);
    const std::vector<int32_t> expected = reference_codes(c.x, c.centroids);
    for_each_target([&](const char* target) { ASSERT_EQ(codes_of(c), expected) << target << " d=" << d; });
  }
}

TEST(NearestNeighbour, ResolvesDifferencesBelowFloat32) {
  // Far from zero: float32 scores cannot tell any centroid from another.
  for (const int64_t d : {1, 4, 16}) {
    VectorCase c = make_vectors(200, 64, d, 6);
    for (float& value : c.values) value = 3000 + value * 0.01F;
    for (float& value : c.entries) value = 3000 + value * 0.01F;
    EXPECT_EQ(codes_of(c), reference_codes(c.x, c.centroids));
  }
}

TEST(NearestNeighbour, TakesAnyFiniteMagnitude) {
  for (const float scale : {1e-45F, 1e-40F, 1e-30F, 1e-10F, 1e10F, 1e30F, 1e38F}) {
    VectorCase c = make_vectors(150, 40, 3, 7);
    for (float& value : c.values) value = std::clamp(value, -3.0F, 3.0F) * scale;
    for (float& value : c.entries) value = std::clamp(value, -3.0F, 3.0F) * scale;
    EXPECT_EQ(codes_of(c), reference_codes(c.x, c.centroids)) << scale;
  }
  VectorCase mixed = make_vectors(300, 50, 2, 8);
  for (size_t i = 0; i < mixed.values.size(); i += 5) mixed.values[i] *= 1e20F;
  for (size_t i = 0; i < mixed.values.size(); i += 7) mixed.values[i] *= 1e-20F;
  for (size_t i = 0; i < mixed.entries.size(); i += 11) mixed.entries[i] *= 1e25F;
  EXPECT_EQ(codes_of(mixed), reference_codes(mixed.x, mixed.centroids));
}

TEST(NearestNeighbour, HandlesNoRowsStridesAndThreads) {
  const VectorCase c = make_vectors(9001, 300, 4, 9);
  const std::vector<int32_t> expected = codes_of(c);
  for (const int threads : {2, 4}) EXPECT_EQ(codes_of(c, threads), expected);
  std::vector<int32_t> none;
  nearest_neighbour({c.x.data(), 0, 4}, c.centroids, none);

  const MatrixView<const float> wide(c.values.data(), 2250, 4, 16);
  std::vector<int32_t> codes(2250);
  nearest_neighbour(wide, c.centroids, codes);
  EXPECT_EQ(codes, reference_codes(wide, c.centroids));
}

TEST(NearestNeighbour, RefusesBadArguments) {
  const VectorCase c = make_vectors(10, 4, 3, 1);
  std::vector<int32_t> codes(10);
  const auto view = [&](int64_t rows, int64_t cols) {
    return MatrixView<const float>(c.x.data(), rows, cols, 17);
  };
  EXPECT_THROW(nearest_neighbour(view(1, 17), view(1, 17), std::span(codes).first(1)), InvalidArgument);
  EXPECT_THROW(nearest_neighbour(view(1, 0), view(1, 0), std::span(codes).first(1)), InvalidArgument);
  EXPECT_THROW(nearest_neighbour(c.x, view(1, 2), codes), InvalidArgument);
  EXPECT_THROW(nearest_neighbour(c.x, view(0, 3), codes), InvalidArgument);
  EXPECT_THROW(nearest_neighbour(c.x, c.centroids, std::span(codes).first(9)), InvalidArgument);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    VectorCase broken = make_vectors(10, 4, 3, 1);
    broken.values[13] = bad;
    EXPECT_THROW(nearest_neighbour(broken.x, c.centroids, codes), NumericError);
    broken = make_vectors(10, 4, 3, 1);
    broken.entries[5] = bad;
    EXPECT_THROW(nearest_neighbour(c.x, broken.centroids, codes), NumericError);
  }
}

TEST(KMeans, SweepsAreThoseOfThePlainAlgorithm) {
  for (const bool weighted : {false, true}) {
    const VectorCase c = make_vectors(1500, 20, 3, 11);
    std::vector<float> weights;
    if (weighted) {
      weights = normal_values(1500, 12);
      for (float& weight : weights) weight = weight < -1 ? 0 : weight * weight;
    }
    KMeansOptions options;
    options.start = CodebookStart::given;
    options.centroids = c.centroids;
    options.threshold = 0;
    std::vector<float> expected = c.entries;
    for (int64_t sweeps = 0; sweeps < 5; ++sweeps) {
      options.max_sweeps = sweeps;
      const KMeansResult result = kmeans(c.x, 20, options, weights);
      ASSERT_EQ(result.sweeps, sweeps);
      for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(result.centroids[i], expected[i], 1e-5);
      const MatrixView<const float> table(result.centroids.data(), 20, 3);
      EXPECT_EQ(result.codes, reference_codes(c.x, table));
      double error = 0;
      for (int64_t r = 0; r < c.x.rows(); ++r) {
        double distance = 0;
        for (int64_t j = 0; j < 3; ++j) {
          const double difference = c.x(r, j) - table(result.codes[static_cast<size_t>(r)], j);
          distance += difference * difference;
        }
        error += distance * (weighted ? weights[static_cast<size_t>(r)] : 1.0F);
      }
      EXPECT_NEAR(result.squared_error, error, 1e-5 * error);
      expected = reference_update(c.x, weights, result.centroids, result.codes);
    }
  }
}

TEST(KMeans, ConvergesFromEveryStartWhateverTheThreads) {
  const VectorCase c = make_vectors(9000, 1, 2, 13);
  for (const CodebookStart start : {CodebookStart::kmeans_plus_plus, CodebookStart::random}) {
    KMeansOptions options;
    options.start = start;
    options.seed = 3;
    options.threads = 1;
    const KMeansResult expected = kmeans(c.x, 64, options);
    EXPECT_TRUE(expected.converged) << name_of(start);
    EXPECT_LE(expected.changed, options.threshold);
    // 3 bits per value of a normal law: pairs do clearly better than the 0.1860 of single values (Max, 1960).
    const double total = std::inner_product(c.values.begin(), c.values.end(), c.values.begin(), 0.0);
    const double error = std::sqrt(expected.squared_error / total);
    EXPECT_LT(error, 0.174) << name_of(start);
    EXPECT_GT(error, 0.16) << name_of(start);
    for (const int threads : {2, 4}) {
      options.threads = threads;
      const KMeansResult result = kmeans(c.x, 64, options);
      EXPECT_EQ(result.centroids, expected.centroids);
      EXPECT_EQ(result.codes, expected.codes);
    }
    options.seed = 4;
    EXPECT_NE(kmeans(c.x, 64, options).centroids, expected.centroids);
  }
}

TEST(KMeans, StartsDrawRowsWithoutRepetition) {
  const VectorCase c = make_vectors(500, 1, 2, 14);
  for (const CodebookStart start : {CodebookStart::kmeans_plus_plus, CodebookStart::random}) {
    KMeansOptions options;
    options.start = start;
    for (const int64_t count : {1, 7, 200, 500}) {
      const std::vector<float> table = start_codebook(c.x, count, options);
      ASSERT_EQ(table.size(), static_cast<size_t>(2 * count));
      std::vector<std::pair<float, float>> rows;
      for (size_t i = 0; i < table.size(); i += 2) rows.emplace_back(table[i], table[i + 1]);
      std::sort(rows.begin(), rows.end());
      EXPECT_EQ(std::unique(rows.begin(), rows.end()), rows.end()) << name_of(start) << " " << count;
    }
    // Fewer rows than centroids.
    for (const float value : kmeans(c.x.block(0, 0, 3, 2), 10, options).centroids) {
      EXPECT_TRUE(std::isfinite(value));
    }
    EXPECT_NEAR(kmeans(c.x.block(0, 0, 3, 2), 10, options).squared_error, 0, 1e-12);
  }
}

TEST(KMeans, LargeSamplesStartFromASubset) {
  const VectorCase c = make_vectors((1 << 17) + 5000, 1, 1, 15);
  KMeansOptions options;
  const KMeansResult result = kmeans(c.x, 8, options);
  const double total = std::inner_product(c.values.begin(), c.values.end(), c.values.begin(), 0.0);
  EXPECT_NEAR(std::sqrt(result.squared_error / total), 0.1860, 0.003);  // 3 bits (Max, 1960)
}

TEST(KMeans, EmptyCentroidsStayOrMoveToTheWorstRows) {
  const std::vector<float> values = {0, 0, 0, 1, 5, 5, 9, 9};
  const std::vector<float> start = {0, 0, 100, 100, 200, 200};
  KMeansOptions options;
  options.start = CodebookStart::given;
  options.centroids = {start.data(), 3, 2};
  const MatrixView<const float> x(values.data(), 4, 2);
  const KMeansResult kept = kmeans(x, 3, options);
  EXPECT_EQ(kept.centroids, (std::vector<float>{3.5F, 3.75F, 100, 100, 200, 200}));
  options.reseed_empty = true;
  const KMeansResult moved = kmeans(x, 3, options);
  EXPECT_EQ(moved.centroids, (std::vector<float>{0, 0.5F, 9, 9, 5, 5}));

  const std::vector<float> weights = {1, 1, 0, 0};
  const KMeansResult weighted = kmeans(x, 3, options, weights);
  for (const float value : weighted.centroids) EXPECT_TRUE(std::isfinite(value));
  const std::vector<float> nothing(4, 0.0F);
  options.reseed_empty = false;
  EXPECT_EQ(kmeans(x, 3, options, nothing).centroids, start);
}

TEST(KMeans, RefusesBadOptions) {
  const VectorCase c = make_vectors(10, 4, 3, 1);
  const auto refuses = [&](int64_t count, const KMeansOptions& options, std::span<const float> weights = {}) {
    EXPECT_THROW(kmeans(c.x, count, options, weights), InvalidArgument);
  };
  refuses(0, {});
  refuses(65537, {});
  KMeansOptions options;
  options.threshold = std::numeric_limits<double>::quiet_NaN();
  refuses(2, options);
  options = {};
  options.max_sweeps = -1;
  refuses(2, options);
  options = {};
  options.start = CodebookStart::given;
  refuses(4, options);
  options.centroids = c.centroids;
  refuses(3, options);
  const std::vector<float> ones(9, 1.0F);
  refuses(2, {}, ones);
  std::vector<float> negative(10, 1.0F);
  negative[9] = -1;
  refuses(2, {}, negative);
  negative[9] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(kmeans(c.x, 2, {}, negative), NumericError);
  EXPECT_THROW(kmeans(c.x.block(0, 0, 0, 3), 2, {}), InvalidArgument);
  EXPECT_THROW(codebook_start_from_name("k-means"), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
