#include "algebra/dense.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "algebra/dense_tiles.hpp"
#include "quantloom/random.hpp"

namespace quantloom::algebra {
namespace {

template <class T>
std::vector<T> random_values(int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(random.normal(i));
  return values;
}

// Symmetric positive definite: X^T X / tokens + 0.1 I.
std::vector<double> random_spd(int64_t k, uint64_t seed) {
  const int64_t tokens = k + 3;
  const std::vector<double> x = random_values<double>(tokens * k, seed);
  std::vector<double> h(static_cast<size_t>(k * k), 0.0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j)
        h[i * k + j] += x[t * k + i] * x[t * k + j] / static_cast<double>(tokens);
    }
  }
  for (int64_t i = 0; i < k; ++i) h[i * k + i] += 0.1;
  return h;
}

std::vector<double> naive_cholesky(std::vector<double> a, int64_t k) {
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = j; i < k; ++i) {
      double value = a[i * k + j];
      for (int64_t t = 0; t < j; ++t) value -= a[i * k + t] * a[j * k + t];
      a[i * k + j] = i == j ? std::sqrt(value) : value / a[j * k + j];
    }
  }
  return a;
}

const std::vector<int64_t> kSizes = {0, 1, 2, 3, 7, 64, 127, 128, 129, 257, 300, 521};

// Dispatch takes the best table only; the others are as right.
TEST(Dense, TilesOfEveryInstructionSetMatchNaiveLoops) {
  ASSERT_GE(supported_tiles().size(), 1U);
  constexpr int64_t kM = 37;
  constexpr int64_t kN = 29;
  constexpr int64_t kK = 65;
  const auto a32 = random_values<float>(kM * kK, 1);
  const auto b32 = random_values<float>(kN * kK, 2);
  const auto a = random_values<double>(kM * kK, 3);
  const auto b = random_values<double>(kN * kK, 4);
  const auto transposed = [](const auto& x, int64_t rows, int64_t cols) {
    auto t = x;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) t[c * rows + r] = x[r * cols + c];
    }
    return t;
  };
  const auto expect_product = [&](const auto& x, const auto& y, const auto& got, double tolerance) {
    for (int64_t i = 0; i < kM; ++i) {
      for (int64_t j = 0; j < kN; ++j) {
        double sum = 1;
        for (int64_t t = 0; t < kK; ++t) sum -= 2.0 * x[i * kK + t] * y[j * kK + t];
        ASSERT_NEAR(got[i * kN + j], sum, tolerance) << i << " " << j;
      }
    }
  };
  for (const TileTable* table : supported_tiles()) {
    SCOPED_TRACE(table->name);
    std::vector<float> c32(kM * kN, 1.0F);
    table->gemm_nt_f32(kM, kN, kK, -2.0F, a32.data(), kK, b32.data(), kK, c32.data(), kN);
    expect_product(a32, b32, c32, 2e-4);
    const auto a32_t = transposed(a32, kM, kK);
    const auto b32_t = transposed(b32, kN, kK);
    c32.assign(kM * kN, 1.0F);
    table->gemm_tn_f32(kM, kN, kK, -2.0F, a32_t.data(), kM, b32_t.data(), kN, c32.data(), kN);
    expect_product(a32, b32, c32, 2e-4);
    std::vector<double> c(kM * kN, 1.0);
    table->gemm_nt_f64(kM, kN, kK, -2.0, a.data(), kK, b.data(), kK, c.data(), kN);
    expect_product(a, b, c, 1e-11);
    const auto b_t = transposed(b, kN, kK);
    c.assign(kM * kN, 1.0);
    table->gemm_nn_f64(kM, kN, kK, -2.0, a.data(), kK, b_t.data(), kN, c.data(), kN);
    expect_product(a, b, c, 1e-11);

    std::vector<double> factor = random_spd(kK, 5);
    const std::vector<double> expected = naive_cholesky(factor, kK);
    ASSERT_EQ(table->cholesky_f64(kK, factor.data(), kK), -1);
    std::vector<double> inverse = factor;
    table->invert_lower_f64(kK, inverse.data(), kK);
    for (int64_t i = 0; i < kK; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        ASSERT_NEAR(factor[i * kK + j], expected[i * kK + j], 1e-11);
        double identity = 0;
        for (int64_t t = j; t <= i; ++t) identity += factor[i * kK + t] * inverse[t * kK + j];
        ASSERT_NEAR(identity, i == j ? 1.0 : 0.0, 1e-11);
      }
    }
  }
}

