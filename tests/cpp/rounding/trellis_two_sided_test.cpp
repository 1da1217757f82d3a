#include "rounding/trellis_two_sided.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"
#include "rounding/inverse_factor.hpp"
#include "rounding/walk.hpp"

namespace quantloom {
namespace {

constexpr double kDamping = 0.02;

std::vector<float> normal_values(int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

// Of vectors that share a few directions.
Hessian correlated(int64_t k, uint64_t seed, int64_t tokens = 0) {
  tokens = tokens > 0 ? tokens : 3 * k;
  const CounterRandom random(seed);
  std::vector<float> x(static_cast<size_t>(tokens * k));
  for (int64_t t = 0; t < tokens; ++t) {
    const double shared = random.normal(static_cast<uint64_t>(1000000 + t));
    const double other = random.normal(static_cast<uint64_t>(2000000 + t));
    for (int64_t c = 0; c < k; ++c) {
      const double own = random.normal(static_cast<uint64_t>(t * k + c));
      const double size = 1 + 0.5 * std::sin(0.3 * static_cast<double>(c));
      x[static_cast<size_t>(t * k + c)] =
          static_cast<float>(size * (own + shared + (c % 3 == 0 ? other : 0.0)));
    }
  }
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), tokens, k));
  return hessian;
}

Hessian of_diagonal(const std::vector<double>& diagonal) {
  const auto size = std::ssize(diagonal);
  std::vector<double> sum(static_cast<size_t>(size * size), 0.0);
  for (int64_t i = 0; i < size; ++i)
    sum[static_cast<size_t>(i * size + i)] = diagonal[static_cast<size_t>(i)];
  return {MatrixView<const double>(sum.data(), size, size), 1};
}

std::shared_ptr<const Trellis> trellis_of(const char* spec) {
  return std::dynamic_pointer_cast<const Trellis>(format_from_spec(spec));
}

bool same_planes(const PackedTensor& a, const PackedTensor& b) {
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.plane(name);
    if (plane.shape() != other.shape() ||
        std::memcmp(plane.bytes(), other.bytes(), static_cast<size_t>(plane.byte_count())) != 0) {
      return false;
    }
  }
  return a.planes.size() == b.planes.size();
}

using Dense = std::vector<std::vector<double>>;

// The damped Hessian as a walk sees it.
Dense damped(const Hessian& hessian) {
  const int64_t k = hessian.k();
  double mean = 0;
  for (int64_t i = 0; i < k; ++i) mean += hessian.sum()(i, i) / static_cast<double>(k);
  Dense dense(static_cast<size_t>(k), std::vector<double>(static_cast<size_t>(k)));
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      dense[static_cast<size_t>(r)][static_cast<size_t>(c)] =
          hessian.sum()(r, c) / mean + (r == c ? kDamping : 0);
    }
  }
  return dense;
}

// x of a x = b, by Gaussian elimination.
std::vector<double> solved(Dense a, std::vector<double> b) {
  const size_t size = b.size();
  for (size_t p = 0; p < size; ++p) {
    for (size_t r = p + 1; r < size; ++r) {
      const double factor = a[r][p] / a[p][p];
      for (size_t c = p; c < size; ++c) a[r][c] -= factor * a[p][c];
      b[r] -= factor * b[p];
    }
  }
  for (size_t r = size; r-- > 0;) {
    for (size_t c = r + 1; c < size; ++c) b[r] -= a[r][c] * b[c];
    b[r] /= a[r][r];
  }
  return b;
}

// Rounds to a coarse grid, so that a target's last bits do not decide, and remembers nothing.
class GridEncoder final : public ColumnEncoder {
 public:
  int64_t columns_per_step() const override { return 16; }
  int64_t group_count() const override { return 1; }
  int64_t group_size() const override { return 1; }
  bool parameters_span_rows() const override { return false; }
  void fit(int64_t, int64_t, MatrixView<const float>, std::span<const float>) override {}
  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    for (int64_t c = 0; c < 16; ++c) {
      for (int64_t r = 0; r < 16; ++r) {
        targets[static_cast<size_t>((first_row + r) * k + column + c)] = values(c, r);
        decoded(c, r) = 0.5F * std::nearbyint(2 * values(c, r));
        chosen[static_cast<size_t>((first_row + r) * k + column + c)] = decoded(c, r);
      }
    }
  }
  PackedTensor finish(int) override { return {}; }

  GridEncoder(int64_t n, int64_t columns)
      : k(columns), targets(static_cast<size_t>(n * columns)), chosen(targets.size()) {}
  int64_t k;
  std::vector<float> targets;
  std::vector<float> chosen;
};

