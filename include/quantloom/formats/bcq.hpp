// Format "bcq": binary coding, value = offset + sum over planes of +-scale: each plane holds one sign for
// each weight, and has a scale of its own for each group of columns. Looked up by bytes of signs, products
// with it need no multiplication by a weight (Park et al., "LUT-GEMM", 2024); any evenly spaced grid is a
// special case.
//
// Planes of a matrix [n, k] with `bits` sign planes and G groups per row:
//   signs        int32 [bits, n, ceil(k/32)]   bit c % 32 of word c / 32 is 1 where the sign is +
//   scales       scale_dtype [bits, n, G]
//   offsets      scale_dtype [n, G]            only with offset
//   group_index  int32 [k]                     only if columns of a group are not consecutive
// A value is summed in float32, the offset first, then the planes from 0 on.
//
// How a group is fitted: by least squares, each column weighted by diag(H) where a rounding has a Hessian.
// From a start, up to `rounds` times, the best scales (and offset) for the signs, then the nearest signs for
// those: neither step adds to the error. Starts are
//   greedy  one plane after the other, the signs of what is left and its mean magnitude: rounds = 0 is the
//           greedy fit of Guo et al. (2017), 1 the refined one, more the alternating one of Xu et al. (2018),
//           as LUT-GEMM has them
//   best    for 1, 2, ... planes in turn the best of: the grid of one plane less and the signs of what it
//           leaves, the greedy start, evenly spaced grids over all of the range and over three quarters. No
//           plane more adds to the error
// Scales are stored in falling order. A weight takes the nearest value under the scales as stored, of two
// equally near ones the lower.
#pragma once

#include <optional>

#include "quantloom/formats/grouped.hpp"

namespace quantloom {

struct Bcq final : ScaledFormat {
  static constexpr int kMostRounds = 1000;

  int bits;     // planes, 1 to 8
  bool offset;  // whether groups have an offset
  int rounds;   // of the alternating fit, 0 to kMostRounds
  bool greedy;  // the start: "greedy" or "best"

  // Throws InvalidArgument / TypeMismatch naming the field that is out of range; there is no group per
  // tensor.
  Bcq(int bits, int64_t group_size, bool offset = false, DType scale_dtype = DType::f16, int rounds = 15,
      bool greedy = false);

  std::string_view name() const override { return "bcq"; }
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

// A uniform tensor as binary coding, plane i the bits i of its codes: scale * (code - zero) is offset + sum
// of
// +-scale * 2^(i-1) with offset = scale * ((2^bits - 1) / 2 - zero). Exact up to the rounding of scales and
// offsets to scale_dtype (none: the tensor's own), so that a tensor with scales in float16 or bfloat16 keeps
// its values bit for bit with float32, and a symmetric one with its own type (in float16, if its scales are
// above 2^-13); sums of scales in float32 round. One scale per tensor becomes one per row. Throws
// InvalidArgument for another format, NumericError for scales beyond the range of scale_dtype.
PackedTensor to_bcq(const PackedTensor& packed, std::optional<DType> scale_dtype = std::nullopt);

}  // namespace quantloom
