#include "quantloom/activations/quantized_activations.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "quantloom/error.hpp"
#include "simd_targets.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

const std::vector<const char*> kSpecs = {"int8:token",
                                         "int8:token:asym",
                                         "int8:tensor",
                                         "int8:tensor:asym",
                                         "int6:token",
                                         "int6:token:asym",
                                         "int4:token",
                                         "int4:tensor:asym",
                                         "int4:g128",
                                         "int4:g128:asym",
                                         "int8:g32:asym",
                                         "int6:g7",
                                         "int2:g5:asym",
                                         "int8:token:outliers=20",
                                         "int4:token:asym:outliers=3:columns=0",
                                         "int8:tensor:outliers=9",
                                         "int4:g16:asym:outliers=40",
                                         "int8:tensor:static=0.05:outliers=2:columns=",
                                         "int8:tensor:static=0.02",
                                         "int4:tensor:asym:static=0.3,-3",
                                         "sdr4:g16",
                                         "sdr4:g16:b16",
                                         "sdr3:g8:b8",
                                         "sdr4:g5:b16:tensor",
                                         "sdr7:g32:b8:token",
                                         "sdr2:g16:b16:tensor:static=0.0001"};

std::vector<float> values_for(int64_t m, int64_t k, uint64_t seed) {
  std::vector<float> values = testing::normal_values(m * k, seed);
  // Tokens of other sizes, an outlier channel, a token of zeros, one without negative values.
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      float& value = values[static_cast<size_t>(t * k + j)];
      value *= std::ldexp(1.0F, static_cast<int>(t % 5) - 2);
      if (j == k / 3) value *= 60;
      if (t % 7 == 3) value = 0;
      if (t % 7 == 4) value = std::abs(value);
    }
  }
  return values;
}

void expect_same(const QuantizedActivations& a, const QuantizedActivations& b, const char* what) {
  ASSERT_EQ(a.planes.size(), b.planes.size()) << what;
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.planes.at(name);
    ASSERT_EQ(plane.shape(), other.shape()) << what << " " << name;
    ASSERT_EQ(plane.dtype(), other.dtype()) << what << " " << name;
    EXPECT_EQ(std::memcmp(plane.bytes(), other.bytes(), static_cast<size_t>(plane.byte_count())), 0)
        << what << " " << name;
  }
}

TEST(QuantizedActivations, EqualTheReferenceOnEveryInstructionSet) {
  for (const auto& [m, k] :
       {std::pair<int64_t, int64_t>{0, 5}, {3, 0}, {1, 1}, {9, 131}, {17, 300}, {4, 1024}}) {
    const std::vector<float> values = values_for(m, k, static_cast<uint64_t>(31 * m + k));
    const MatrixView<const float> x(values.data(), m, k);
    for (const char* spec : kSpecs) {
      const ActivationFormat format = activation_format_from_spec(spec);
      if (k == 0 && format.outlier_columns && !format.outlier_columns->empty()) {
        EXPECT_THROW(quantize_activations(x, format), InvalidArgument);
        continue;
      }
      const QuantizedActivations expected = quantize_activations_reference(x, format);
      for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
        hwy::SetSupportedTargetsForTest(target);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        expect_same(quantize_activations(x, format, 1), expected, spec);
      }
      hwy::SetSupportedTargetsForTest(0);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      for (const int threads : {2, 4}) expect_same(quantize_activations(x, format, threads), expected, spec);
    }
  }
}

TEST(QuantizedActivations, RoundingIsTheIntegersDecodedBitForBit) {
  for (const auto& [m, k] : {std::pair<int64_t, int64_t>{0, 3}, {2, 0}, {11, 203}, {8, 256}}) {
    std::vector<float> values = values_for(m, k, static_cast<uint64_t>(m + k));
    const MatrixView<float> x(values.data(), m, k);
    for (const char* spec : kSpecs) {
      const ActivationFormat format = activation_format_from_spec(spec);
      if (k == 0 && format.outlier_columns && !format.outlier_columns->empty()) continue;
      std::vector<float> decoded(values.size());
      dequantize_activations(quantize_activations(x, format), {decoded.data(), m, k});
      std::vector<float> rounded(values.size());
      round_activations(x, format, {rounded.data(), m, k}, 2);
      if (values.empty()) continue;
      EXPECT_EQ(std::memcmp(decoded.data(), rounded.data(), decoded.size() * sizeof(float)), 0) << spec;
      std::vector<float> in_place = values;
      const MatrixView<float> same(in_place.data(), m, k);
      round_activations(same, format, same, 2);
      EXPECT_EQ(std::memcmp(decoded.data(), in_place.data(), decoded.size() * sizeof(float)), 0) << spec;
    }
  }
}

