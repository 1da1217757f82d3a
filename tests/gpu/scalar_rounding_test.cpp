// The arithmetic that the device shares with the host, against the CPU's encoder. Needs no device.
#include "formats/scalar_rounding.cuh"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "quantloom/error.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

constexpr int64_t kColumns = 37;

float scale_of(const Tensor& plane) {
  if (plane.dtype() == DType::f32) return plane.values<float>()[0];
  const uint16_t bits = plane.values<uint16_t>()[0];
  return plane.dtype() == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

ValueRange range_of(const std::vector<float>& values) {
  ValueRange range;
  for (const float value : values) {
    range.low = std::min(range.low, static_cast<double>(value));
    range.high = std::max(range.high, static_cast<double>(value));
    range.mean_magnitude += std::abs(value);
  }
  range.mean_magnitude /= static_cast<double>(values.size());
  return range;
}

// Fits and encodes `values` as one group with both; the results must be the same bits.
void expect_same(const Uniform& format, const std::vector<float>& values, float shrink) {
  const auto shared = std::make_shared<const Uniform>(format);
  const auto encoder = shared->column_encoder(shared, 1, kColumns, {});
  std::vector<float> copy = values;
  const MatrixView<float> columns(copy.data(), kColumns, 1);
  ScalarGrid grid;
  grid.bits = format.bits;
  grid.symmetric = format.symmetric;
  grid.scale_dtype = format.scale_dtype;
  const GroupFit fit = fit_grid(grid, range_of(values), static_cast<double>(shrink));
  const std::vector<float> factor = {shrink};
  if (!fit.finite) {
    EXPECT_THROW(encoder->fit(0, 0, columns, factor), NumericError);
    return;
  }
  encoder->fit(0, 0, columns, factor);
  std::vector<float> decoded(static_cast<size_t>(kColumns));
  for (int64_t c = 0; c < kColumns; ++c) {
    encoder->encode(c, 0, columns.block(c, 0, 1, 1),
                    MatrixView<float>(&decoded[static_cast<size_t>(c)], 1, 1));
  }
  const PackedTensor packed = encoder->finish();
  ASSERT_EQ(fit.scale, scale_of(packed.plane("scales"))) << format.spec();
  std::vector<uint8_t> codes(static_cast<size_t>(kColumns));
  const Tensor& code_plane = packed.plane("codes");
  unpack_bits(code_plane.values<uint32_t>(), format.bits, 0, codes);
  if (!format.symmetric) {
    std::vector<uint8_t> zero(1);
    const Tensor& zero_plane = packed.plane("zeros");
    unpack_bits(zero_plane.values<uint32_t>(), format.bits, 0, zero);
    ASSERT_EQ(fit.zero, static_cast<float>(zero[0])) << format.spec();
  }
  for (size_t c = 0; c < values.size(); ++c) {
    const EncodedValue encoded = encode_value(grid, values[c], fit.scale, fit.zero);
    ASSERT_EQ(encoded.code, codes[c]) << format.spec() << " value " << values[c];
    ASSERT_EQ(std::bit_cast<uint32_t>(encoded.decoded), std::bit_cast<uint32_t>(decoded[c])) << format.spec();
  }
}

TEST(ScalarRounding, FitsAndEncodesAsTheCpu) {
  const CounterRandom random(20);
  uint64_t draw = 0;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        const Uniform format(bits, Uniform::kPerChannel, symmetric, dtype);
        // From below the smallest subnormal of float16 to beyond its range, and close to float32's.
        for (const double exponent : {-140.0, -126.0, -40.0, -20.0, -3.0, 0.0, 9.0, 17.0, 126.0}) {
          for (const double shift : {0.0, 1.0, -3.0}) {
            std::vector<float> values(static_cast<size_t>(kColumns));
            for (float& value : values) {
              value = static_cast<float>((random.normal(draw++) + shift) * std::exp2(exponent) * 0.25);
            }
            for (const float shrink : {1.0F, 0.73F, 0.4F}) expect_same(format, values, shrink);
          }
        }
        expect_same(format, std::vector<float>(static_cast<size_t>(kColumns), 0.0F), 1.0F);
        expect_same(format, std::vector<float>(static_cast<size_t>(kColumns), -0.0F), 0.5F);
      }
    }
  }
}

// Values on the middle between two codes go to the even one.
TEST(ScalarRounding, RoundsTiesAsTheCpu) {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      std::vector<float> values;
      for (int64_t c = 0; c < kColumns; ++c) values.push_back(0.5F * static_cast<float>(c % 7 - 3));
      values[0] = static_cast<float>((1 << bits) - 1) * 0.5F;  // a scale of 1 for the symmetric grid
      expect_same(Uniform(bits, Uniform::kPerChannel, symmetric, DType::f32), values, 1.0F);
    }
  }
}

}  // namespace
}  // namespace quantloom::cuda
