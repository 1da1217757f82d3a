#include "rounding/outlier_search.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "rounding/feedback_cases.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::normal_matrix;
using feedback_cases::view;
using testing::decoded_values;
using testing::same_planes;

using Values = std::vector<double>;
using Matrix = std::vector<Values>;

// The weighted squared error of `values` on the grid from their least to their largest.
double grid_error(const Values& values, const Values& weights, int bits) {
  const double low = *std::min_element(values.begin(), values.end());
  const double high = *std::max_element(values.begin(), values.end());
  const double step = (high - low) / ((1 << bits) - 1);
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double level = step > 0 ? std::nearbyint((values[i] - low) / step) : 0;
    sum += weights[i] * std::pow(low + level * step - values[i], 2);
  }
  return sum;
}

// What leaving out each value gains, with the grid of the others fitted afresh.
Values gains(const Values& values, const Values& weights, int bits) {
  Values result;
  for (size_t i = 0; i < values.size(); ++i) {
    Values others;
    Values other_weights;
    for (size_t j = 0; j < values.size(); ++j) {
      if (j == i) continue;
      others.push_back(values[j]);
      other_weights.push_back(weights[j]);
    }
    const double without = others.empty() ? 0 : grid_error(others, other_weights, bits);
    result.push_back(grid_error(values, weights, bits) - without);
  }
  return result;
}

// A row of a group with the means of the others in place of outliers; sets `doubtful` where a gain is so near
// the threshold that rounding errors may decide.
Values left_out(const Values& values, const Values& weights, int bits, double threshold, bool& doubtful) {
  const Values gain = gains(values, weights, bits);
  double sum = 0;
  double count = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    doubtful = doubtful || std::abs(gain[i] - threshold) < 1e-4 * threshold;
    if (gain[i] > threshold) continue;
    sum += values[i];
    count += 1;
  }
  Values result = values;
  for (size_t i = 0; i < values.size() && values.size() > 1; ++i) {
    if (gain[i] > threshold) result[i] = count > 0 ? static_cast<float>(sum / count) : 0.0;
  }
  return result;
}

TEST(OutlierSearch, LeavesOutAsTheReferenceDoes) {
  int64_t doubtful_rows = 0;
  int64_t outliers = 0;
  uint64_t seed = 0;
  for (const int bits : {1, 2, 3, 8}) {
    for (const int64_t count : {1, 2, 3, 5, 16, 61}) {
      for (const double threshold : {1e-6, 1e-3, 0.01, 0.1, 1.0, 1e9}) {
        const int64_t rows = 23;
        auto columns = normal_matrix(count, rows, ++seed);
        for (size_t i = 0; i < columns.size(); i += 7) columns[i] *= 6;
        for (int64_t c = 0; c < count; ++c) {
          columns[c * rows] = 0.5F;                               // equal values
          columns[c * rows + 1] = static_cast<float>(c / 2 % 3);  // ties of the outer ones
        }
        auto weights = normal_matrix(1, count, seed + 1000);
        for (float& weight : weights) weight *= weight;
        weights[0] = 0;
        std::vector<float> copy;
        const auto got = without_outliers(view(columns, count, rows).rows() > 0
                                              ? MatrixView<const float>(columns.data(), count, rows)
                                              : MatrixView<const float>(),
                                          weights, bits, threshold, copy);
        for (int64_t r = 0; r < rows; ++r) {
          Values values;
          Values doubles;
          for (int64_t c = 0; c < count; ++c) {
            values.push_back(columns[c * rows + r]);
            doubles.push_back(weights[c]);
          }
          bool doubtful = false;
          const Values expected = left_out(values, doubles, bits, threshold, doubtful);
          doubtful_rows += doubtful ? 1 : 0;
          for (int64_t c = 0; c < count && !doubtful; ++c) {
            ASSERT_FLOAT_EQ(got(c, r), static_cast<float>(expected[c]))
                << bits << " bits, " << count << " values, threshold " << threshold << ", row " << r;
            outliers += expected[c] != values[c] ? 1 : 0;
          }
        }
      }
    }
  }
  EXPECT_LT(doubtful_rows, 60);  // of 3312
  EXPECT_GT(outliers, 2000);
}

