#include "quantloom/rounding/error_feedback.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/feedback_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::correlated_inputs;
using feedback_cases::identity_hessian;
using feedback_cases::normal_matrix;
using feedback_cases::PairFormat;
using feedback_cases::view;

using Matrix = std::vector<std::vector<double>>;

std::vector<float> decoded(const PackedTensor& packed) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {values.data(), packed.n, packed.k}, 1);
  return values;
}

bool same_planes(const PackedTensor& a, const PackedTensor& b) {
  if (a.planes.size() != b.planes.size()) return false;
  for (const auto& [name, plane] : a.planes) {
    const auto other = b.planes.find(name);
    if (other == b.planes.end() || other->second.byte_count() != plane.byte_count()) return false;
    if (plane.byte_count() > 0 &&
        std::memcmp(plane.bytes(), other->second.bytes(), static_cast<size_t>(plane.byte_count())) != 0) {
      return false;
    }
  }
  return true;
}

// Gauss-Jordan with partial pivoting.
Matrix inverse_of(Matrix a) {
  const size_t k = a.size();
  Matrix inverse(k, std::vector<double>(k, 0.0));
  for (size_t i = 0; i < k; ++i) inverse[i][i] = 1;
  for (size_t column = 0; column < k; ++column) {
    size_t pivot = column;
    for (size_t r = column; r < k; ++r) {
      if (std::abs(a[r][column]) > std::abs(a[pivot][column])) pivot = r;
    }
    std::swap(a[pivot], a[column]);
    std::swap(inverse[pivot], inverse[column]);
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

struct Damped {
  Matrix h;                    // in the order of the walk
  std::vector<int64_t> order;  // column at each position
};

Damped damped(const Hessian& hessian, double damping, bool act_order, int64_t step) {
  const int64_t k = hessian.k();
  const std::vector<double> diagonal = hessian.diagonal();
  std::vector<int64_t> steps(static_cast<size_t>(k / step));
  std::iota(steps.begin(), steps.end(), 0);
  const auto energy = [&](int64_t s) {
    return std::accumulate(diagonal.begin() + s * step, diagonal.begin() + (s + 1) * step, 0.0);
  };
  if (act_order) {
    std::stable_sort(steps.begin(), steps.end(), [&](int64_t a, int64_t b) { return energy(a) > energy(b); });
  }
  Damped result;
  for (const int64_t s : steps) {
    for (int64_t c = 0; c < step; ++c) result.order.push_back(s * step + c);
  }
  double mean = 0;
  int64_t live = 0;
  for (const double d : diagonal) {
    mean += d;
    live += d > 0 ? 1 : 0;
  }
  mean /= static_cast<double>(live);
  result.h.assign(static_cast<size_t>(k), std::vector<double>(static_cast<size_t>(k)));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      result.h[i][j] =
          hessian.sum()(result.order[i], result.order[j]) / static_cast<double>(hessian.tokens());
    }
    if (result.h[i][i] == 0) result.h[i][i] = 1;
    result.h[i][i] += damping * mean;
  }
  return result;
}

struct Oracle {
  std::vector<float> decoded;  // [n, k]
  std::vector<bool> doubtful;  // rows that came so near to a tie that rounding errors may decide
};