TEST(Dense, GemmsMatchNaiveLoops) {
  for (const auto& [m, n, k] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{{0, 3, 4},
                                                                                  {3, 0, 4},
                                                                                  {3, 4, 0},
                                                                                  {1, 1, 1},
                                                                                  {5, 7, 3},
                                                                                  {17, 257, 33},
                                                                                  {300, 129, 65},
                                                                                  {64, 1, 515}}) {
    const std::vector<float> a = random_values<float>(m * (k + 2), 1);  // [m, k], stride k + 2
    const std::vector<float> b = random_values<float>(n * (k + 1), 2);  // [n, k], stride k + 1
    std::vector<float> at(static_cast<size_t>(k * m));
    std::vector<float> bt(static_cast<size_t>(k * n));
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t t = 0; t < k; ++t) at[t * m + i] = a[i * (k + 2) + t];
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t t = 0; t < k; ++t) bt[t * n + j] = b[j * (k + 1) + t];
    }
    const std::vector<float> start = random_values<float>(m * n, 3);
    for (const float beta : {0.0F, 1.0F}) {
      std::vector<float> c = start;
      if (beta == 0.0F) std::fill(c.begin(), c.end(), std::numeric_limits<float>::quiet_NaN());
      gemm_nt(-0.5F, {a.data(), m, k, k + 2}, {b.data(), n, k, k + 1}, beta, {c.data(), m, n}, 2);
      std::vector<float> d = start;
      gemm_tn(-0.5F, {at.data(), k, m}, {bt.data(), k, n}, {d.data(), m, n}, 2);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          double sum = 0;
          for (int64_t t = 0; t < k; ++t) sum += double{a[i * (k + 2) + t]} * b[j * (k + 1) + t];
          const double before = start[i * n + j];
          const double tolerance = 1e-5 * std::sqrt(static_cast<double>(k) + 1);
          ASSERT_NEAR(c[i * n + j], (beta == 0.0F ? 0.0 : before) - 0.5 * sum, tolerance);
          ASSERT_NEAR(d[i * n + j], before - 0.5 * sum, tolerance);
        }
      }
    }
  }
}

TEST(Dense, GramMatchesNaiveLoopAndAddsToTheSum) {
  for (const auto& [tokens, k] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 5}, {1, 1}, {3, 2}, {255, 7}, {256, 129}, {257, 64}, {600, 259}, {9, 600}, {5, 2050}}) {
    const std::vector<float> x = random_values<float>(tokens * (k + 3), 5);
    std::vector<double> sum(static_cast<size_t>(k * k), 0.25);
    accumulate_gram({x.data(), tokens, k, k + 3}, {sum.data(), k, k}, 2);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        double expected = 0.25;
        for (int64_t t = 0; t < tokens; ++t) expected += double{x[t * (k + 3) + i]} * x[t * (k + 3) + j];
        ASSERT_NEAR(sum[i * k + j], expected, 1e-6 * (static_cast<double>(tokens) + 1));
        ASSERT_EQ(sum[i * k + j], sum[j * k + i]);
      }
    }
  }
}

TEST(Dense, CholeskyAndInverseMatchThePlainRecursion) {
  for (const int64_t k : kSizes) {
    const int64_t stride = k + 5;
    const std::vector<double> h = random_spd(k, static_cast<uint64_t>(k));
    // What must not be touched is poisoned.
    std::vector<double> a(static_cast<size_t>(k * stride), std::numeric_limits<double>::quiet_NaN());
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) a[i * stride + j] = h[i * k + j];
    }
    ASSERT_EQ(cholesky_lower({a.data(), k, k, stride}, 2), -1);
    const std::vector<double> expected = naive_cholesky(h, k);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < stride; ++j) {
        if (j <= i) {
          ASSERT_NEAR(a[i * stride + j], expected[i * k + j], 1e-11) << k << " " << i << " " << j;
        } else {
          ASSERT_TRUE(std::isnan(a[i * stride + j])) << k << " " << i << " " << j;
        }
      }
    }
    std::vector<double> inverse = a;
    invert_lower({inverse.data(), k, k, stride}, 2);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < stride; ++j) {
        if (j > i) {
          ASSERT_TRUE(std::isnan(inverse[i * stride + j]));
          continue;
        }
        double product = 0;
        for (int64_t t = j; t <= i; ++t) product += a[i * stride + t] * inverse[t * stride + j];
        ASSERT_NEAR(product, i == j ? 1.0 : 0.0, 1e-11) << k << " " << i << " " << j;
      }
    }
  }
}

