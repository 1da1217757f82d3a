#include "formats/uniform_encoder.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "formats/row_packing.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// The smallest scale that is stored: its inverse stays finite in float32.
float smallest_scale(DType dtype) {
  return dtype == DType::f16 ? 0x1p-24F : 0x1p-126F;
}

float round_to(DType dtype, float value) {
  if (dtype == DType::f16) return float_from_f16(f16_from_float(value));
  if (dtype == DType::bf16) return float_from_bf16(bf16_from_float(value));
  return value;
}

// The range of a group's values, as far as the fit needs it.
struct GroupRange {
  double low = 0;   // min(0, smallest value)
  double high = 0;  // max(0, largest value)
  double mean_magnitude = 0;
};

struct GroupParameters {
  float scale = 1;
  float zero = 0;
};

GroupParameters fit_group(const Uniform& format, const GroupRange& range, double shrink, int64_t row,
                          int64_t group) {
  const double levels = (1 << format.bits) - 1;
  const double largest = std::max(-range.low, range.high);
  if (largest == 0) {
    // The one-bit symmetric grid has no zero: take its values as close to it as can be.
    if (format.symmetric && format.bits == 1) return {smallest_scale(format.scale_dtype), 0.5F};
    return {1.0F, format.symmetric ? format.symmetric_zero_point() : 0.0F};
  }
  double span = shrink * (range.high - range.low);
  if (format.symmetric) span = shrink * 2 * (format.bits == 1 ? range.mean_magnitude : largest);
  const double wanted = span / levels;
  // Beyond float32's range the cast would be undefined; 2^127 is refused below all the same.
  const float rounded = round_to(format.scale_dtype, static_cast<float>(std::min(wanted, 0x1p127)));
  const float scale = std::max(rounded, smallest_scale(format.scale_dtype));
  GroupParameters fitted{scale, format.symmetric_zero_point()};
  if (!format.symmetric) {
    const double zero = std::nearbyint(-shrink * range.low / static_cast<double>(scale));
    fitted.zero = static_cast<float>(std::clamp(zero, 0.0, levels));
  }
  // The ends of the grid have to be finite too.
  const float outermost = std::max(fitted.zero, static_cast<float>(levels) - fitted.zero);
  if (!std::isfinite(scale * outermost)) {
    throw NumericError(text_of("scale of row ", row, ", group ", group, ": got ", wanted, " for values from ",
                               range.low, " to ", range.high, ", expected a grid that stays finite in ",
                               format.scale_dtype == DType::f16
                                   ? "float16 (at most 65504); store the scales as bfloat16 or float32"
                                   : "float32; divide the weights first"));
  }
  return fitted;
}

// Adding this and subtracting it again rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundingShift = 0x1.8p23F;

// Codes and decoded values of up to kRowTile rows of one column.
void encode_lanes(const float* __restrict value, const float* __restrict scale, const float* __restrict zero,
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
void encode_sign_lanes(const float* __restrict value, const float* __restrict scale, int64_t rows,
                       float* __restrict decoded, uint8_t* __restrict code) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool positive = value[r] >= 0;
    decoded[r] = scale[r] * (positive ? 0.5F : -0.5F);
    code[r] = positive ? 1 : 0;
  }
}

class UniformEncoder final : public ColumnEncoder {
 public:
  UniformEncoder(std::shared_ptr<const Format> self, const Uniform& format, int64_t n, int64_t k,
                 std::span<const int32_t> group_of_column)
      : self_(std::move(self)),
        format_(format),
        specs_(format.planes(n, k)),
        n_(n),
        k_(k),
        per_tensor_(format.group_size == Uniform::kPerTensor),
        groups_(per_tensor_ ? 1 : format.group_count(k)),
        group_size_(std::min(format.columns_per_group(k), std::max<int64_t>(k, 1))) {
    if (!group_of_column.empty()) {
      if (static_cast<int64_t>(group_of_column.size()) != k) {
        throw InvalidArgument("group_of_column", text_of(group_of_column.size(), " entries"),
                              text_of(k, ", one for each column"));
      }
      require_group_index(group_of_column, groups_, group_size_, "group_of_column");
      bool consecutive = true;
      for (int64_t c = 0; c < k; ++c) consecutive = consecutive && group_of_column[c] == c / group_size_;
      if (!consecutive) group_of_column_.assign(group_of_column.begin(), group_of_column.end());
    }
    const auto parameters = static_cast<size_t>(per_tensor_ ? kRowTile : checked_mul(groups_, n));
    scales_.assign(parameters, 1.0F);
    zeros_.assign(parameters, format.symmetric ? format.symmetric_zero_point() : 0.0F);
    codes_.resize(static_cast<size_t>(checked_mul(checked_pad(n, kRowTile), k)));
  }