// The method as first stated: after each step, invert the Hessian of the columns that remain afresh and
// move them by the optimal amount, in float64. The format's own encoder fits and encodes.
Oracle explicit_obs(const std::vector<float>& w, int64_t n, const std::shared_ptr<const Format>& format,
                    const Hessian& hessian, const ErrorFeedbackOptions& options) {
  const int64_t k = hessian.k();
  const auto plain = format->column_encoder(format, n, k, {});
  const int64_t step = plain->columns_per_step();
  const int64_t group = plain->group_size();
  const Damped system = damped(hessian, options.damping, options.act_order, step);
  const bool dynamic = !options.static_groups && plain->group_count() > 1;
  std::vector<int32_t> group_of_column(static_cast<size_t>(k));
  for (int64_t p = 0; p < k; ++p) {
    const int64_t column = system.order[p];
    group_of_column[column] = static_cast<int32_t>((dynamic ? p : column) / group);
  }
  const auto encoder = format->column_encoder(format, n, k, group_of_column);
  const std::vector<double> diagonal = hessian.diagonal();
  std::vector<std::vector<double>> work(static_cast<size_t>(n), std::vector<double>(static_cast<size_t>(k)));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t p = 0; p < k; ++p) {
      const int64_t column = system.order[p];
      work[r][p] = diagonal[column] == 0 ? 0.0 : w[r * k + column];
    }
  }
  const auto fit = [&](int64_t g, const std::vector<int64_t>& positions) {
    std::vector<float> values(positions.size() * static_cast<size_t>(n));
    for (size_t c = 0; c < positions.size(); ++c) {
      for (int64_t r = 0; r < n; ++r) values[c * n + r] = static_cast<float>(work[r][positions[c]]);
    }
    encoder->fit(g, 0, {values.data(), static_cast<int64_t>(positions.size()), n}, {});
  };
  if (!dynamic) {
    for (int64_t g = 0; g < plain->group_count(); ++g) {
      std::vector<int64_t> positions;
      for (int64_t column = g * group; column < std::min(k, (g + 1) * group); ++column) {
        positions.push_back(std::find(system.order.begin(), system.order.end(), column) -
                            system.order.begin());
      }
      fit(g, positions);
    }
  }
  Oracle oracle;
  oracle.decoded.resize(static_cast<size_t>(n * k));
  oracle.doubtful.resize(static_cast<size_t>(n));
  for (int64_t p = 0; p < k; p += step) {
    if (dynamic && p % group == 0) {
      std::vector<int64_t> positions(static_cast<size_t>(std::min(group, k - p)));
      std::iota(positions.begin(), positions.end(), p);
      fit(p / group, positions);
    }
    Matrix rest;
    for (int64_t i = p; i < k; ++i) rest.emplace_back(system.h[i].begin() + p, system.h[i].end());
    const Matrix inverse = inverse_of(rest);
    Matrix head;
    for (int64_t c = 0; c < step; ++c) head.emplace_back(inverse[c].begin(), inverse[c].begin() + step);
    const Matrix head_inverse = inverse_of(head);
    for (int64_t r = 0; r < n; ++r) {
      std::vector<float> value(static_cast<size_t>(step));
      std::vector<float> nearest(value.size());
      std::vector<float> other(value.size());
      for (int64_t c = 0; c < step; ++c) value[c] = static_cast<float>(work[r][p + c]);
      for (int64_t c = 0; c < step; ++c) {
        for (const float sign : {-1.0F, 1.0F}) {
          std::vector<float> moved = value;
          moved[c] += sign * 2e-5F;
          encoder->encode(system.order[p], r, {moved.data(), step, 1}, {other.data(), step, 1});
          encoder->encode(system.order[p], r, {value.data(), step, 1}, {nearest.data(), step, 1});
          if (other != nearest) oracle.doubtful[r] = true;
        }
      }
      for (int64_t c = 0; c < step; ++c) oracle.decoded[r * k + system.order[p + c]] = nearest[c];
      for (int64_t to = step; to < k - p; ++to) {
        for (int64_t a = 0; a < step; ++a) {
          double e = 0;
          for (int64_t b = 0; b < step; ++b) e += (work[r][p + b] - nearest[b]) * head_inverse[b][a];
          work[r][p + to] -= e * inverse[a][to];
        }
      }
    }
  }
  return oracle;
}

void expect_same_as_oracle(const std::shared_ptr<const Format>& format, int64_t n, int64_t k, uint64_t seed,
                           const ErrorFeedbackOptions& options, int64_t& rows, int64_t& doubtful) {
  const std::vector<float> w = normal_matrix(n, k, seed);
  const Hessian hessian = correlated_hessian(2 * k + 5, k, seed + 77);
  const Rounded rounded = round_error_feedback(view(w, n, k), format, hessian, options);
  const Oracle oracle = explicit_obs(w, n, format, hessian, options);
  std::vector<float> got(static_cast<size_t>(n * k));
  format->decode(rounded.tensor, 0, {got.data(), n, k});
  for (int64_t r = 0; r < n; ++r) {
    ++rows;
    if (oracle.doubtful[r]) {
      ++doubtful;
      continue;
    }
    for (int64_t j = 0; j < k; ++j) {
      ASSERT_EQ(got[r * k + j], oracle.decoded[r * k + j])
          << format->spec() << " n " << n << " k " << k << " seed " << seed << " row " << r << " column "
          << j;
    }
  }
}