Matrix inverse_of(Matrix a) {
  const size_t k = a.size();
  Matrix inverse(k, Values(k, 0.0));
  for (size_t i = 0; i < k; ++i) inverse[i][i] = 1;
  for (size_t column = 0; column < k; ++column) {  // positive definite: no pivoting
    const double scale = a[column][column];
    for (size_t c = 0; c < k; ++c) {
      a[column][c] /= scale;
      inverse[column][c] /= scale;
    }
    for (size_t r = 0; r < k; ++r) {
      if (r == column) continue;
      const double factor = a[r][column];
      for (size_t c = 0; c < k; ++c) {
        a[r][c] -= factor * a[column][c];
        inverse[r][c] -= factor * inverse[column][c];
      }
    }
  }
  return inverse;
}

struct Oracle {
  std::vector<float> decoded;  // [n, k]
  std::vector<bool> doubtful;  // by row
  int64_t outliers = 0;
};

// The method as stated, in float64 and by explicit inverses. The format's own encoder fits and encodes.
Oracle literal_walk(const std::vector<float>& w, int64_t n, const std::shared_ptr<const Format>& format,
                    const Hessian& hessian, double damping, bool act_order, bool static_groups,
                    double threshold) {
  const int64_t k = hessian.k();
  const int bits = scalar_bits(*format);
  const std::vector<double> diagonal = hessian.diagonal();
  std::vector<int64_t> order(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), 0);
  if (act_order) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return diagonal[a] > diagonal[b]; });
  }
  const int64_t size = format->column_encoder(format, n, k, {})->group_size();
  std::vector<int32_t> group_of_column(static_cast<size_t>(k));
  for (int64_t p = 0; p < k; ++p) {
    group_of_column[order[p]] = static_cast<int32_t>((static_groups ? order[p] : p) / size);
  }
  const auto encoder = format->column_encoder(
      format, n, k, size < k ? std::span<const int32_t>(group_of_column) : std::span<const int32_t>());
  double mean = 0;
  for (const double d : diagonal) mean += d / static_cast<double>(k);
  std::vector<Matrix> inverses;  // of what is left at each position
  for (int64_t p = 0; p < k; ++p) {
    Matrix rest;
    for (int64_t i = p; i < k; ++i) {
      rest.emplace_back();
      for (int64_t j = p; j < k; ++j) {
        rest.back().push_back(hessian.sum()(order[i], order[j]) / static_cast<double>(hessian.tokens()) /
                                  mean +
                              (i == j ? damping : 0));
      }
    }
    inverses.push_back(inverse_of(rest));
  }
  Values weight(static_cast<size_t>(k));  // by column
  double unit = 0;
  for (int64_t p = 0; p < k; ++p) {
    weight[order[p]] = 1 / inverses[p][0][0];
    for (int64_t r = 0; r < n; ++r) unit += std::pow(w[r * k + order[p]], 2) * weight[order[p]];
  }
  const double limit = threshold * unit / static_cast<double>(n * k);
  Oracle oracle;
  oracle.decoded.resize(w.size());
  oracle.doubtful.resize(static_cast<size_t>(n));
  std::vector<Values> work(static_cast<size_t>(n));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t p = 0; p < k; ++p) work[r].push_back(w[r * k + order[p]]);
  }
  const auto fit = [&](int64_t g, const std::vector<int64_t>& positions) {
    std::vector<float> values(positions.size() * static_cast<size_t>(n));
    for (int64_t r = 0; r < n; ++r) {
      Values row;
      Values weights;
      for (const int64_t p : positions) {
        row.push_back(static_cast<float>(work[r][p]));
        weights.push_back(weight[order[p]]);
      }
      bool doubtful = false;
      row = left_out(row, weights, bits, limit, doubtful);
      if (doubtful) oracle.doubtful[r] = true;
      for (size_t c = 0; c < positions.size(); ++c) values[c * n + r] = static_cast<float>(row[c]);
    }
    encoder->fit(g, 0, {values.data(), static_cast<int64_t>(positions.size()), n}, {});
  };
  for (int64_t g = 0; static_groups && g < encoder->group_count(); ++g) {
    std::vector<int64_t> positions;
    for (int64_t column = g * size; column < std::min(k, (g + 1) * size); ++column) {
      positions.push_back(std::find(order.begin(), order.end(), column) - order.begin());
    }
    fit(g, positions);
  }
  for (int64_t p = 0; p < k; ++p) {
    if (!static_groups && p % size == 0) {
      std::vector<int64_t> positions(static_cast<size_t>(std::min(size, k - p)));
      std::iota(positions.begin(), positions.end(), p);
      fit(p / size, positions);
    }
    for (int64_t r = 0; r < n; ++r) {
      const auto value = static_cast<float>(work[r][p]);
      float nearest = 0;
      for (const float shift : {-2e-5F, 2e-5F, 0.0F}) {
        const std::vector<float> moved(static_cast<size_t>(encoder->columns_per_step()), value + shift);
        std::vector<float> decoded(moved.size());
        encoder->encode(order[p], r, {moved.data(), 1, 1}, {decoded.data(), 1, 1});
        if (shift >= 0 && decoded[0] != nearest) oracle.doubtful[r] = true;
        nearest = decoded[0];
      }
      const double error = std::pow(value - nearest, 2) * weight[order[p]];
      if (std::abs(error - limit) < 1e-3 * limit) oracle.doubtful[r] = true;
      if (error > limit) {
        nearest += float_from_f16(f16_from_float(value - nearest));
        ++oracle.outliers;
      }
      oracle.decoded[r * k + order[p]] = nearest;
      const double scaled = (work[r][p] - nearest) / inverses[p][0][0];
      for (int64_t to = 1; to < k - p; ++to) work[r][p + to] -= scaled * inverses[p][0][to];
    }
  }
  return oracle;
}

