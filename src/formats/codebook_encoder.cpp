#include "formats/codebook_encoder.hpp"

#include <algorithm>
#include <limits>

#include "formats/grouped_encoder.hpp"

namespace quantloom {
namespace {

// Up to this width every midpoint is compared, which vectorizes; beyond it halving looks at fewer.
constexpr int kLinearBits = 5;

class CodebookEncoder final : public GroupedEncoder {
 public:
  CodebookEncoder(std::shared_ptr<const Format> self, const Codebook& format, int64_t n, int64_t k,
                  std::span<const int32_t> group_of_column)
      : GroupedEncoder(std::move(self), format, n, k, group_of_column, /*wants_mean_magnitude=*/false),
        format_(format),
        largest_magnitude_(format.largest_magnitude()),
        has_zero_(std::binary_search(format.table.begin(), format.table.end(), 0.0F)) {
    // No value lies above the midpoints that follow the last entry.
    midpoints_.fill(std::numeric_limits<float>::infinity());
    for (size_t i = 0; i + 1 < format.table.size(); ++i) {
      midpoints_[i] = (format.table[i] + format.table[i + 1]) / 2;
    }
  }

 private:
  float fit_group(const GroupRange& range, double shrink, int64_t row, int64_t group, int64_t /*at*/,
                  int64_t /*count*/) override {
    const double largest = std::max(-range.low, range.high);
    // A table without 0: take its values as close to it as can be.
    if (largest == 0) return has_zero_ ? 1.0F : smallest_scale(format_.scale_dtype);
    const double wanted = shrink * largest / static_cast<double>(largest_magnitude_);
    const float scale = stored_scale(format_.scale_dtype, wanted);
    require_finite_grid(scale, largest_magnitude_, format_.scale_dtype, wanted, range, row, group);
    return scale;
  }

  void encode_lanes(const float* value, int64_t at, int64_t rows, float* decoded,
                    uint8_t* code) const override {
    const float* scale = scales_at(at);
    std::array<float, kRowTile> steps{};
    for (int64_t r = 0; r < rows; ++r) steps[r] = value[r] / scale[r];
    // Counts midpoints below. A NaN is above none.
    std::array<int32_t, kRowTile> index{};
    if (format_.bits <= kLinearBits) {
      for (size_t i = 0; i + 1 < format_.table.size(); ++i) {
        const float midpoint = midpoints_[i];
        for (int64_t r = 0; r < kRowTile; ++r) index[r] += steps[r] > midpoint ? 1 : 0;
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        int32_t found = 0;
        for (int32_t half = 1 << (format_.bits - 1); half > 0; half /= 2) {
          found += steps[r] > midpoints_[static_cast<size_t>(found + half - 1)] ? half : 0;
        }
        index[r] = found;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      decoded[r] = scale[r] * format_.table[static_cast<size_t>(index[r])];
      code[r] = static_cast<uint8_t>(index[r]);
    }
  }

  void finish_planes(PackedTensor& packed) const override {
    const auto plane = packed.planes.at("codebook").values<uint16_t>();
    std::transform(format_.table.begin(), format_.table.end(), plane.begin(), f16_from_float);
  }

  const Codebook& format_;
  float largest_magnitude_;
  bool has_zero_;
  std::array<float, 256> midpoints_{};
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_codebook_encoder(std::shared_ptr<const Format> self,
                                                     const Codebook& format, int64_t n, int64_t k,
                                                     std::span<const int32_t> group_of_column) {
  return std::make_unique<CodebookEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
