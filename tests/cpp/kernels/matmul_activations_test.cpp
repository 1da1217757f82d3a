// Products with rounded activations against activations rounded, decoded and multiplied in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/hwy_targets.hpp"
#include "kernels/random_packed.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::random_packed;

std::vector<float> activations_for(int64_t m, int64_t k, uint64_t seed) {
  std::vector<float> x = testing::normal_values(m * k, seed);
  for (int64_t i = 0; i < m * k; ++i) {
    if (k > 0 && i % k == k / 2) x[static_cast<size_t>(i)] *= 30;
    x[static_cast<size_t>(i)] += 0.3F;  // so that asymmetric grids differ
  }
  return x;
}

std::vector<float> product(const std::vector<float>& x, int64_t m, const PreparedTensor& w,
                           const ActivationFormat& format, int threads) {
  std::vector<float> y(static_cast<size_t>(m * w.n()), std::numeric_limits<float>::quiet_NaN());
  matmul(MatrixView<const float>(x.data(), m, w.k()), w, {y.data(), m, w.n()}, format, threads);
  return y;
}

// y, and for each of its entries the sum of magnitudes that rounding errors grow with.
void expect_near_reference(const std::vector<float>& x, int64_t m, const PackedTensor& packed,
                           const ActivationFormat& format, const std::vector<float>& y,
                           const std::string& what) {
  const int64_t k = packed.k;
  std::vector<float> rounded(x.size());
  round_activations(MatrixView<const float>(x.data(), m, k), format, {rounded.data(), m, k}, 1);
  const std::vector<float> weights = testing::decoded_values(packed);
  for (int64_t t = 0; t < m; ++t) {
    float largest = 0;
    for (int64_t j = 0; j < k; ++j)
      largest = std::max(largest, std::abs(rounded[static_cast<size_t>(t * k + j)]));
    for (int64_t r = 0; r < packed.n; ++r) {
      double sum = 0;
      double magnitudes = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double weight = weights[static_cast<size_t>(r * k + j)];
        sum += weight * rounded[static_cast<size_t>(t * k + j)];
        magnitudes += std::abs(weight) * largest;
      }
      const double bound = 0x1p-24 * static_cast<double>(8 + ceil_div(k, 16)) * 2 * magnitudes;
      const double error = std::abs(sum - y[static_cast<size_t>(t * packed.n + r)]);
      ASSERT_LE(error, bound) << what << " token " << t << " row " << r;
    }
  }
}

struct Case {
  int64_t n, k, m;
  Uniform weights;
  const char* activations;
  bool integer;
  bool group_index = false;
};

