// The part of a column encoder that formats with one scale per group share: groups, scales, codes and their
// packing. A format adds how a group is fitted and how a column's codes are chosen.
#pragma once

#include <array>

#include "formats/row_packing.hpp"
#include "quantloom/formats/grouped.hpp"

namespace quantloom {

// What a fit may know of a group's values.
struct GroupRange {
  double low = 0;             // min(0, smallest value)
  double high = 0;            // max(0, largest value)
  double mean_magnitude = 0;  // only if the encoder asks for it
};

// The smallest scale that is stored: its inverse stays finite in float32.
float smallest_scale(DType dtype);
// `wanted` (>= 0) as it is stored: rounded to `dtype`, at least smallest_scale(); infinite beyond its range.
float stored_scale(DType dtype, double wanted);
// Throws NumericError unless scale * outermost, the end of the grid, is finite.
void require_finite_grid(float scale, float outermost, DType dtype, double wanted, const GroupRange& range,
                         int64_t row, int64_t group);

class GroupedEncoder : public ColumnEncoder {
 public:
  int64_t columns_per_step() const final { return 1; }
  int64_t group_count() const final { return groups_; }
  int64_t group_size() const final { return group_size_; }
  bool parameters_span_rows() const final { return per_tensor_; }
  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) final;
  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) final;
  PackedTensor finish(int threads) final;

 protected:
  // `self` owns `format`. Throws InvalidArgument for a bad group_of_column.
  GroupedEncoder(std::shared_ptr<const Format> self, const GroupedFormat& format, int64_t n, int64_t k,
                 std::span<const int32_t> group_of_column, bool wants_mean_magnitude);

  // Parameters of a group lie at group * n + row; those of a whole tensor at 0 ... kRowTile - 1, once for
  // each lane of a tile.
  size_t parameter_count() const { return scales_.size(); }
  bool per_tensor() const { return per_tensor_; }
  int64_t rows() const { return n_; }
  int64_t groups() const { return groups_; }
  const float* scales_at(int64_t parameter) const { return scales_.data() + parameter; }

 private:
  // Returns the scale, and stores what else belongs to `count` parameters from `at` on.
  virtual float fit_group(const GroupRange& range, double shrink, int64_t row, int64_t group, int64_t at,
                          int64_t count) = 0;
  // Codes and decoded values of up to kRowTile rows of one column, whose parameters begin at `at`.
  virtual void encode_lanes(const float* value, int64_t at, int64_t rows, float* decoded,
                            uint8_t* code) const = 0;
  // Fills the planes beyond codes, scales and group_index.
  virtual void finish_planes(PackedTensor& packed) const = 0;

  int64_t group_of(int64_t column) const {
    return group_of_column_.empty() ? column / group_size_ : group_of_column_[static_cast<size_t>(column)];
  }
  uint8_t* tile_of(int64_t tile) { return codes_.data() + tile * k_ * kRowTile; }
  std::array<GroupRange, kRowTile> ranges_of(MatrixView<const float> values) const;
  void pack_scales(Tensor& plane) const;

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const GroupedFormat& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  bool wants_mean_magnitude_;
  bool per_tensor_;
  int64_t groups_;
  int64_t group_size_;
  std::vector<int32_t> group_of_column_;  // empty for consecutive groups
  std::vector<float> scales_;             // float32, but of values that the stored type holds exactly
  std::vector<uint8_t> codes_;            // [ceil(n / kRowTile), k, kRowTile]
};

}  // namespace quantloom