  int64_t columns_per_step() const override { return 1; }
  int64_t group_count() const override { return groups_; }
  int64_t group_size() const override { return group_size_; }
  bool parameters_span_rows() const override { return per_tensor_; }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    const int64_t rows = values.cols();
    GroupRange whole;
    for (int64_t tile = 0; tile < rows; tile += kRowTile) {
      const int64_t lanes = std::min(kRowTile, rows - tile);
      std::array<GroupRange, kRowTile> ranges = ranges_of(values.block(0, tile, values.rows(), lanes));
      for (int64_t r = 0; r < lanes; ++r) {
        if (per_tensor_) {
          whole.low = std::min(whole.low, ranges[r].low);
          whole.high = std::max(whole.high, ranges[r].high);
          whole.mean_magnitude += ranges[r].mean_magnitude / static_cast<double>(rows);
          continue;
        }
        const int64_t row = first_row + tile + r;
        const double factor = shrink.empty() ? 1.0 : shrink[static_cast<size_t>(tile + r)];
        const GroupParameters fitted = fit_group(format_, ranges[r], factor, row, group);
        scales_[group * n_ + row] = fitted.scale;
        zeros_[group * n_ + row] = fitted.zero;
      }
    }
    if (per_tensor_) {
      const GroupParameters fitted = fit_group(format_, whole, shrink.empty() ? 1.0 : shrink[0], 0, 0);
      std::fill(scales_.begin(), scales_.end(), fitted.scale);
      std::fill(zeros_.begin(), zeros_.end(), fitted.zero);
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t group = group_of(column);
    const auto largest_code = static_cast<float>((1 << format_.bits) - 1);
    const int64_t end = first_row + values.cols();
    for (int64_t row = first_row; row < end;) {
      const int64_t lane = row % kRowTile;
      const int64_t rows = std::min(kRowTile - lane, end - row);
      const int64_t parameters = per_tensor_ ? 0 : group * n_ + row;
      const float* value = values.row(0) + (row - first_row);
      float* out = decoded.row(0) + (row - first_row);
      uint8_t* code = tile_of(row / kRowTile) + column * kRowTile + lane;
      if (format_.symmetric && format_.bits == 1) {
        encode_sign_lanes(value, &scales_[parameters], rows, out, code);
      } else {
        encode_lanes(value, &scales_[parameters], &zeros_[parameters], largest_code, rows, out, code);
      }
      row += rows;
    }
  }