TEST(TrellisTwoSided, TargetsAreWhatFreeTilesLeave) {
  const int64_t n = 32;
  const int64_t k = 48;
  const std::vector<float> w = normal_values(n * k, 1);
  const Hessian inputs = correlated(k, 2);
  const Hessian outputs = correlated(n, 3);
  const auto order = walk_order(inputs.diagonal(), 16, true);
  const auto output_order = walk_order(outputs.diagonal(), 16, true);
  const InverseFactor factor(inputs, order, kDamping, {}, 1);
  const InverseFactor output_factor(outputs, output_order, kDamping, {}, 1);
  GridEncoder encoder(n, k);
  walk_two_sided({w.data(), n, k}, {order, factor.upper()}, {output_order, output_factor.upper()}, encoder,
                 2);

  // For each tile, rows first: the errors of all later tiles that cost least given those before, under the
  // whole form H_out x H, dense.
  const Dense h = damped(inputs);
  const Dense h_out = damped(outputs);
  std::vector<size_t> sequence;  // of entries, in the order of tiles
  for (int64_t p = 0; p < n; p += 16) {
    for (int64_t q = 0; q < k; q += 16) {
      for (int64_t r = 0; r < 16; ++r) {
        for (int64_t c = 0; c < 16; ++c) {
          sequence.push_back(static_cast<size_t>(output_order[static_cast<size_t>(p + r)] * k +
                                                 order[static_cast<size_t>(q + c)]));
        }
      }
    }
  }
  const auto form = [&](size_t a, size_t b) {
    const auto width = static_cast<size_t>(k);
    return h_out[a / width][b / width] * h[a % width][b % width];
  };
  for (size_t first = 0; first < sequence.size(); first += 256) {
    const size_t free = sequence.size() - first;
    Dense a(free, std::vector<double>(free));
    std::vector<double> b(free, 0.0);
    for (size_t r = 0; r < free; ++r) {
      for (size_t c = 0; c < free; ++c) a[r][c] = form(sequence[first + r], sequence[first + c]);
      for (size_t c = 0; c < first; ++c) {
        const size_t at = sequence[c];
        b[r] -= form(sequence[first + r], at) * (double{w[at]} - double{encoder.chosen[at]});
      }
    }
    const std::vector<double> errors = solved(std::move(a), std::move(b));
    for (size_t i = 0; i < 256; ++i) {
      const size_t at = sequence[first + i];
      ASSERT_NEAR(encoder.targets[at], double{w[at]} - errors[i], 2e-4) << "entry " << at;
    }
  }
}

TEST(TrellisTwoSided, ErrsLessThanOneSided) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{128, 256}, {200, 130}}) {
    const std::vector<float> w = normal_values(n * k, 11);
    const MatrixView<const float> view(w.data(), n, k);
    const Hessian inputs = correlated(k, 12);
    const Hessian outputs = correlated(n, 13);
    const auto format = trellis_of("trellis:2:mul1:l10");
    ErrorFeedbackOptions options;
    const Rounded one = round_error_feedback(view, format, inputs, options);
    options.output_hessian = &outputs;
    const Rounded two = round_error_feedback(view, format, inputs, options);
    std::vector<float> decoded(w.size());
    dequantize(one.tensor, {decoded.data(), n, k});
    const double one_sided = proxy_loss(view, {decoded.data(), n, k}, inputs, outputs);
    EXPECT_LT(two.report.two_sided_loss, 0.8 * one_sided);
    EXPECT_LT(two.report.two_sided_loss, 0.5 * two.report.two_sided_loss_nearest);
    EXPECT_GT(two.report.proxy_loss, one.report.proxy_loss);
    EXPECT_TRUE(std::isnan(one.report.two_sided_loss));

    // The report's loss is that of the planes.
    dequantize(two.tensor, {decoded.data(), n, k});
    double loss = 0;
    std::vector<double> with_inputs(w.size(), 0.0);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          const auto at = static_cast<size_t>(r * k + i);
          sum += (double{w[at]} - double{decoded[at]}) * inputs.sum()(i, c);
        }
        with_inputs[static_cast<size_t>(r * k + c)] = sum / static_cast<double>(inputs.tokens());
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t other = 0; other < n; ++other) {
        double sum = 0;
        for (int64_t c = 0; c < k; ++c) {
          const auto at = static_cast<size_t>(other * k + c);
          sum += with_inputs[static_cast<size_t>(r * k + c)] * (double{w[at]} - double{decoded[at]});
        }
        loss += sum * outputs.sum()(r, other) / static_cast<double>(outputs.tokens());
      }
    }
    EXPECT_NEAR(two.report.two_sided_loss, loss, 1e-4 * loss);

    for (const int threads : {1, 2, 4}) {
      options.threads = threads;
      const Rounded again = round_trellis_feedback(view, format, inputs, options);
      EXPECT_TRUE(same_planes(two.tensor, again.tensor));
      EXPECT_EQ(two.report.two_sided_loss, again.report.two_sided_loss);
    }
  }
}

