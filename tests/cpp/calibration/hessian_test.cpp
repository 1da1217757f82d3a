#include "quantloom/calibration/hessian.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "calibration/error_statistics.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

std::vector<float> random_matrix(int64_t rows, int64_t cols, uint64_t seed, float scale = 1) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows * cols; ++i) values[i] = scale * static_cast<float>(random.normal(i));
  return values;
}

FloatMatrix view(const std::vector<float>& values, int64_t rows, int64_t cols) {
  return MatrixView<const float>(values.data(), rows, cols);
}

double naive_loss(const std::vector<float>& w, const std::vector<float>& q, const Hessian& h, int64_t n) {
  const int64_t k = h.k();
  long double total = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      const long double e = static_cast<long double>(w[r * k + i]) - q[r * k + i];
      for (int64_t j = 0; j < k; ++j) {
        total += e * h.sum()(i, j) * (static_cast<long double>(w[r * k + j]) - q[r * k + j]);
      }
    }
  }
  return static_cast<double>(total / h.tokens());
}

TEST(Hessian, MatchesTheNaiveSumForAllInputTypes) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const int64_t tokens = 300;
    const int64_t k = 37;
    const std::vector<float> x = random_matrix(tokens, k, 11);
    std::vector<uint16_t> half(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      half[i] = dtype == DType::bf16 ? bf16_from_float(x[i]) : f16_from_float(x[i]);
    }
    const void* data = dtype == DType::f32 ? static_cast<const void*>(x.data()) : half.data();
    const FloatMatrix matrix(data, dtype, tokens, k, k);
    Hessian hessian(k);
    hessian.add(matrix, 2);
    EXPECT_EQ(hessian.tokens(), tokens);
    std::vector<float> row(static_cast<size_t>(k));
    std::vector<double> expected(static_cast<size_t>(k * k), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      matrix.read(t, 0, k, row.data());
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) expected[i * k + j] += double{row[i]} * row[j];
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) ASSERT_NEAR(hessian.sum()(i, j), expected[i * k + j], 5e-4);
      ASSERT_NEAR(hessian.diagonal()[i], expected[i * k + i] / tokens, 1e-6);
    }
  }
}

// Pieces whose sizes are multiples of 256 tokens (the length of a float32 chunk) give the very same bits.
TEST(Hessian, StreamsInPieces) {
  const int64_t k = 130;
  const std::vector<float> x = random_matrix(2600, k, 3);
  Hessian whole(k);
  whole.add(view(x, 2600, k), 1);
  Hessian pieces(k);
  Hessian odd(k);
  for (int64_t first = 0; first < 2600; first += 512) {
    const int64_t tokens = std::min<int64_t>(512, 2600 - first);
    pieces.add(MatrixView<const float>(x.data() + first * k, tokens, k), 2);
  }
  for (int64_t first = 0; first < 2600; first += 13) {
    odd.add(MatrixView<const float>(x.data() + first * k, 13, k), 2);
  }
  EXPECT_EQ(odd.tokens(), 2600);
  EXPECT_EQ(0, std::memcmp(whole.sum().data(), pieces.sum().data(), k * k * sizeof(double)));
  for (int64_t i = 0; i < k * k; ++i) {
    ASSERT_NEAR(whole.sum().data()[i], odd.sum().data()[i], 2e-3);
    ASSERT_EQ(odd.sum()(i / k, i % k), odd.sum()(i % k, i / k));
  }
}

TEST(Hessian, LongHalfPrecisionInputsDoNotDependOnBandsOrThreads) {
  const int64_t tokens = 4500;
  const int64_t k = 33;
  const std::vector<float> x = random_matrix(tokens, k, 8);
  std::vector<uint16_t> half(x.size());
  std::vector<float> rounded(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    half[i] = bf16_from_float(x[i]);
    rounded[i] = float_from_bf16(half[i]);
  }
  Hessian expected(k);
  expected.add(view(rounded, tokens, k), 1);
  for (const int threads : {1, 2, 4}) {
    Hessian hessian(k);
    hessian.add(FloatMatrix(half.data(), DType::bf16, tokens, k, k), threads);
    EXPECT_EQ(0, std::memcmp(expected.sum().data(), hessian.sum().data(), k * k * sizeof(double)));
  }
}

