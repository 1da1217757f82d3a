// Format "sdr": the significant digits of 8-bit integers (SDR, the codec of QRazor: Lee et al., 2025).
//
// A row is rounded to a symmetric grid of 8 bits with one scale; the integers q of each group of columns are
// then cut to `bits` bits behind a shift that the group shares:
//   shift = max(0, bit length of max|q| - (bits - 1))
//   code = clamp(rne(q / 2^shift), -2^(bits-1), 2^(bits-1) - 1), value = scale * (code * 2^shift)
// rne: to the nearest integer, ties to even; q = clamp(rne(w / scale), -127, 127) with the scale as stored:
// max|w| / 127 of the row, rounded to scale_dtype, at least 2^-24 (float16) or 2^-126 (others), 1 for zeros.
// On a walk with error feedback, scales are those of the matrix as it was given, and shifts those of the
// values that a group has when it is fitted; `shrink` multiplies max|q|.
//
// Planes of a matrix [n, k] with G groups per row (FORMATS.md has the byte layout):
//   codes        int32 [n, ceil(k*bits/32)]         a dense bit stream per row, two's complement
//   shifts       int32 [n, ceil(G*shift_bits/32)]   the shifts of a row's groups, likewise
//   scales       scale_dtype [n, 1]                 ([n, 0] if k = 0)
//   group_index  int32 [k]                          only if columns of a group are not consecutive
#pragma once

#include "quantloom/formats/format.hpp"

namespace quantloom {

struct Sdr final : Format {
  static constexpr int kBaseBits = 8;  // of the integers that are cut

  int bits;            // of a code, 2 ... 7
  int64_t group_size;  // columns that share a shift, > 0
  DType scale_dtype;   // float16, bfloat16 or float32
  // The scale of each row as float32, which fitted() takes from a matrix; no part of the description.
  std::vector<float> row_scales;

  // Throws InvalidArgument / TypeMismatch naming the field that is out of range.
  explicit Sdr(int bits, int64_t group_size = 16, DType scale_dtype = DType::f16);

  int64_t columns_per_group(int64_t k) const;  // group_size, or k if that is less (1 if k = 0)
  int64_t group_count(int64_t k) const { return ceil_div(k, columns_per_group(k)); }
  int largest_shift() const { return kBaseBits - bits; }
  int shift_bits() const;  // of a stored shift, 1 ... 3
  // Bits of a weight in rows of k: bits + shift_bits / group_size + bits of a scale / k. Planes add the
  // padding of rows to whole words.
  double average_bits(int64_t k) const;

  std::string_view name() const override { return "sdr"; }
  // "sdr:4:g16"
  std::string spec() const override;
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  std::shared_ptr<const Format> fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                       int threads) const override;
  // Needs row_scales: InvalidArgument without.
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);
};

// The same values bit for bit in the format "uniform", for whatever takes that: code * 2^shift as 8-bit codes
// with one scale per row; or, `by_groups`, the codes as they are with the scale times 2^shift of each group
// in float32 (NumericError if that overflows). `packed` is valid, of the format Sdr, on the CPU.
PackedTensor sdr_to_uniform(const PackedTensor& packed, bool by_groups);

}  // namespace quantloom
