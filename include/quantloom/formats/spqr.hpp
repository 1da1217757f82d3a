// Format "spqr": an evenly spaced grid whose scales and zero points are themselves stored on grids, those of
// several rows on one (the bilevel quantization of SpQR: Dettmers et al., 2023). Without outliers, which the
// format "outliers" stores beside it: SpQR is "outliers" around "spqr", as error feedback with an
// OutlierSearch makes it.
//
// Planes of a matrix [n, k] with G groups per row and B = ceil(n / block) blocks of rows:
//   codes        int32 [n, ceil(k*bits/32)]        a dense bit stream per row, lowest bits first
//   scales       int32 [G, ceil(n*scale_bits/32)]  codes of the scales of a group's rows
//   zeros        int32 [G, ceil(n*zero_bits/32)]   codes of its zero points
//   scale_grids  float16 [G, B, 2]                 step and zero of the grid that a block's scales lie on
//   zero_grids   float16 [G, B, 2]                 the same of its zero points
//   group_index  int32 [k]                         only if columns of a group are not consecutive
// In float32: scale = step * (code - zero) with the numbers of scale_grids, zero point likewise with those of
// zero_grids, value = scale * (code - zero point). Scales are >= 0; zero points need not be integers.
//
// How a block of rows is fitted in one group: a row wants scale = (hi - lo) / (2^bits - 1), or more where the
// middle of its values is farther from 0 than 1.5 (hi - lo); a grid of scales spans those of the block (with
// a step of at least 1 / 1024 of the largest; step, then zero, rounded to float16); each scale takes the
// nearest code. With the scale as stored, the zero point that a row wants puts the middle of the codes on the
// middle of the values; zero points are stored in the same way. refine() tries all codes of scale and zero
// point of a row (powers of two apart where there are more than 16) on the block's grids.
#pragma once

#include "quantloom/formats/format.hpp"

namespace quantloom {

struct Spqr final : Format {
  int bits;            // of a weight's code, 1 ... 8
  int64_t group_size;  // columns that share scale and zero point (the paper's beta 1), > 0
  int scale_bits;      // of a scale's code, 1 ... 8
  int zero_bits;       // of a zero point's code, 1 ... 8
  int64_t block;       // rows whose scales, and zero points, lie on one grid (beta 2), > 0

  // Throws InvalidArgument naming the field that is out of range.
  explicit Spqr(int bits, int64_t group_size = 16, int scale_bits = 3, int zero_bits = 3, int64_t block = 16);

  int64_t columns_per_group(int64_t k) const;  // group_size, or k if that is less (1 if k = 0)
  int64_t group_count(int64_t k) const { return ceil_div(k, columns_per_group(k)); }
  int64_t block_count(int64_t n) const { return ceil_div(n, block); }

  std::string_view name() const override { return "spqr"; }
  // "spqr:3:g16:s3:z3:b16"
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

// Scales and zero points of all rows and groups as they decode, each [n, G].
struct SpqrParameters {
  std::vector<float> scales;
  std::vector<float> zeros;
};
// `packed` is valid, of the format Spqr, on the CPU.
SpqrParameters spqr_parameters(const PackedTensor& packed);

// Bits per weight by the formula of the paper, with `outlier_rate` of the weights as outliers of 32 bits:
// bits + (scale_bits + zero_bits) / group_size + 64 / (group_size * block) + 32 * outlier_rate. Planes add
// the padding of rows and, with outliers, 32 bits for each row: PackedTensor::bits_per_weight() counts those.
double spqr_average_bits(const Spqr& format, double outlier_rate);

}  // namespace quantloom