TEST(QuantizedActivations, ErrAtMostHalfAStep) {
  const int64_t m = 6;
  const int64_t k = 200;
  const std::vector<float> values = values_for(m, k, 5);
  for (const char* spec : {"int8:token", "int4:token:asym", "int6:g50", "int8:tensor:asym"}) {
    const QuantizedActivations q =
        quantize_activations(MatrixView<const float>(values.data(), m, k), activation_format_from_spec(spec));
    std::vector<float> decoded(values.size());
    dequantize_activations(q, {decoded.data(), m, k});
    const auto scales = q.planes.at("scales").values<float>();
    for (int64_t i = 0; i < m * k; ++i) {
      const int64_t row = q.planes.at("scales").shape()[0] == 1 ? 0 : i / k;
      const int64_t groups = q.planes.at("scales").shape()[1];
      const float scale = scales[static_cast<size_t>(row * groups + (groups > 1 ? i % k / 50 : 0))];
      const float error = std::abs(decoded[static_cast<size_t>(i)] - values[static_cast<size_t>(i)]);
      // Of an asymmetric grid the zero point is rounded too, so that an end may lie half a step further in.
      EXPECT_LE(error, scale * (q.format.symmetric ? 0.5001F : 1.0001F)) << spec << " " << i;
    }
  }
}

TEST(QuantizedActivations, TakeHalfPrecision) {
  const std::vector<float> values = values_for(3, 40, 2);
  std::vector<uint16_t> halves;
  std::vector<float> widened;
  for (const float value : values) {
    halves.push_back(bf16_from_float(value));
    widened.push_back(float_from_bf16(halves.back()));
  }
  const ActivationFormat format = activation_format_from_spec("int8:g16");
  expect_same(quantize_activations(FloatMatrix(halves.data(), DType::bf16, 3, 40, 40), format),
              quantize_activations(MatrixView<const float>(widened.data(), 3, 40), format), "bf16");
}

TEST(QuantizedActivations, ExtremesStayFinite) {
  std::vector<float> values = {0x1p126F,  -0x1.8p126F, 1.0F,      -1.0F,  // large beside small
                               0x1p-149F, -0x1p-140F,  0x1p-130F, 0.0F,   // subnormal
                               1.0F,      1.0F,        1.0F,      1.0F};  // constant
  for (const char* spec : kSpecs) {
    std::vector<float> rounded(values.size());
    round_activations(MatrixView<const float>(values.data(), 3, 4), activation_format_from_spec(spec),
                      {rounded.data(), 3, 4});
    for (const float value : rounded) EXPECT_TRUE(std::isfinite(value)) << spec;
  }
}

TEST(QuantizedActivations, RefuseBadNumbersBeforeWriting) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), 0x1p127F}) {
    std::vector<float> values(5 * 20, 1.0F);
    values[3 * 20 + 17] = bad;
    const MatrixView<const float> x(values.data(), 5, 20);
    for (const char* spec : {"int8:token", "int8:tensor:static=1", "int4:g16", "sdr4:g16"}) {
      const ActivationFormat format = activation_format_from_spec(spec);
      std::vector<float> out(values.size(), 7.0F);
      try {
        round_activations(x, format, {out.data(), 5, 20});
        FAIL() << spec;
      } catch (const NumericError& error) {
        EXPECT_NE(std::string(error.what()).find("token 3, input 17"), std::string::npos) << error.what();
      }
      EXPECT_EQ(out, std::vector<float>(values.size(), 7.0F));
      EXPECT_THROW(quantize_activations(x, format), NumericError);
    }
  }
  const std::vector<float> values(4, 1.0F);
  const MatrixView<const float> x(values.data(), 2, 2);
  EXPECT_THROW(quantize_activations(x, activation_format_from_spec("int8:tensor:static")), InvalidArgument);
  std::vector<float> out(6);
  EXPECT_THROW(round_activations(x, {}, {out.data(), 2, 3}), InvalidArgument);
}

TEST(QuantizedActivations, StaticGridsAreThoseOfTheirRange) {
  const std::vector<float> values = values_for(9, 64, 8);
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  const MatrixView<const float> x(values.data(), 9, 64);
  for (const char* scope : {"int8:tensor", "int4:tensor:asym", "sdr4:g16:b16:tensor"}) {
    const ActivationFormat fixed =
        with_range(activation_format_from_spec(std::string(scope) + ":static"), *low, *high);
    const QuantizedActivations by_batch = quantize_activations(x, activation_format_from_spec(scope));
    const QuantizedActivations by_range = quantize_activations(x, fixed);
    expect_same(by_range, by_batch, scope);
    // A token alone gets the same codes.
    const QuantizedActivations alone =
        quantize_activations(MatrixView<const float>(values.data() + 64, 1, 64), fixed);
    EXPECT_EQ(std::memcmp(alone.planes.at("codes").bytes(), by_batch.planes.at("codes").bytes() + 64, 64), 0);
  }
}

}  // namespace
}  // namespace quantloom
