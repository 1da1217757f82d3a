#include "quantloom/fit/scale_search.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "fit/scalar_reference.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;
using testing::random_table;
using testing::reference_code;
using testing::reference_error;

TEST(TableErrors, AreThoseOfRoundingEachValue) {
  for (const int64_t count : {0, 1, 97, 5003}) {
    const std::vector<float> values = normal_values(count, 31);
    std::vector<float> weights = normal_values(count, 32);
    for (float& weight : weights) weight = weight < -1 ? 0 : std::abs(weight);
    const std::vector<std::vector<float>> tables = {
        {0.25F}, {-1, 1}, random_table(7, 1, 3), random_table(256, 2, 3), {-1, 0, 0, 0, 2}};
    const std::vector<float> scales = {0.25F, 0.7F, 1, 1.4142F, 4};
    for (const bool weighted : {false, true}) {
      const std::vector<float> used = weighted ? weights : std::vector<float>();
      const SortedValues sample(values, used);
      const std::vector<double> errors = table_errors(sample, tables, scales, 1);
      ASSERT_EQ(errors.size(), tables.size() * scales.size());
      for (size_t t = 0; t < tables.size(); ++t) {
        for (size_t s = 0; s < scales.size(); ++s) {
          const double expected = reference_error(values, used, tables[t], scales[s]);
          EXPECT_NEAR(errors[t * scales.size() + s], expected, 1e-9 * expected + 1e-12)
              << count << " values, table " << t << ", scale " << scales[s];
        }
      }
      EXPECT_EQ(errors, table_errors(sample, tables, scales, 4));
    }
  }
}

TEST(TableCounts, AreExactForValuesOnMidpoints) {
  const std::vector<float> table = random_table(33, 5, 2);
  std::vector<float> values = normal_values(4001, 6);
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    const float middle = (table[i] + table[i + 1]) / 2;
    values.push_back(middle);
    values.push_back(std::nextafter(middle, 10.0F));
    values.push_back(std::nextafter(middle, -10.0F));
  }
  const SortedValues sample(values);
  for (const float scale : {1.0F, 0.3F, 1.7F}) {
    std::vector<int64_t> expected(table.size());
    for (const float x : values) ++expected[reference_code(table, x, scale)];
    EXPECT_EQ(table_counts(sample, table, scale), expected);
    const std::vector<int64_t> ends = cell_ends(sample, table, scale);
    EXPECT_EQ(ends.back(), sample.count());
    EXPECT_EQ(ends[4], std::accumulate(expected.begin(), expected.begin() + 5, int64_t{0}));
  }
}

TEST(TableErrors, RefuseBadTablesAndScales) {
  const SortedValues sample(normal_values(10, 1));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> table = {-1, 1};
  const std::vector<float> one = {1};
  for (const std::vector<float>& bad : {std::vector<float>{}, std::vector<float>{1, 0},
                                        std::vector<float>{nan}, std::vector<float>{0, infinity}}) {
    EXPECT_THROW(table_errors(sample, std::vector<std::vector<float>>{table, bad}, one), InvalidArgument);
    EXPECT_THROW(table_counts(sample, bad), InvalidArgument);
  }
  for (const float bad : {0.0F, -1.0F, nan, infinity}) {
    EXPECT_THROW(table_errors(sample, std::vector<std::vector<float>>{table}, std::vector<float>{bad}),
                 InvalidArgument);
    EXPECT_THROW(table_counts(sample, table, bad), InvalidArgument);
  }
}

}  // namespace
}  // namespace quantloom