  PackedTensor finish(int threads) override {
    PackedTensor packed;
    packed.format = self_;
    packed.n = n_;
    packed.k = k_;
    for (const PlaneSpec& spec : specs_) {
      if (!spec.optional) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
    Tensor& codes = packed.planes.at("codes");
    const int64_t words = codes.shape()[1];
    uint32_t* code_words = codes.values<uint32_t>().data();
    parallel_for(k_ > 0 ? ceil_div(n_, kRowTile) : 0, threads, [&](int64_t tile) {
      const int64_t first = tile * kRowTile;
      pack_row_tile(tile_of(tile), k_, format_.bits, std::min(kRowTile, n_ - first),
                    code_words + first * words, words);
    });
    pack_scales(packed.planes.at("scales"));
    if (!format_.symmetric) pack_zeros(packed.planes.at("zeros"));
    if (!group_of_column_.empty()) {
      Tensor index(DType::i32, {k_});
      std::copy(group_of_column_.begin(), group_of_column_.end(), index.values<int32_t>().begin());
      packed.planes.emplace("group_index", std::move(index));
    }
    return packed;
  }

 private:
  int64_t group_of(int64_t column) const {
    return group_of_column_.empty() ? column / group_size_ : group_of_column_[static_cast<size_t>(column)];
  }

  uint8_t* tile_of(int64_t tile) { return codes_.data() + tile * k_ * kRowTile; }

  // Ranges of up to kRowTile rows.
  std::array<GroupRange, kRowTile> ranges_of(MatrixView<const float> values) const {
    std::array<GroupRange, kRowTile> ranges;
    std::array<float, kRowTile> low{};
    std::array<float, kRowTile> high{};
    const int64_t rows = values.cols();
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* value = values.row(c);
      for (int64_t r = 0; r < rows; ++r) {
        low[r] = value[r] < low[r] ? value[r] : low[r];
        high[r] = value[r] > high[r] ? value[r] : high[r];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      ranges[r].low = low[r];
      ranges[r].high = high[r];
    }
    if (format_.bits == 1 && format_.symmetric) {
      for (int64_t c = 0; c < values.rows(); ++c) {
        const float* value = values.row(c);
        for (int64_t r = 0; r < rows; ++r) ranges[r].mean_magnitude += std::abs(value[r]);
      }
      for (int64_t r = 0; r < rows; ++r) ranges[r].mean_magnitude /= static_cast<double>(values.rows());
    }
    return ranges;
  }

  void pack_scales(Tensor& plane) const {
    if (plane.element_count() == 0) return;
    const int64_t rows = plane.shape()[0];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups_; ++g) {
        const float scale = scales_[static_cast<size_t>(per_tensor_ ? 0 : g * n_ + r)];
        const auto at = static_cast<size_t>(r * groups_ + g);
        if (format_.scale_dtype == DType::f32) {
          plane.values<float>()[at] = scale;
        } else {
          plane.values<uint16_t>()[at] =
              format_.scale_dtype == DType::f16 ? f16_from_float(scale) : bf16_from_float(scale);
        }
      }
    }
  }

  void pack_zeros(Tensor& plane) const {
    if (plane.element_count() == 0) return;
    const int64_t rows = per_tensor_ ? 1 : n_;
    const int64_t words = plane.shape()[1];
    std::vector<uint8_t> zeros(static_cast<size_t>(rows));
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = 0; r < rows; ++r) zeros[r] = static_cast<uint8_t>(zeros_[g * n_ + r]);
      pack_bits(zeros, format_.bits,
                plane.values<uint32_t>().subspan(static_cast<size_t>(g * words), static_cast<size_t>(words)));
    }
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Uniform& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  bool per_tensor_;
  int64_t groups_;
  int64_t group_size_;
  std::vector<int32_t> group_of_column_;  // empty for consecutive groups
  // [groups, n], as float32 but of values that the stored types hold exactly; per tensor one value,
  // repeated for each lane of a tile.
  std::vector<float> scales_;
  std::vector<float> zeros_;
  std::vector<uint8_t> codes_;  // [ceil(n / kRowTile), k, kRowTile]
};

}  // namespace

void require_group_index(std::span<const int32_t> group_of_column, int64_t groups, int64_t columns_per_group,
                         std::string_view argument) {
  std::vector<int64_t> columns(static_cast<size_t>(groups), 0);
  for (size_t c = 0; c < group_of_column.size(); ++c) {
    const int32_t group = group_of_column[c];
    if (group < 0 || group >= groups) {
      throw InvalidArgument(argument, text_of(group, " at column ", c),
                            text_of("groups in [0, ", groups, ")"));
    }
    if (++columns[static_cast<size_t>(group)] > columns_per_group) {
      throw InvalidArgument(argument, text_of("more than ", columns_per_group, " columns in group ", group),
                            text_of("at most ", columns_per_group, " columns in a group"));
    }
  }
}

std::unique_ptr<ColumnEncoder> make_uniform_encoder(std::shared_ptr<const Format> self, const Uniform& format,
                                                    int64_t n, int64_t k,
                                                    std::span<const int32_t> group_of_column) {
  return std::make_unique<UniformEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
