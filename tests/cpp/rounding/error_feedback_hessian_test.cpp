// Hessians as they come: short of tokens, with dead or twin inputs, badly conditioned, or simply wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding/inverse_factor.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_inputs;
using feedback_cases::normal_matrix;
using feedback_cases::view;

Hessian hessian_of(const std::vector<float>& x, int64_t tokens, int64_t k) {
  Hessian hessian(k);
  hessian.add(view(x, tokens, k), 1);
  return hessian;
}

// Orthogonal rows by Gram-Schmidt on normal numbers.
std::vector<std::vector<double>> random_basis(int64_t k, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<std::vector<double>> basis;
  uint64_t next = 0;
  while (static_cast<int64_t>(basis.size()) < k) {
    std::vector<double> v(static_cast<size_t>(k));
    for (double& value : v) value = random.normal(next++);
    for (int pass = 0; pass < 2; ++pass) {
      for (const auto& b : basis) {
        double dot = 0;
        for (size_t j = 0; j < b.size(); ++j) dot += b[j] * v[j];
        for (size_t j = 0; j < b.size(); ++j) v[j] -= dot * b[j];
      }
    }
    double norm = 0;
    for (const double value : v) norm += value * value;
    for (double& value : v) value /= std::sqrt(norm);
    basis.push_back(v);
  }
  return basis;
}

Hessian hessian_with(const std::vector<double>& eigenvalues, uint64_t seed) {
  const auto k = static_cast<int64_t>(eigenvalues.size());
  const auto basis = random_basis(k, seed);
  std::vector<double> sum(static_cast<size_t>(k * k), 0.0);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      for (int64_t e = 0; e < k; ++e) sum[i * k + j] += eigenvalues[e] * basis[e][i] * basis[e][j];
      sum[j * k + i] = sum[i * k + j];
    }
  }
  return {MatrixView<const double>(sum.data(), k, k), 1};
}

// Runs the rounding and checks that nothing but finite numbers came out and the loss is at most nearest's.
RoundingReport run(const Hessian& hessian, uint64_t seed, ErrorFeedbackOptions options = {}) {
  const int64_t n = 16;
  const int64_t k = hessian.k();
  const std::vector<float> w = normal_matrix(n, k, seed);
  options.threads = 1;
  const auto format = std::make_shared<Uniform>(3, 16, false);
  const Rounded rounded = round_error_feedback(view(w, n, k), format, hessian, options);
  validate(rounded.tensor);
  const RoundingReport& report = rounded.report;
  EXPECT_TRUE(std::isfinite(report.proxy_loss));
  EXPECT_TRUE(std::isfinite(report.mean_squared_error));
  EXPECT_LE(report.proxy_loss, report.proxy_loss_nearest * (1 + 1e-6));
  EXPECT_EQ(report.damping_tried.back(), report.damping);
  return report;
}

TEST(ErrorFeedbackHessian, FewerTokensThanInputs) {
  for (const int64_t k : {2, 3, 127, 128, 129}) {
    for (const int64_t tokens : {int64_t{1}, (k + 1) / 2, k - 1}) {
      const RoundingReport report =
          run(hessian_of(correlated_inputs(tokens, k, 3), tokens, k), static_cast<uint64_t>(k));
      EXPECT_EQ(report.damping_tried, std::vector<double>{0.01});
    }
  }
  const RoundingReport one = run(hessian_of(normal_matrix(5, 1, 3), 5, 1), 2);
  EXPECT_EQ(one.proxy_loss, one.proxy_loss_nearest);
}

TEST(ErrorFeedbackHessian, DeadAndTwinInputs) {
  for (const int64_t k : {2, 3, 64, 129}) {
    for (uint64_t seed = 0; seed < 10; ++seed) {
      std::vector<float> x = correlated_inputs(300, k, seed);
      for (int64_t t = 0; t < 300; ++t) {
        for (int64_t j = 1; j < k; j += 5) x[t * k + j] = 0;
        for (int64_t j = 2; j < k; j += 4) x[t * k + j] = x[t * k + (j == 2 ? 0 : j - 2)];
      }
      int64_t dead = 0;
      const Hessian hessian = hessian_of(x, 300, k);
      for (const double d : hessian.diagonal()) dead += d == 0 ? 1 : 0;
      EXPECT_GT(dead, 0);
      EXPECT_EQ(run(hessian, seed).dead_columns, dead);
    }
  }
}

TEST(ErrorFeedbackHessian, BadlyConditioned) {
  for (const int64_t k : {3, 64, 129}) {
    for (const double condition : {1e4, 1e8, 1e12, 1e16}) {
      for (uint64_t seed = 0; seed < 4; ++seed) {
        std::vector<double> eigenvalues;
        for (int64_t e = 0; e < k; ++e) {
          eigenvalues.push_back(std::pow(condition, -static_cast<double>(e) / static_cast<double>(k - 1)));
        }
        run(hessian_with(eigenvalues, seed), seed);
      }
    }
  }
}

TEST(ErrorFeedbackHessian, ScaleDoesNotMatter) {
  const int64_t k = 40;
  const Hessian base = hessian_of(correlated_inputs(100, k, 3), 100, k);
  const double loss = run(base, 1).proxy_loss;
  for (const double factor : {0x1p-200, 0x1p-60, 0x1p60, 0x1p200}) {
    std::vector<double> sum(base.sum().data(), base.sum().data() + k * k);
    for (double& value : sum) value *= factor;
    const RoundingReport report = run(Hessian(MatrixView<const double>(sum.data(), k, k), 100), 1);
    EXPECT_NEAR(report.proxy_loss / factor, loss, 1e-6 * loss);
  }
}