TEST(Dense, CholeskyNamesTheFirstBadPivot) {
  for (const int64_t k : {1, 3, 127, 128, 129, 300}) {
    for (const int64_t bad : {int64_t{0}, k / 2, k - 1}) {
      for (const double pivot :
           {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        std::vector<double> a(static_cast<size_t>(k * k), 0.0);
        for (int64_t i = 0; i < k; ++i) a[i * k + i] = i == bad ? pivot : 4.0;
        EXPECT_EQ(cholesky_lower({a.data(), k, k}, 1), bad) << k << " " << pivot;
      }
    }
  }
  // A column that repeats another one: the pivot vanishes (to rounding), here exactly.
  std::vector<double> twin = {4, 4, 4, 4};
  EXPECT_EQ(cholesky_lower({twin.data(), 2, 2}, 1), 1);
}

TEST(Dense, ResultsDoNotDependOnThreads) {
  const int64_t k = 611;
  const std::vector<double> h = random_spd(k, 99);
  const std::vector<float> x = random_values<float>(700 * k, 4);
  std::vector<std::vector<double>> factors;
  std::vector<std::vector<double>> grams;
  std::vector<std::vector<float>> products;
  for (const int threads : {1, 2, 4}) {
    std::vector<double> a = h;
    ASSERT_EQ(cholesky_lower({a.data(), k, k}, threads), -1);
    invert_lower({a.data(), k, k}, threads);
    factors.push_back(a);
    std::vector<double> sum(static_cast<size_t>(k * k), 0.0);
    accumulate_gram({x.data(), 700, k}, {sum.data(), k, k}, threads);
    grams.push_back(sum);
    std::vector<float> c(static_cast<size_t>(k * k), 0.0F);
    gemm_nt(1, {x.data(), k, 600, k}, {x.data() + 7, k, 600, k}, 0, {c.data(), k, k}, threads);
    gemm_tn(1, {x.data(), 700, k}, {x.data(), 700, k}, {c.data(), k, k}, threads);
    products.push_back(c);
  }
  for (size_t i = 1; i < factors.size(); ++i) {
    EXPECT_EQ(0, std::memcmp(factors[0].data(), factors[i].data(), factors[0].size() * sizeof(double)));
    EXPECT_EQ(0, std::memcmp(grams[0].data(), grams[i].data(), grams[0].size() * sizeof(double)));
    EXPECT_EQ(0, std::memcmp(products[0].data(), products[i].data(), products[0].size() * sizeof(float)));
  }
}

TEST(Dense, RefusesSizesThatDoNotFit) {
  std::vector<float> f(100);
  std::vector<double> d(100);
  EXPECT_THROW(gemm_nt(1, {f.data(), 2, 3}, {f.data(), 2, 4}, 0, {f.data(), 2, 2}, 1), InvalidArgument);
  EXPECT_THROW(gemm_nt(1, {f.data(), 2, 3}, {f.data(), 2, 3}, 0.5F, {f.data(), 2, 2}, 1), InvalidArgument);
  EXPECT_THROW(gemm_tn(1, {f.data(), 2, 3}, {f.data(), 3, 3}, {f.data(), 3, 3}, 1), InvalidArgument);
  EXPECT_THROW(accumulate_gram({f.data(), 2, 3}, {d.data(), 4, 4}, 1), InvalidArgument);
  EXPECT_THROW(cholesky_lower({d.data(), 3, 4}, 1), InvalidArgument);
  EXPECT_THROW(invert_lower({d.data(), 3, 4}, 1), InvalidArgument);
}

TEST(Dense, NamesItsInstructionSet) {
  EXPECT_EQ(instruction_set(), tiles().name);
  EXPECT_FALSE(instruction_set().empty());
}

}  // namespace
}  // namespace quantloom::algebra
