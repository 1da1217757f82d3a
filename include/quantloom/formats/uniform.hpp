// Format "uniform": an evenly spaced grid, value = scale * (code - zero_point).
//
// Planes of a matrix [n, k] with G groups per row (FORMATS.md has the byte layout):
//   codes        int32 [n, ceil(k*bits/32)]   a dense bit stream per row, lowest bits first
//   scales       scale_dtype [n, G]           ([1, 1] per tensor)
//   zeros        int32 [G, ceil(n*bits/32)]   asymmetric only: integer zero points, one packed row per
//                                             group, stored as they are ([1, 1] per tensor)
//   group_index  int32 [k]                    only if columns of a group are not consecutive
// Symmetric: zero_point is the constant 2^(bits-1), and 0.5 for 1 bit (values -scale/2, +scale/2).
//
// How a group is fitted, and a code chosen (rne: to the nearest integer, ties to even):
//   symmetric    scale = 2 max|w| / (2^bits - 1), so that +max clips by half a step at most; for 1 bit
//                2 mean|w|, the least squares of a sign
//   asymmetric   lo = min(0, w), hi = max(0, w), scale = (hi - lo) / (2^bits - 1),
//                zero_point = clamp(rne(-lo / scale), 0, 2^bits - 1)
//   code = clamp(rne(w / scale) + zero_point, 0, 2^bits - 1); 1 bit symmetric: w >= 0
// with the scale as stored: rounded to scale_dtype, at least 2^-24 (float16) or 2^-126 (others), so that
// 1 / scale is finite. A group of zeros has scale 1 (1 bit symmetric: the smallest scale).
#pragma once

#include "quantloom/formats/grouped.hpp"

namespace quantloom {

struct Uniform final : GroupedFormat {
  bool symmetric;

  // Throws InvalidArgument / TypeMismatch naming the field that is out of range.
  Uniform(int bits, int64_t group_size, bool symmetric = true, DType scale_dtype = DType::f16);

  float symmetric_zero_point() const { return bits == 1 ? 0.5F : static_cast<float>(1 << (bits - 1)); }

  std::string_view name() const override { return "uniform"; }
  std::string spec() const override;
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);
};

}  // namespace quantloom