TEST(ErrorFeedbackHessian, NegativeEigenvalueClimbsTheLadder) {
  const int64_t k = 50;
  std::vector<double> eigenvalues(static_cast<size_t>(k), 1.0);
  eigenvalues[7] = -0.05;
  const Hessian hessian = hessian_with(eigenvalues, 5);
  const RoundingReport report = run(hessian, 1);
  EXPECT_EQ(report.damping_tried, (std::vector<double>{0.01, 0.03, 0.1}));
  EXPECT_EQ(report.damping, 0.1);
  ErrorFeedbackOptions options;
  options.damping = 0.04;  // smaller values of the ladder are skipped
  EXPECT_EQ(run(hessian, 1, options).damping_tried, (std::vector<double>{0.04, 0.1}));
  options.damping_ladder = {0.02, 0.03};
  try {
    run(hessian, 1, options);
    FAIL();
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("damping 0.04,"), std::string::npos) << error.what();
  }
  const std::vector<double> indefinite = {1, 2.5, 2.5, 1};  // eigenvalues 3.5 and -1.5
  try {
    run(Hessian(MatrixView<const double>(indefinite.data(), 2, 2), 1), 1);
    FAIL();
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("0.01, 0.03, 0.1, 0.3, 1"), std::string::npos) << error.what();
  }
}

TEST(ErrorFeedbackHessian, NoDampingAtAll) {
  ErrorFeedbackOptions options;
  options.damping = 0;
  const int64_t k = 30;
  EXPECT_EQ(run(hessian_of(correlated_inputs(100, k, 3), 100, k), 1, options).damping, 0.0);
  std::vector<float> x(40, 1.0F);  // ten equal tokens of four inputs: rank one
  EXPECT_EQ(run(hessian_of(x, 10, 4), 1, options).damping_tried, (std::vector<double>{0.0, 0.03}));
}

TEST(ErrorFeedbackHessian, RefusesWhatIsNoHessian) {
  const int64_t k = 4;
  const std::vector<float> w = normal_matrix(2, k, 1);
  const auto format = std::make_shared<Uniform>(4, 4);
  std::vector<double> identity(16, 0.0);
  for (int64_t i = 0; i < k; ++i) identity[i * k + i] = 1;
  const auto expect_refused = [&](int64_t row, int64_t column, double value, const std::string& part) {
    std::vector<double> sum = identity;
    sum[row * k + column] = sum[column * k + row] = value;
    try {
      round_error_feedback(view(w, 2, k), format, Hessian(MatrixView<const double>(sum.data(), k, k), 1));
      FAIL() << part;
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  expect_refused(1, 2, std::numeric_limits<double>::quiet_NaN(), "nan at row 1, column 2");
  expect_refused(3, 3, std::numeric_limits<double>::infinity(), "inf at row 3, column 3");
  expect_refused(2, 2, -1e-3, "row 2, column 2");
  std::vector<double> half_dead = identity;
  half_dead[0] = 0;
  half_dead[1] = half_dead[4] = 0.5;
  EXPECT_THROW(round_error_feedback(view(w, 2, k), format,
                                    Hessian(MatrixView<const double>(half_dead.data(), k, k), 1)),
               NumericError);
  const std::vector<double> zero(16, 0.0);
  EXPECT_THROW(
      round_error_feedback(view(w, 2, k), format, Hessian(MatrixView<const double>(zero.data(), k, k), 1)),
      NumericError);
  // Activations whose products overflow float32.
  std::vector<float> loud(8, 1e30F);
  EXPECT_THROW(round_error_feedback(view(w, 2, k), format, hessian_of(loud, 2, k)), NumericError);
}

TEST(ErrorFeedbackHessian, FactorsTheInverse) {
  for (const int64_t k : {1, 2, 17, 130, 257}) {
    const Hessian hessian = hessian_of(correlated_inputs(2 * k + 9, k, 4), 2 * k + 9, k);
    std::vector<int64_t> order(static_cast<size_t>(k));
    for (int64_t p = 0; p < k; ++p) order[p] = (p * 7 + 3) % k;
    if (k % 7 == 0) continue;
    const InverseFactor factor(hessian, order, 0.1, {}, 2);
    const MatrixView<const float> u = factor.upper();
    double mean = 0;
    for (int64_t j = 0; j < k; ++j) mean += hessian.sum()(j, j) / static_cast<double>(k);
    // U H U^T = I
    for (int64_t i = 0; i < k; ++i) {
      std::vector<double> row(static_cast<size_t>(k), 0.0);
      for (int64_t a = 0; a < k; ++a) {
        if (a < i) {
          ASSERT_EQ(u(i, a), 0.0F);
        }
        for (int64_t b = 0; b < k; ++b) {
          const double h = hessian.sum()(order[a], order[b]) / mean + (a == b ? 0.1 : 0.0);
          row[b] += double{u(i, a)} * h;
        }
      }
      for (int64_t j = 0; j < k; ++j) {
        double product = 0;
        for (int64_t b = 0; b < k; ++b) product += row[b] * double{u(j, b)};
        ASSERT_NEAR(product, i == j ? 1.0 : 0.0, 1e-4) << k << " " << i << " " << j;
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