TEST(OutlierSearch, WalksAsTheReferenceDoes) {
  int64_t rows = 0;
  int64_t doubtful = 0;
  int64_t outliers = 0;
  uint64_t seed = 100;
  for (const char* spec : {"uniform:3:g8:asym:f32", "uniform:4:channel:sym:f32", "codebook:nf4:g16:f32"}) {
    for (const int64_t k : {1, 13, 40}) {
      for (const double threshold : {0.01, 0.1, 0.6}) {
        for (const auto& [act_order, static_groups] :
             std::vector<std::pair<bool, bool>>{{true, true}, {false, true}, {false, false}, {true, false}}) {
          const int64_t n = 19;
          auto w = normal_matrix(n, k, ++seed);
          for (size_t i = 0; i < w.size(); i += 23) w[i] *= 5;
          const Hessian hessian = correlated_hessian(2 * k + 5, k, seed + 77);
          const auto format = format_from_spec(spec);
          ErrorFeedbackOptions options;
          options.damping = 0.02;
          options.act_order = act_order;
          options.static_groups = static_groups;
          options.outliers = OutlierSearch{.threshold = threshold};
          const Rounded rounded = round_error_feedback(view(w, n, k), format, hessian, options);
          const Oracle oracle =
              literal_walk(w, n, format, hessian, options.damping, act_order, static_groups, threshold);
          const auto got = decoded_values(rounded.tensor);
          EXPECT_EQ(rounded.report.outliers, rounded.tensor.plane("outlier_values").element_count());
          outliers += oracle.outliers;
          for (int64_t r = 0; r < n; ++r) {
            ++rows;
            if (oracle.doubtful[r]) {
              ++doubtful;
              continue;
            }
            for (int64_t c = 0; c < k; ++c) {
              // An outlier is a sum of float32 and float16 that follows the walk's rounding errors.
              ASSERT_NEAR(got[r * k + c], oracle.decoded[r * k + c], 1e-4 + 1e-3 * std::abs(got[r * k + c]))
                  << spec << " k " << k << " threshold " << threshold << " row " << r << " column " << c;
            }
          }
        }
      }
    }
  }
  EXPECT_LT(doubtful, rows / 5);
  EXPECT_GT(outliers, 1000);
}

struct Case {
  std::vector<float> w;
  int64_t n = 0;
  int64_t k = 0;
  Hessian hessian;
};

Case heavy_case(int64_t n, int64_t k, uint64_t seed) {
  auto w = normal_matrix(n, k, seed);
  for (float& value : w) value = 0.02F * value * value * value;
  return {w, n, k, correlated_hessian(3 * k, k, seed + 1)};
}

