#include "formats/grouped_encoder.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/grouped.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

float smallest_scale(DType dtype) {
  return dtype == DType::f16 ? 0x1p-24F : 0x1p-126F;
}

float stored_scale(DType dtype, double wanted) {
  // Beyond float32's range the cast would be undefined.
  if (wanted > std::numeric_limits<float>::max()) return std::numeric_limits<float>::infinity();
  auto scale = static_cast<float>(wanted);
  if (dtype == DType::f16) scale = float_from_f16(f16_from_float(scale));
  if (dtype == DType::bf16) scale = float_from_bf16(bf16_from_float(scale));
  return std::max(scale, smallest_scale(dtype));
}

void require_finite_grid(float scale, float outermost, DType dtype, double wanted, const GroupRange& range,
                         int64_t row, int64_t group) {
  if (std::isfinite(scale * outermost)) return;
  throw NumericError(text_of("scale of row ", row, ", group ", group, ": got ", wanted, " for values from ",
                             range.low, " to ", range.high, ", expected a grid that stays finite in ",
                             dtype == DType::f16
                                 ? "float16 (at most 65504); store the scales as bfloat16 or float32"
                                 : "float32; divide the weights first"));
}

GroupedEncoder::GroupedEncoder(std::shared_ptr<const Format> self, const GroupedFormat& format, int64_t n,
                               int64_t k, std::span<const int32_t> group_of_column, bool wants_mean_magnitude)
    : self_(std::move(self)),
      format_(format),
      specs_(format.planes(n, k)),
      n_(n),
      k_(k),
      wants_mean_magnitude_(wants_mean_magnitude),
      per_tensor_(format.group_size == GroupedFormat::kPerTensor),
      groups_(per_tensor_ ? 1 : format.group_count(k)),
      group_size_(std::min(format.columns_per_group(k), std::max<int64_t>(k, 1))) {
  group_of_column_ = permuted_groups(group_of_column, k, groups_, group_size_);
  scales_.assign(static_cast<size_t>(per_tensor_ ? kRowTile : checked_mul(groups_, n)), 1.0F);
  codes_.resize(static_cast<size_t>(checked_mul(checked_pad(n, kRowTile), k)));
}

void GroupedEncoder::fit(int64_t group, int64_t first_row, MatrixView<const float> values,
                         std::span<const float> shrink) {
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
      const int64_t at = group * n_ + row;
      scales_[at] = fit_group(ranges[r], factor, row, group, at, 1);
    }
  }
  if (per_tensor_) {
    const float scale = fit_group(whole, shrink.empty() ? 1.0 : shrink[0], 0, 0, 0, kRowTile);
    std::fill(scales_.begin(), scales_.end(), scale);
  }
}

void GroupedEncoder::encode(int64_t column, int64_t first_row, MatrixView<const float> values,
                            MatrixView<float> decoded) {
  const int64_t group = group_of(column);
  const int64_t end = first_row + values.cols();
  for (int64_t row = first_row; row < end;) {
    const int64_t lane = row % kRowTile;
    const int64_t rows = std::min(kRowTile - lane, end - row);
    encode_lanes(values.row(0) + (row - first_row), per_tensor_ ? 0 : group * n_ + row, rows,
                 decoded.row(0) + (row - first_row), tile_of(row / kRowTile) + column * kRowTile + lane);
    row += rows;
  }
}

PackedTensor GroupedEncoder::finish(int threads) {
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
    pack_row_tile(tile_of(tile), k_, format_.bits, std::min(kRowTile, n_ - first), code_words + first * words,
                  words);
  });
  pack_scales(packed.planes.at("scales"));
  if (!group_of_column_.empty()) {
    Tensor index(DType::i32, {k_});
    std::copy(group_of_column_.begin(), group_of_column_.end(), index.values<int32_t>().begin());
    packed.planes.emplace("group_index", std::move(index));
  }
  finish_planes(packed);
  return packed;
}

// Ranges of up to kRowTile rows.
std::array<GroupRange, kRowTile> GroupedEncoder::ranges_of(MatrixView<const float> values) const {
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
  if (wants_mean_magnitude_) {
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* value = values.row(c);
      for (int64_t r = 0; r < rows; ++r) ranges[r].mean_magnitude += std::abs(value[r]);
    }
    for (int64_t r = 0; r < rows; ++r) ranges[r].mean_magnitude /= static_cast<double>(values.rows());
  }
  return ranges;
}

void GroupedEncoder::pack_scales(Tensor& plane) const {
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

}  // namespace quantloom