TEST(ErrorFeedback, EqualsExplicitReinversion) {
  int64_t rows = 0;
  int64_t doubtful = 0;
  uint64_t seed = 1000;
  for (const char* spec : {"uniform:4:g8:asym:f32", "uniform:3:g5:sym:f32", "uniform:2:channel:asym:f16",
                           "uniform:1:g4:sym:f16", "uniform:8:tensor:sym:f32"}) {
    const auto format = format_from_spec(spec);
    for (const int64_t k : {1, 2, 3, 13, 20, 37}) {
      for (const bool act_order : {false, true}) {
        for (const int64_t block : {1, 7, 16, 128}) {
          ErrorFeedbackOptions options;
          options.act_order = act_order;
          options.block = block;
          options.damping = 0.02;
          options.threads = 2;
          ASSERT_NO_FATAL_FAILURE(expect_same_as_oracle(format, 9, k, seed++, options, rows, doubtful));
        }
      }
    }
  }
  EXPECT_GT(rows, 2000);
  EXPECT_LT(doubtful, rows / 10);
}

TEST(ErrorFeedback, EqualsExplicitReinversionWithGroupsFittedOnTheWalk) {
  int64_t rows = 0;
  int64_t doubtful = 0;
  int64_t different = 0;
  uint64_t seed = 5000;
  for (const char* spec : {"uniform:4:g8:asym:bf16", "uniform:3:g5:sym:bf16", "uniform:2:g24:sym:bf16"}) {
    const auto format = format_from_spec(spec);
    for (const int64_t k : {3, 16, 37, 60}) {
      for (const bool act_order : {false, true}) {
        for (const int64_t block : {1, 7, 16, 128}) {
          ErrorFeedbackOptions options;
          options.act_order = act_order;
          options.static_groups = false;
          options.block = block;
          const int64_t n = 9;
          const std::vector<float> w = normal_matrix(n, k, seed);
          const Hessian hessian = correlated_hessian(2 * k + 5, k, seed + 77);
          ++seed;
          const Rounded rounded = round_error_feedback(view(w, n, k), format, hessian, options);
          const Oracle oracle = explicit_obs(w, n, format, hessian, options);
          const std::vector<float> got = decoded(rounded.tensor);
          const bool several = k > dynamic_cast<const Uniform&>(*format).group_size;
          EXPECT_EQ(rounded.report.static_groups, !several);
          if (several && !act_order) {
            EXPECT_EQ(rounded.tensor.planes.count("group_index"), 0U);
          }
          for (int64_t r = 0; r < n; ++r) {
            ++rows;
            if (oracle.doubtful[r]) {
              ++doubtful;
              continue;
            }
            different +=
                std::equal(got.begin() + r * k, got.begin() + (r + 1) * k, oracle.decoded.begin() + r * k)
                    ? 0
                    : 1;
          }
        }
      }
    }
  }
  EXPECT_LT(doubtful, rows / 10);
  // A fitted scale may itself fall next to a rounding boundary of its type; that is rare.
  EXPECT_LE(different, rows / 200);
}

TEST(ErrorFeedback, StepsOfSeveralColumnsEqualTheBlockwiseOracle) {
  const auto format = std::make_shared<PairFormat>();
  int64_t rows = 0;
  int64_t doubtful = 0;
  uint64_t seed = 9000;
  for (const int64_t k : {2, 4, 18, 40}) {
    for (const bool act_order : {false, true}) {
      for (const int64_t block : {1, 3, 16, 128}) {
        ErrorFeedbackOptions options;
        options.act_order = act_order;
        options.block = block;
        ASSERT_NO_FATAL_FAILURE(expect_same_as_oracle(format, 11, k, seed++, options, rows, doubtful));
      }
    }
  }
  EXPECT_LT(doubtful, rows / 5);
  const std::vector<float> w = normal_matrix(2, 3, 1);
  EXPECT_THROW(round_error_feedback(view(w, 2, 3), format, identity_hessian(3)), InvalidArgument);
}

TEST(ErrorFeedback, IsNearestRoundingForAnIdentityHessian) {
  for (const char* spec : {"uniform:4:g16", "uniform:3:g7:asym", "uniform:1:channel",
                           "uniform:8:tensor:asym:f32", "uniform:2:g128:sym:bf16"}) {
    const auto format = format_from_spec(spec);
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {5, 3}, {300, 129}, {17, 300}}) {
      const std::vector<float> w = normal_matrix(n, k, static_cast<uint64_t>(n * k));
      const PackedTensor nearest = round_nearest(view(w, n, k), format).tensor;
      for (const bool static_groups : {true, false}) {
        ErrorFeedbackOptions options;
        options.static_groups = static_groups;
        options.threads = 1;
        const Rounded rounded = round_error_feedback(view(w, n, k), format, identity_hessian(k), options);
        EXPECT_TRUE(same_planes(rounded.tensor, nearest)) << spec << " " << n << "x" << k;
        EXPECT_EQ(rounded.report.proxy_loss, rounded.report.proxy_loss_nearest);
      }
    }
  }
}