TEST(OutlierSearch, SpendsItsBudget) {
  const Case c = heavy_case(130, 96, 5);
  for (const char* spec : {"spqr:3", "spqr:2:g32:b7", "uniform:3:channel:asym", "codebook:nf4:g64"}) {
    const auto format = format_from_spec(spec);
    for (const bool search : {false, true}) {
      for (const double percent : {0.0, 0.3, 2.0, 11.0}) {
        ErrorFeedbackOptions options;
        options.outliers = OutlierSearch{.percent = percent};
        if (search) options.scale_search = ScaleSearch{.steps = 4};
        const Rounded rounded = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options);
        validate(rounded.tensor);
        const auto budget = static_cast<int64_t>(percent * static_cast<double>(c.n * c.k) / 100);
        const auto* outliers = dynamic_cast<const Outliers*>(rounded.tensor.format.get());
        ASSERT_NE(outliers, nullptr);
        EXPECT_EQ(outliers->count, rounded.report.outliers);
        EXPECT_LE(outliers->count, budget);
        EXPECT_GE(outliers->count, budget - std::max<int64_t>(3, budget / 50)) << spec << " " << percent;
        EXPECT_EQ(std::isinf(rounded.report.outlier_threshold), percent == 0);
        EXPECT_LT(rounded.report.proxy_loss, rounded.report.proxy_loss_nearest);
        // The threshold says it all.
        if (percent == 0) continue;
        options.outliers = OutlierSearch{.threshold = rounded.report.outlier_threshold};
        EXPECT_TRUE(same_planes(round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options).tensor,
                                rounded.tensor));
      }
    }
    ErrorFeedbackOptions options;
    const double dense =
        round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options).tensor.bits_per_weight();
    const double offsets = 32.0 * static_cast<double>(c.n + 1) / static_cast<double>(c.n * c.k);
    const double bits = dense + offsets + 0.7;
    options.outliers = OutlierSearch{.bits = bits};
    const Rounded rounded = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options);
    EXPECT_LE(rounded.tensor.bits_per_weight(), bits * (1 + 1e-12));
    EXPECT_GE(rounded.tensor.bits_per_weight(), bits - 0.02);
    options.outliers = OutlierSearch{.bits = dense};
    EXPECT_THROW(round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options), InvalidArgument);
  }
}

TEST(OutlierSearch, HelpsAndDoesNotDependOnThreads) {
  const Case c = heavy_case(300, 80, 8);
  const auto format = format_from_spec("spqr:3:g16:s3:z3:b48");
  const Rounded plain = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian);
  ErrorFeedbackOptions options;
  options.outliers = OutlierSearch{.percent = 3.0};
  options.scale_search = ScaleSearch{.steps = 3};
  const Rounded once = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options);
  EXPECT_LT(once.report.proxy_loss, 0.5 * plain.report.proxy_loss);
  for (const int threads : {1, 2, 4}) {
    options.threads = threads;
    const Rounded other = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options);
    EXPECT_TRUE(same_planes(other.tensor, once.tensor));
    EXPECT_EQ(other.report.outlier_threshold, once.report.outlier_threshold);
  }
  // Enough rows for walks over a sample.
  const Case tall = heavy_case(2500, 24, 9);
  options.outliers = OutlierSearch{.percent = 1.5};
  const Rounded rounded = round_error_feedback(view(tall.w, tall.n, tall.k), format, tall.hessian, options);
  EXPECT_LE(rounded.report.outliers, 900);
  EXPECT_GE(rounded.report.outliers, 880);
}

TEST(OutlierSearch, GoesWithGroupsOfPermutedColumns) {
  const Case c = heavy_case(64, 80, 12);
  for (const char* spec : {"spqr:3", "uniform:3:g16:asym", "codebook:nf4:g32"}) {
    ErrorFeedbackOptions options;
    options.static_groups = false;
    options.outliers = OutlierSearch{.percent = 4.0};
    const PackedTensor packed =
        round_error_feedback(view(c.w, c.n, c.k), format_from_spec(spec), c.hessian, options).tensor;
    validate(packed);
    EXPECT_TRUE(packed.planes.contains("group_index"));
    const auto x = normal_matrix(3, c.k, 13);
    std::vector<float> expected(static_cast<size_t>(3 * c.n));
    std::vector<float> y(expected.size());
    matmul_reference(view(x, 3, c.k), packed, {expected.data(), 3, c.n});
    matmul(view(x, 3, c.k), *prepare(packed), {y.data(), 3, c.n});
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-4) << spec;
    const PackedTensor back = unprepare_fragments(prepare_fragments(packed));
    for (const auto& [name, plane] : packed.planes) {
      EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), back.plane(name).bytes()))
          << spec << ", " << name;
    }
    options.outliers = OutlierSearch{.bits = 6.0};  // with the bits of group_index
    options.scale_search = ScaleSearch{.steps = 3};
    const double bits = round_error_feedback(view(c.w, c.n, c.k), format_from_spec(spec), c.hessian, options)
                            .tensor.bits_per_weight();
    EXPECT_LE(bits, 6.0);
    EXPECT_GE(bits, 5.9);
  }
}