TEST(MatmulActivations, IntegersEqualRoundedValues) {
  using U = Uniform;
  const std::vector<Case> cases = {
      {16, 128, 1, U(8, U::kPerChannel), "int8:token", true},
      {37, 300, 3, U(8, U::kPerChannel), "int8:token", true},
      {37, 301, 9, U(4, 128), "int8:token", true},
      {5, 77, 4, U(4, 24), "int8:token:asym", true},
      {64, 640, 17, U(4, 128, false), "int8:token:asym", true},
      {33, 257, 8, U(3, 64, false), "int8:tensor", true},
      {33, 256, 8, U(8, U::kPerTensor, false), "int8:tensor:asym", true},
      {20, 512, 5, U(8, U::kPerChannel), "int8:tensor:static=0.1", true},
      {20, 200, 5, U(6, U::kPerChannel, false), "int6:tensor:asym:static=0.2,-11", true},
      {48, 384, 6, U(4, 128), "int4:g128", true},
      {48, 384, 6, U(4, 128, false), "int4:g128:asym", true},
      {48, 400, 6, U(4, U::kPerChannel), "int4:g32:asym", true},
      {48, 384, 6, U(4, 96), "int4:g16", true},
      {48, 384, 6, U(2, 64), "int4:g64:asym", true},
      {31, 384, 600, U(4, 64), "int8:g192", true},
      {31, 384, 6, U(3, U::kPerChannel), "int4:g16", false},  // steps of 32 columns
      {31, 384, 6, U(4, U::kPerChannel), "int4:g24", false},
      {31, 120, 6, U(4, 40), "int4:g40:asym", true},  // padded to whole steps
      {31, 120, 6, U(4, 40), "int4:g60:asym", false},
      {31, 120, 6, U(4, 24), "int4:g24", true},
      {40, 256, 7, U(8, U::kPerChannel), "sdr4:g16:b16", true},
      {40, 256, 7, U(4, 128), "sdr4:g32", true},
      {40, 256, 7, U(4, 128), "sdr4:g8", false},
      {40, 256, 7, U(4, 32), "int8:token:asym", true, true},  // columns of groups scattered
      {40, 256, 7, U(4, 32), "int8:g32", false, true},
      {40, 256, 7, U(8, U::kPerChannel), "int8:token:outliers=9", true},
      {37, 300, 9, U(4, 128, false), "int8:token:asym:outliers=9:columns=0,129,299", true},
      {40, 256, 7, U(4, 32), "int4:g32:outliers=6", true},
      {40, 250, 7, U(3, 24, false), "int8:token:outliers=5", true},
      {40, 256, 7, U(4, 32, false), "int8:token:outliers=9", true, true},
      {40, 256, 7, U(1, U::kPerTensor), "int8:tensor:outliers=9:columns=128", true},
      {40, 256, 7, U(4, 128), "int4:g24:outliers=9", false},
      {1, 1, 1, U(1, 16), "int8:token", true},
      {3, 16, 0, U(4, 16), "int8:token", true},
      {3, 0, 2, U(4, 16), "int8:token:asym", true},
      {0, 16, 2, U(4, 16), "int8:g16:asym", true},
  };
  uint64_t seed = 7;
  for (const Case& c : cases) {
    const std::string what = text_of(c.n, "x", c.k, " m ", c.m, " ", c.weights.spec(), " ", c.activations);
    const PackedTensor packed = random_packed(c.n, c.k, c.weights, ++seed, c.group_index);
    const auto prepared = prepare(packed, 1);
    const ActivationFormat format = activation_format_from_spec(c.activations);
    EXPECT_EQ(matmul_is_integer(*prepared, format), c.integer) << what;
    const std::vector<float> x = activations_for(c.m, c.k, seed);
    const std::vector<float> y = product(x, c.m, *prepared, format, 1);
    expect_near_reference(x, c.m, packed, format, y, what);
    for (const int threads : {2, 4}) {
      const std::vector<float> again = product(x, c.m, *prepared, format, threads);
      EXPECT_TRUE(y.empty() || std::memcmp(y.data(), again.data(), 4 * y.size()) == 0) << what;
    }
    if (!c.integer || c.m > 20) continue;
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      hwy::SetSupportedTargetsForTest(target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      const std::vector<float> again = product(x, c.m, *prepared, format, 1);
      EXPECT_TRUE(y.empty() || std::memcmp(y.data(), again.data(), 4 * y.size()) == 0)
          << what << " " << hwy::TargetName(target);
    }
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
}

TEST(MatmulActivations, OtherFormatsMultiplyRoundedValues) {
  const int64_t n = 24;
  const int64_t k = 96;
  const int64_t m = 5;
  const std::vector<float> w = testing::normal_values(n * k, 3);
  const std::vector<float> x = activations_for(m, k, 4);
  for (const char* spec : {"codebook:nf4:g32", "spqr:3:g16:s3:z3:b16", "bcq:3:g32",
                           "vector_codebook:16x2:g32", "outliers:1%:uniform:4:g32", "uniform:5:g32:asym"}) {
    const PackedTensor packed =
        round_nearest(MatrixView<const float>(w.data(), n, k), format_from_spec(spec), {}).tensor;
    for (const char* activations : {"int8:token", "int4:g16:asym", "sdr4:g16:b16"}) {
      const ActivationFormat format = activation_format_from_spec(activations);
      const std::vector<float> y = product(x, m, *prepare(packed), format, 1);
      expect_near_reference(x, m, packed, format, y, text_of(spec, " ", activations));
    }
  }
}

TEST(MatmulActivations, TokensDoNotDependOnTheirBatch) {
  const int64_t k = 256;
  const int64_t m = 19;
  const PackedTensor packed = random_packed(40, k, Uniform(4, 64, false), 3, false);
  const auto prepared = prepare(packed);
  std::vector<float> x = activations_for(m, k, 9);
  for (int64_t j = 0; j < k; ++j) x[static_cast<size_t>(4 * k + j)] *= 1000;  // a neighbour with outliers
  for (const char* spec : {"int8:token", "int8:token:asym", "int4:g32:asym", "sdr4:g16:b16",
                           "int8:tensor:asym:static=0.05,-9", "int8:token:outliers=6:columns=3,128,200"}) {
    const ActivationFormat format = activation_format_from_spec(spec);
    const std::vector<float> all = product(x, m, *prepared, format, 2);
    for (int64_t t = 0; t < m; ++t) {
      const std::vector<float> token(x.begin() + t * k, x.begin() + (t + 1) * k);
      const std::vector<float> alone = product(token, 1, *prepared, format, 1);
      EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * 40, 40 * sizeof(float)), 0) << spec << " " << t;
    }
  }
}

TEST(MatmulActivations, RefuseBadInputBeforeWriting) {
  const auto prepared = prepare(random_packed(8, 32, Uniform(4, 16), 3, false));
  std::vector<float> x(64, 1.0F);
  std::vector<float> y(16, 7.0F);
  const MatrixView<float> out(y.data(), 2, 8);
  x[40] = std::numeric_limits<float>::quiet_NaN();
  const MatrixView<const float> in(x.data(), 2, 32);
  for (const char* spec : {"int8:token", "int4:g5"}) {
    EXPECT_THROW(matmul(in, *prepared, out, activation_format_from_spec(spec)), NumericError);
  }
  EXPECT_THROW(matmul(in, *prepared, out, activation_format_from_spec("int8:tensor:static")),
               InvalidArgument);
  EXPECT_THROW(matmul(in, *prepared, out, ActivationFormat{.bits = 1}), InvalidArgument);
  EXPECT_THROW(matmul(in, *prepared, {y.data(), 2, 7}, ActivationFormat{}), InvalidArgument);
  EXPECT_EQ(y, std::vector<float>(16, 7.0F));
}

}  // namespace
}  // namespace quantloom