TEST(ErrorFeedback, LosesLessThanNearestRounding) {
  int64_t better = 0;
  int64_t cases = 0;
  double own = 0;
  double nearest = 0;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    const auto n = static_cast<int64_t>(4 + seed % 13);
    const auto k = static_cast<int64_t>(8 + seed % 41);
    const int bits = 2 + static_cast<int>(seed % 3);
    const auto format =
        std::make_shared<Uniform>(bits, seed % 2 == 0 ? 16 : Uniform::kPerChannel, seed % 5 < 2);
    ErrorFeedbackOptions options;
    options.static_groups = seed % 7 != 0;
    options.threads = 1;
    const std::vector<float> w = normal_matrix(n, k, seed);
    const Rounded rounded =
        round_error_feedback(view(w, n, k), format, correlated_hessian(3 * k, k, seed + 31), options);
    better += rounded.report.proxy_loss <= rounded.report.proxy_loss_nearest ? 1 : 0;
    ++cases;
    own += rounded.report.proxy_loss;
    nearest += rounded.report.proxy_loss_nearest;
  }
  EXPECT_GE(better * 100, cases * 99);
  EXPECT_LT(own, 0.9 * nearest);
}

// One input of fifty-fold energy that comes last: without act_order nothing is left to make up for it.
TEST(ErrorFeedback, ActOrderSavesALateLoudChannel) {
  const int64_t n = 64;
  const int64_t k = 64;
  const int64_t tokens = 400;
  std::vector<float> x = correlated_inputs(tokens, k, 5);
  for (int64_t t = 0; t < tokens; ++t) x[t * k + k - 1] *= 50;
  Hessian hessian(k);
  hessian.add(view(x, tokens, k));
  const std::vector<float> w = normal_matrix(n, k, 6);
  const auto format = std::make_shared<Uniform>(4, Uniform::kPerChannel, false);
  ErrorFeedbackOptions options;
  options.act_order = false;
  const double without = round_error_feedback(view(w, n, k), format, hessian, options).report.proxy_loss;
  options.act_order = true;
  const double with = round_error_feedback(view(w, n, k), format, hessian, options).report.proxy_loss;
  EXPECT_LT(3 * with, without);
}

TEST(ErrorFeedback, ScaleSearchLowersTheLossAtTwoBits) {
  const std::vector<float> w = normal_matrix(40, 96, 2);
  const auto format = std::make_shared<Uniform>(2, 32);
  const Hessian hessian = correlated_hessian(400, 96, 3);
  ErrorFeedbackOptions options;
  const RoundingReport plain = round_error_feedback(view(w, 40, 96), format, hessian, options).report;
  options.scale_search = ScaleSearch{};
  for (const bool static_groups : {true, false}) {
    options.static_groups = static_groups;
    const RoundingReport searched = round_error_feedback(view(w, 40, 96), format, hessian, options).report;
    EXPECT_TRUE(searched.scale_search);
    EXPECT_LT(searched.proxy_loss, plain.proxy_loss);
    EXPECT_NE(searched.proxy_loss_nearest, plain.proxy_loss_nearest);  // searched as well
  }
}

TEST(ErrorFeedback, ReportsWhatWasDone) {
  const int64_t n = 20;
  const int64_t k = 40;
  const std::vector<float> w = normal_matrix(n, k, 2);
  std::vector<float> x = correlated_inputs(200, k, 3);
  for (int64_t t = 0; t < 200; ++t) x[t * k + 7] = x[t * k + 30] = 0;
  Hessian hessian(k);
  hessian.add(view(x, 200, k));
  const Hessian held_out = correlated_hessian(100, k, 4);
  const auto format = std::make_shared<Uniform>(3, 16);
  ErrorFeedbackOptions options;
  options.held_out = &held_out;
  const Rounded rounded = round_error_feedback(view(w, n, k), format, hessian, options);
  const RoundingReport& report = rounded.report;
  validate(rounded.tensor);
  EXPECT_EQ(report.method, "gptq");
  EXPECT_EQ(report.damping, 0.01);
  EXPECT_EQ(report.damping_tried, std::vector<double>{0.01});
  EXPECT_EQ(report.dead_columns, 2);
  EXPECT_EQ(report.tokens, 200);
  EXPECT_TRUE(report.act_order);
  EXPECT_TRUE(report.static_groups);
  EXPECT_FALSE(report.scale_search);
  const std::vector<float> q = decoded(rounded.tensor);
  const MatrixView<const float> q_view(q.data(), n, k);
  EXPECT_NEAR(report.proxy_loss, proxy_loss(view(w, n, k), q_view, hessian), 1e-5 * report.proxy_loss);
  EXPECT_NEAR(report.held_out_loss, proxy_loss(view(w, n, k), q_view, held_out), 1e-5 * report.held_out_loss);
  double squares = 0;
  for (size_t i = 0; i < w.size(); ++i) squares += std::pow(double{w[i]} - q[i], 2);
  EXPECT_NEAR(report.mean_squared_error, squares / static_cast<double>(n * k), 1e-6);
  for (int64_t r = 0; r < n; ++r) EXPECT_EQ(q[r * k + 7], 0.0F);
  const NearestOptions nearest_options{.hessian = &hessian, .held_out = &held_out};
  const RoundingReport nearest = round_nearest(view(w, n, k), format, nearest_options).report;
  EXPECT_EQ(report.proxy_loss_nearest, nearest.proxy_loss);
  EXPECT_EQ(report.held_out_loss_nearest, nearest.held_out_loss);
  EXPECT_LT(report.proxy_loss, report.proxy_loss_nearest);
}

