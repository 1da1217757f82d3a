#include "formats/uniform_encoder.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "formats/grouped_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

// Adding this and subtracting it again rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundingShift = 0x1.8p23F;

// Codes and decoded values of up to kRowTile rows of one column.
void encode_steps(const float* __restrict value, const float* __restrict scale, const float* __restrict zero,
                  float largest_code, int64_t rows, float* __restrict decoded, uint8_t* __restrict code) {
  for (int64_t r = 0; r < rows; ++r) {
    const float low = -zero[r];
    const float high = largest_code - zero[r];
    float steps = value[r] / scale[r];
    // In this order a NaN becomes `low`: the conversion to an integer below is always defined.
    steps = steps > low ? steps : low;
    steps = steps < high ? steps : high;
    const float level = (steps + kRoundingShift) - kRoundingShift;
    decoded[r] = scale[r] * level;
    code[r] = static_cast<uint8_t>(static_cast<int32_t>(level + zero[r]));
  }
}

// One bit, symmetric: the sign decides.
void encode_signs(const float* __restrict value, const float* __restrict scale, int64_t rows,
                  float* __restrict decoded, uint8_t* __restrict code) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool positive = value[r] >= 0;
    decoded[r] = scale[r] * (positive ? 0.5F : -0.5F);
    code[r] = positive ? 1 : 0;
  }
}

class UniformEncoder final : public GroupedEncoder {
 public:
  UniformEncoder(std::shared_ptr<const Format> self, const Uniform& format, int64_t n, int64_t k,
                 std::span<const int32_t> group_of_column)
      : GroupedEncoder(std::move(self), format, n, k, group_of_column, format.symmetric && format.bits == 1),
        format_(format),
        levels_(static_cast<float>((1 << format.bits) - 1)),
        zeros_(parameter_count(), format.symmetric ? format.symmetric_zero_point() : 0.0F) {}

 private:
  float fit_group(const GroupRange& range, double shrink, int64_t row, int64_t group, int64_t at,
                  int64_t count) override {
    const double largest = std::max(-range.low, range.high);
    if (largest == 0) {
      if (!format_.symmetric) std::fill_n(zeros_.begin() + at, count, 0.0F);
      // The one-bit symmetric grid has no zero: take its values as close to it as can be.
      return format_.symmetric && format_.bits == 1 ? smallest_scale(format_.scale_dtype) : 1.0F;
    }
    const double levels = levels_;
    double span = shrink * (range.high - range.low);
    if (format_.symmetric) span = shrink * 2 * (format_.bits == 1 ? range.mean_magnitude : largest);
    const double wanted = span / levels;
    const float scale = stored_scale(format_.scale_dtype, wanted);
    float zero = format_.symmetric_zero_point();
    if (!format_.symmetric) {
      const double nearest = std::nearbyint(-shrink * range.low / static_cast<double>(scale));
      zero = static_cast<float>(std::clamp(nearest, 0.0, levels));
      std::fill_n(zeros_.begin() + at, count, zero);
    }
    require_finite_grid(scale, std::max(zero, levels_ - zero), format_.scale_dtype, wanted, range, row,
                        group);
    return scale;
  }

  void encode_lanes(const float* value, int64_t at, int64_t rows, float* decoded,
                    uint8_t* code) const override {
    if (format_.symmetric && format_.bits == 1) {
      encode_signs(value, scales_at(at), rows, decoded, code);
    } else {
      encode_steps(value, scales_at(at), zeros_.data() + at, levels_, rows, decoded, code);
    }
  }

  void finish_planes(PackedTensor& packed) const override {
    if (format_.symmetric) return;
    Tensor& plane = packed.planes.at("zeros");
    if (plane.element_count() == 0) return;
    const int64_t count = per_tensor() ? 1 : rows();
    const int64_t words = plane.shape()[1];
    std::vector<uint8_t> zeros(static_cast<size_t>(count));
    for (int64_t g = 0; g < groups(); ++g) {
      for (int64_t r = 0; r < count; ++r) zeros[r] = static_cast<uint8_t>(zeros_[g * rows() + r]);
      pack_bits(zeros, format_.bits,
                plane.values<uint32_t>().subspan(static_cast<size_t>(g * words), static_cast<size_t>(words)));
    }
  }

  const Uniform& format_;
  float levels_;              // the largest code
  std::vector<float> zeros_;  // integers, or 0.5
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_uniform_encoder(std::shared_ptr<const Format> self, const Uniform& format,
                                                    int64_t n, int64_t k,
                                                    std::span<const int32_t> group_of_column) {
  return std::make_unique<UniformEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