TEST(OutlierSearch, DecodesToDensePlusOutliers) {
  const Case c = heavy_case(64, 64, 10);
  ErrorFeedbackOptions options;
  options.outliers = OutlierSearch{.percent = 4.0};
  const auto format = format_from_spec("spqr:3");
  const PackedTensor packed = round_error_feedback(view(c.w, c.n, c.k), format, c.hessian, options).tensor;
  auto expected = decoded_values(dense_part(packed));
  const auto offsets = packed.plane("outlier_offsets").values<int32_t>();
  const auto columns = packed.plane("outlier_columns").values<uint16_t>();
  const auto values = packed.plane("outlier_values").values<uint16_t>();
  for (int64_t r = 0; r < 64; ++r) {
    for (int32_t i = offsets[r]; i < offsets[r + 1]; ++i) {
      expected[r * 64 + columns[i]] += float_from_f16(values[i]);
    }
  }
  EXPECT_EQ(decoded_values(packed), expected);
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < 64; ++r) {
    for (int32_t i = offsets[r]; i < offsets[r + 1]; ++i) positions.push_back(r * 64 + columns[i]);
  }
  EXPECT_TRUE(same_planes(with_outliers(dense_part(packed), positions, values), packed));
}

TEST(OutlierSearch, TakesEmptyAndDegenerateMatrices) {
  ErrorFeedbackOptions options;
  for (const char* spec : {"spqr:3", "uniform:4:g8"}) {
    const auto format = format_from_spec(spec);
    for (const auto& search : {OutlierSearch{.percent = 5.0}, OutlierSearch{.bits = 900.0 / 16},
                               OutlierSearch{.threshold = 0.1}}) {
      options.outliers = search;
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{0, 5}, {1, 1}, {1, 7}, {5, 1}}) {
        const auto w = normal_matrix(n, k, 3);
        if (search.bits && n * k < 7 && n > 0) continue;  // too small for 56 bits
        validate(round_error_feedback(view(w, n, k), format, correlated_hessian(9, k, 4), options).tensor);
      }
    }
    options.outliers = OutlierSearch{.percent = 5.0};
    const std::vector<float> zeros(8 * 16, 0.0F);
    const Rounded rounded =
        round_error_feedback(view(zeros, 8, 16), format, correlated_hessian(40, 16, 4), options);
    EXPECT_EQ(rounded.report.outliers, 0);
    EXPECT_EQ(decoded_values(rounded.tensor), zeros);
  }
}

TEST(OutlierSearch, RefusesWhatItCannotTake) {
  const Case c = heavy_case(16, 32, 11);
  const auto expect_refused = [&](const char* spec, const OutlierSearch& search, const char* word) {
    ErrorFeedbackOptions options;
    options.outliers = search;
    try {
      round_error_feedback(view(c.w, c.n, c.k), format_from_spec(spec), c.hessian, options);
      ADD_FAILURE() << "accepted " << spec;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  const OutlierSearch one{.percent = 1.0};
  expect_refused("outliers:1%:spqr:3", one, "format");
  expect_refused("vector_codebook:16x4:g16", one, "format");
  expect_refused("trellis:2", one, "format");
  expect_refused("uniform:4:g16", {}, "outliers");
  expect_refused("uniform:4:g16", {.percent = 1.0, .bits = 4.0}, "outliers");
  expect_refused("uniform:4:g16", {.percent = -1.0}, "percent");
  expect_refused("uniform:4:g16", {.percent = 100.0}, "percent");
  expect_refused("uniform:4:g16", {.bits = 4.0}, "bits");
  expect_refused("uniform:4:g16", {.bits = NAN}, "bits");
  expect_refused("uniform:4:g16", {.threshold = 0.0}, "threshold");
  auto w = c.w;
  w[5] = 1e6F;
  ErrorFeedbackOptions options;
  options.outliers = one;
  EXPECT_THROW(
      round_error_feedback(view(w, c.n, c.k), format_from_spec("uniform:4:g16:f32"), c.hessian, options),
      NumericError);
}

}  // namespace
}  // namespace quantloom