TEST(ErrorFeedback, DoesNotDependOnThreads) {
  const int64_t n = 530;
  const int64_t k = 300;
  const std::vector<float> w = normal_matrix(n, k, 12);
  const Hessian hessian = correlated_hessian(700, k, 13);
  for (const bool static_groups : {true, false}) {
    for (const char* spec : {"uniform:4:g64", "uniform:3:tensor:asym"}) {
      std::vector<Rounded> results;
      for (const int threads : {1, 2, 4}) {
        ErrorFeedbackOptions options;
        options.static_groups = static_groups;
        options.threads = threads;
        results.push_back(round_error_feedback(view(w, n, k), format_from_spec(spec), hessian, options));
      }
      for (size_t i = 1; i < results.size(); ++i) {
        EXPECT_TRUE(same_planes(results[0].tensor, results[i].tensor));
        EXPECT_EQ(results[0].report.proxy_loss, results[i].report.proxy_loss);
      }
    }
  }
}

TEST(ErrorFeedback, TakesHalfPrecisionAndEmptyMatrices) {
  const std::vector<float> w = normal_matrix(6, 20, 3);
  std::vector<uint16_t> half(w.size());
  std::vector<float> rounded(w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    half[i] = bf16_from_float(w[i]);
    rounded[i] = float_from_bf16(half[i]);
  }
  const auto format = std::make_shared<Uniform>(4, 8);
  const Hessian hessian = correlated_hessian(50, 20, 1);
  EXPECT_TRUE(same_planes(
      round_error_feedback(FloatMatrix(half.data(), DType::bf16, 6, 20, 20), format, hessian).tensor,
      round_error_feedback(view(rounded, 6, 20), format, hessian).tensor));
  EXPECT_EQ(round_error_feedback(view(w, 0, 20), format, hessian).tensor.n, 0);
  EXPECT_EQ(round_error_feedback(view(w, 6, 0), format, identity_hessian(0)).tensor.k, 0);
}

TEST(ErrorFeedback, RefusesBadArguments) {
  std::vector<float> w = normal_matrix(4, 8, 1);
  const auto format = std::make_shared<Uniform>(4, 8);
  const Hessian hessian = identity_hessian(8);
  const auto run = [&](const ErrorFeedbackOptions& options) {
    return round_error_feedback(view(w, 4, 8), format, hessian, options);
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(run({.damping = -0.1}), InvalidArgument);
  EXPECT_THROW(run({.damping = nan}), InvalidArgument);
  EXPECT_THROW(run({.damping_ladder = {0.1, nan}}), InvalidArgument);
  EXPECT_THROW(run({.block = 0}), InvalidArgument);
  EXPECT_THROW(run({.scale_search = ScaleSearch{.steps = 0}}), InvalidArgument);
  EXPECT_THROW(run({.threads = -1}), InvalidArgument);
  const Hessian other = identity_hessian(7);
  EXPECT_THROW(run({.held_out = &other}), InvalidArgument);
  EXPECT_THROW(round_error_feedback(view(w, 4, 8), nullptr, hessian), InvalidArgument);
  EXPECT_THROW(round_error_feedback(view(w, 4, 8), format, other), InvalidArgument);
  EXPECT_THROW(round_error_feedback(view(w, 4, 8), format, Hessian(8)), InvalidArgument);
  w[9] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(run({}), NumericError);
}

}  // namespace
}  // namespace quantloom