TEST(Hessian, RefusesBadInputAndKeepsItsSum) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(Hessian(-1), InvalidArgument);
  EXPECT_THROW(Hessian(int64_t{1} << 40), InvalidArgument);
  Hessian hessian(3);
  std::vector<float> x = {1, 2, 3, 4, 5, 6};
  hessian.add(view(x, 2, 3));
  EXPECT_THROW(hessian.add(view(x, 3, 2)), InvalidArgument);
  EXPECT_THROW(hessian.add(view(x, 2, 3), -1), InvalidArgument);
  for (const float bad : {nan, std::numeric_limits<float>::infinity()}) {
    x[4] = bad;
    try {
      hessian.add(view(x, 2, 3));
      FAIL();
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find("row 1, column 1"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(hessian.tokens(), 2);
  EXPECT_EQ(hessian.sum()(0, 0), 17.0);
  EXPECT_EQ(hessian.sum()(1, 2), 36.0);
  EXPECT_THROW(Hessian(3).diagonal(), InvalidArgument);
}

TEST(Hessian, TakesAWholeMatrixIfItIsOne) {
  std::vector<double> sum = {2, 1, 1, 3};
  const MatrixView<const double> whole(sum.data(), 2, 2);
  EXPECT_EQ(Hessian(whole, 2).diagonal(), (std::vector<double>{1.0, 1.5}));
  EXPECT_THROW(Hessian(MatrixView<const double>(sum.data(), 1, 2), 2), InvalidArgument);
  EXPECT_THROW(Hessian(whole, 0), InvalidArgument);
  sum[1] = 1 + 1e-7;
  EXPECT_NO_THROW(Hessian(whole, 1));
  sum[1] = 1 + 1e-5;
  EXPECT_THROW(Hessian(whole, 1), NumericError);
  sum[1] = 1;
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    sum[2] = bad;
    EXPECT_THROW(Hessian(whole, 1), NumericError);
  }
  EXPECT_EQ(Hessian(MatrixView<const double>(), 1).k(), 0);
}

TEST(ProxyLoss, MatchesTheNaiveTripleSum) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 3}, {1, 1}, {1, 40}, {7, 3}, {33, 129}, {300, 65}, {1100, 31}, {5, 300}}) {
    const std::vector<float> w = random_matrix(n, k, 1);
    std::vector<float> q = w;
    const std::vector<float> noise = random_matrix(n, k, 2, 0.1F);
    for (size_t i = 0; i < q.size(); ++i) q[i] += noise[i];
    Hessian hessian(k);
    hessian.add(view(random_matrix(k + 9, k, 3), k + 9, k));
    const double expected = naive_loss(w, q, hessian, n);
    const double loss = proxy_loss(view(w, n, k), MatrixView<const float>(q.data(), n, k), hessian, 2);
    EXPECT_NEAR(loss, expected, 2e-6 * expected) << n << "x" << k;
    EXPECT_EQ(loss, proxy_loss(view(w, n, k), MatrixView<const float>(q.data(), n, k), hessian, 4));
  }
}

// Errors that cancel along the Hessian's dominant direction: products in float32 alone would be wrong in
// the third digit.
TEST(ProxyLoss, StaysAccurateWhereErrorsCancel) {
  const int64_t n = 40;
  const int64_t k = 96;
  const CounterRandom random(17);
  std::vector<double> direction(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) direction[j] = random.normal(j);
  std::vector<double> sum(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      sum[i * k + j] = 1e6 * direction[i] * direction[j] + (i == j ? 1e2 : 0.0);
    }
  }
  const Hessian hessian(MatrixView<const double>(sum.data(), k, k), 3);
  std::vector<float> errors = random_matrix(n, k, 5);
  double squares = 0;
  for (const double d : direction) squares += d * d;
  for (int64_t r = 0; r < n; ++r) {
    double along = 0;
    for (int64_t j = 0; j < k; ++j) along += errors[r * k + j] * direction[j];
    for (int64_t j = 0; j < k; ++j) {
      errors[r * k + j] = static_cast<float>(errors[r * k + j] - direction[j] * along / squares);
    }
  }
  const std::vector<float> zero(errors.size(), 0.0F);
  const double expected = naive_loss(errors, zero, hessian, n);
  const double loss = proxy_loss(view(errors, n, k), MatrixView<const float>(zero.data(), n, k), hessian, 2);
  EXPECT_NEAR(loss, expected, 1e-6 * expected);
}

TEST(ProxyLoss, RefusesWhatDoesNotFit) {
  const std::vector<float> w = random_matrix(4, 6, 1);
  Hessian hessian(6);
  const MatrixView<const float> decoded(w.data(), 4, 6);
  EXPECT_THROW(proxy_loss(view(w, 4, 6), decoded, hessian), InvalidArgument);  // no tokens
  hessian.add(view(w, 4, 6));
  EXPECT_EQ(proxy_loss(view(w, 4, 6), decoded, hessian), 0.0);
  EXPECT_THROW(proxy_loss(view(w, 3, 6), decoded, hessian), InvalidArgument);
  EXPECT_THROW(proxy_loss(view(w, 6, 4), MatrixView<const float>(w.data(), 6, 4), hessian), InvalidArgument);
  std::vector<float> bad = w;
  bad[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(proxy_loss(view(bad, 4, 6), decoded, hessian), NumericError);
}

TEST(ProxyLoss, WeightsAreTheDiagonalScaledToOne) {
  const std::vector<double> sum = {4, 0, 0, 8};
  EXPECT_EQ(column_weights(Hessian(MatrixView<const double>(sum.data(), 2, 2), 7)),
            (std::vector<float>{0.5F, 1.0F}));
  const std::vector<double> zero = {0};
  EXPECT_EQ(column_weights(Hessian(MatrixView<const double>(zero.data(), 1, 1), 7)),
            (std::vector<float>{1.0F}));
}

}  // namespace
}  // namespace quantloom
