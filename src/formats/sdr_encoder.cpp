#include "formats/sdr_encoder.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "formats/grouped.hpp"
#include "formats/row_packing.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// Adding this and subtracting it again rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundingShift = 0x1.8p23F;
constexpr auto kLevels = static_cast<float>((1 << (Sdr::kBaseBits - 1)) - 1);

float nearest_integer(float value) {
  return (value + kRoundingShift) - kRoundingShift;
}

float base_integer(float value, float scale) {
  float steps = value / scale;
  // In this order a NaN becomes -127: the conversion to an integer is always defined.
  steps = steps > -kLevels ? steps : -kLevels;
  steps = steps < kLevels ? steps : kLevels;
  return nearest_integer(steps);
}

// Codes and decoded values of `rows` rows of one column; unit: 2^shift.
void encode_lanes(const float* __restrict value, const float* __restrict scale, const float* __restrict unit,
                  float largest_code, int64_t rows, float* __restrict decoded, uint8_t* __restrict code) {
  for (int64_t r = 0; r < rows; ++r) {
    float cut = nearest_integer(base_integer(value[r], scale[r]) / unit[r]);
    // Beyond the ends if the shift was fitted to other values.
    cut = cut < largest_code ? cut : largest_code;
    cut = cut > -largest_code - 1 ? cut : -largest_code - 1;
    decoded[r] = scale[r] * (cut * unit[r]);
    code[r] = static_cast<uint8_t>(static_cast<int32_t>(cut));
  }
}

class SdrEncoder final : public ColumnEncoder {
 public:
  SdrEncoder(std::shared_ptr<const Format> self, const Sdr& format, int64_t n, int64_t k,
             std::span<const int32_t> group_of_column)
      : self_(std::move(self)),
        format_(format),
        specs_(format.planes(n, k)),
        n_(n),
        k_(k),
        units_(static_cast<size_t>(checked_mul(format.group_count(k), n)), 1.0F),
        codes_(static_cast<size_t>(checked_mul(checked_pad(n, kRowTile), k))) {
    group_of_column_ = permuted_groups(group_of_column, k, group_count(), group_size());
  }

  int64_t columns_per_step() const override { return 1; }
  int64_t group_count() const override { return format_.group_count(k_); }
  int64_t group_size() const override { return format_.columns_per_group(k_); }
  bool parameters_span_rows() const override { return false; }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    const auto rows = static_cast<size_t>(values.cols());
    std::vector<float> largest(rows, 0.0F);
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* value = values.row(c);
      for (size_t r = 0; r < rows; ++r) {
        const float magnitude = std::abs(value[r]);
        largest[r] = magnitude > largest[r] ? magnitude : largest[r];
      }
    }
    float* unit = units_.data() + group * n_ + first_row;
    for (size_t r = 0; r < rows; ++r) {
      const float factor = shrink.empty() ? 1.0F : shrink[r];
      const float q = base_integer(largest[r], format_.row_scales[static_cast<size_t>(first_row) + r]);
      const auto most = static_cast<unsigned>(std::ceil(factor * q));
      unit[r] =
          static_cast<float>(1 << std::max(0, static_cast<int>(std::bit_width(most)) - (format_.bits - 1)));
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t group =
        group_of_column_.empty() ? column / group_size() : group_of_column_[static_cast<size_t>(column)];
    const auto largest_code = static_cast<float>((1 << (format_.bits - 1)) - 1);
    const int64_t end = first_row + values.cols();
    for (int64_t row = first_row; row < end;) {
      const int64_t lane = row % kRowTile;
      const int64_t rows = std::min(kRowTile - lane, end - row);
      encode_lanes(values.row(0) + (row - first_row), format_.row_scales.data() + row,
                   units_.data() + group * n_ + row, largest_code, rows, decoded.row(0) + (row - first_row),
                   codes_.data() + (row / kRowTile * k_ + column) * kRowTile + lane);
      row += rows;
    }
  }

  PackedTensor finish(int threads) override {
    PackedTensor packed{
        std::make_shared<const Sdr>(format_.bits, format_.group_size, format_.scale_dtype), n_, k_, {}};
    for (const PlaneSpec& spec : specs_) {
      if (!spec.optional) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
    Tensor& codes = packed.planes.at("codes");
    const int64_t words = codes.shape()[1];
    uint32_t* code_words = codes.values<uint32_t>().data();
    parallel_for(k_ > 0 ? ceil_div(n_, kRowTile) : 0, threads, [&](int64_t tile) {
      const int64_t first = tile * kRowTile;
      pack_row_tile(codes_.data() + first * k_, k_, format_.bits, std::min(kRowTile, n_ - first),
                    code_words + first * words, words);
    });
    if (n_ > 0 && k_ > 0) pack_parameters(packed);
    if (!group_of_column_.empty()) {
      Tensor index(DType::i32, {k_});
      std::ranges::copy(group_of_column_, index.values<int32_t>().begin());
      packed.planes.emplace("group_index", std::move(index));
    }
    return packed;
  }

 private:
  void pack_parameters(PackedTensor& packed) const {
    const auto shifts = packed.planes.at("shifts").values<uint32_t>();
    const auto shift_words = static_cast<size_t>(packed.planes.at("shifts").shape()[1]);
    std::vector<uint8_t> row_shifts(static_cast<size_t>(group_count()));
    Tensor& scales = packed.planes.at("scales");
    for (int64_t r = 0; r < n_; ++r) {
      for (int64_t g = 0; g < group_count(); ++g) {
        const auto unit = static_cast<unsigned>(units_[static_cast<size_t>(g * n_ + r)]);
        row_shifts[static_cast<size_t>(g)] = static_cast<uint8_t>(std::countr_zero(unit));
      }
      pack_bits(row_shifts, format_.shift_bits(),
                shifts.subspan(static_cast<size_t>(r) * shift_words, shift_words));
      const float scale = format_.row_scales[static_cast<size_t>(r)];
      const auto at = static_cast<size_t>(r);
      if (format_.scale_dtype == DType::f32) {
        scales.values<float>()[at] = scale;
      } else {
        scales.values<uint16_t>()[at] =
            format_.scale_dtype == DType::f16 ? f16_from_float(scale) : bf16_from_float(scale);
      }
    }
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Sdr& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  std::vector<int32_t> group_of_column_;  // empty for consecutive groups
  std::vector<float> units_;              // [groups, n]: 2^shift
  std::vector<uint8_t> codes_;            // [ceil(n / kRowTile), k, kRowTile]
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_sdr_encoder(std::shared_ptr<const Format> self, const Sdr& format,
                                                int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) {
  return std::make_unique<SdrEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