TEST(TrellisTwoSided, RefittedScalesErrLess) {
  const int64_t n = 128;
  const int64_t k = 128;
  const std::vector<float> w = normal_values(n * k, 21);
  const Hessian inputs = correlated(k, 22);
  const Hessian outputs = correlated(n, 23);
  ErrorFeedbackOptions options;
  options.output_hessian = &outputs;
  const auto loss = [&](bool output_scales, bool input_scales) {
    return round_trellis_feedback({MatrixView<const float>(w.data(), n, k)}, trellis_of("trellis:2:mul1:l10"),
                                  inputs, options, {true, output_scales, input_scales, {0.9}})
        .report.two_sided_loss;
  };
  const double none = loss(false, false);
  EXPECT_LT(loss(true, false), none);
  EXPECT_LT(loss(false, true), none);
  EXPECT_LT(loss(true, true), loss(true, false));
}

// Rows of one size: their scales are ones, and the rotated Hessian of the outputs is one times a number.
TEST(TrellisTwoSided, EqualOutputsAreOneSided) {
  const int64_t n = 128;
  const int64_t k = 256;
  std::vector<float> w = normal_values(k, 31);
  w.resize(static_cast<size_t>(n * k));
  for (int64_t r = 1; r < n; ++r) {  // row 0 with its entries moved around and turned
    for (int64_t c = 0; c < k; ++c) {
      const float value = w[static_cast<size_t>((c * 77 + r * 13) % k)];
      w[static_cast<size_t>(r * k + c)] = (r * c) % 5 < 2 ? -value : value;
    }
  }
  const MatrixView<const float> view(w.data(), n, k);
  const Hessian inputs = correlated(k, 32);
  const auto format = trellis_of("trellis:2:mul1:l10");
  const Rounded one = round_error_feedback(view, format, inputs);
  for (const double entry : {1.0, 3e-5}) {
    const Hessian outputs = of_diagonal(std::vector<double>(static_cast<size_t>(n), entry));
    ErrorFeedbackOptions options;
    options.output_hessian = &outputs;
    const Rounded two = round_error_feedback(view, format, inputs, options);
    EXPECT_NEAR(two.report.two_sided_loss, entry * two.report.proxy_loss, 1e-4 * two.report.two_sided_loss);
    EXPECT_NEAR(two.report.proxy_loss, one.report.proxy_loss, 0.02 * one.report.proxy_loss);
    EXPECT_EQ(two.report.trellis_ratio, one.report.trellis_ratio);
  }
}

TEST(TrellisTwoSided, Refuses) {
  const int64_t n = 128;
  const int64_t k = 256;
  const std::vector<float> w = normal_values(n * k, 41);
  const MatrixView<const float> view(w.data(), n, k);
  const Hessian inputs = correlated(k, 42);
  const auto message = [&](const Hessian& outputs, const char* spec = "trellis:2:mul1:l10") -> std::string {
    ErrorFeedbackOptions options;
    options.output_hessian = &outputs;
    options.damping = 0;
    options.damping_ladder = {};
    try {
      round_error_feedback(view, format_from_spec(spec), inputs, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message(correlated(k, 43)).find("output_hessian"), std::string::npos);
  EXPECT_NE(message(Hessian(n)).find("output_hessian"), std::string::npos);  // of no tokens
  EXPECT_NE(message(of_diagonal(std::vector<double>(static_cast<size_t>(n), 0.0))).find("output_hessian"),
            std::string::npos);
  std::vector<double> diagonal(static_cast<size_t>(n), 1.0);
  diagonal[5] = -1;
  EXPECT_NE(message(of_diagonal(diagonal)).find("output_hessian: got -1 at row 5"), std::string::npos);
  diagonal[5] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(of_diagonal(diagonal), NumericError);  // no Hessian holds one
  EXPECT_NE(message(correlated(n, 45), "uniform:4:g16").find("output_hessian"), std::string::npos);
  EXPECT_NE(message(correlated(n, 45), "trellis:2:mul1:l10:plain").find("output_hessian"), std::string::npos);
  std::vector<double> lopsided(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) lopsided[static_cast<size_t>(i * n + i)] = 1;
  lopsided[1] = 2;
  EXPECT_THROW(Hessian(MatrixView<const double>(lopsided.data(), n, n), 1), NumericError);
  lopsided[static_cast<size_t>(n)] = 2;  // symmetric now, with an eigenvalue of -1
  EXPECT_NE(message(Hessian(MatrixView<const double>(lopsided.data(), n, n), 1))
                .find("output_hessian: got a matrix that is not positive definite"),
            std::string::npos);
}

}  // namespace
}  // namespace quantloom
