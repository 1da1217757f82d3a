// Format "additive": additive quantization (AQLM: Egiazarian et al., 2024). The weights of `out_group` rows
// by `in_group` columns are one code of each of several tables: values = scale * (table[0][code 0] +
// table[1][code 1] + ...), summed in float32 in that order, then multiplied.
//
// Planes of a matrix [n, k] with N = ceil(n / out_group) groups of rows, V = ceil(k / in_group) of columns
// and S scales a row (FORMATS.md has the layout):
//   codes     int32 [N, ceil(V*codebooks*bits/32)]  a dense bit stream for each group of rows, lowest bits
//             first; the codes of a block, one for each table, follow each other
//   codebook  float16 [codebooks, 2^bits, out_group, in_group]
//   scales    scale_dtype [N, S]
// Scales of a group of rows may be codes into a few levels of its own (AdditiveLevels); instead of `scales`:
//   scale_codes   int32 [N, ceil(S*scale_bits/32)]  a dense bit stream for each group of rows
//   scale_levels  scale_dtype [N, 2^scale_bits]
// Likewise the numbers of a table; instead of `codebook`:
//   codebook_codes   int32 [codebooks, ceil(2^bits*out_group*in_group*table_bits/32)]  a stream for each
//                    table, in the order of `codebook`
//   codebook_levels  float16 [codebooks, table_groups, out_group, in_group, 2^table_bits]
// Where n or k is no multiple of a group, the last one reaches beyond the matrix; nobody reads its values
// there.
//
// Tables belong to a matrix: a format without tables fits them to the matrix (fitted()); packed tensors hold
// theirs in the plane alone.
//
// How scales are fitted, and codes chosen, without regard to inputs (round_beam_search() has it):
//   scale = the root mean square of what it scales, as stored: rounded to scale_dtype, at least 2^-24
//   (float16)
//           or 2^-126 (others); 1 for zeros. Tables are in its units.
//   code  = one table after the other: the entry nearest to what is left of w / scale, as in vector_codebook
// Levels are fitted by one-dimensional k-means to the scales of the whole matrix before; each scale is then
// the level nearest to the root mean square.
#pragma once

#include "quantloom/formats/format.hpp"

namespace quantloom {

// What scales and tables are stored as. Numbers that share levels are stored as codes into them only if there
// are more numbers than levels; otherwise as they are, exactly.
struct AdditiveLevels {
  static constexpr int kMostBits = 15;

  int scale_bits = 0;        // 2^scale_bits levels for the scales of each group of rows; 0: as they are
  int table_bits = 0;        // 2^table_bits levels for each place in an entry of each table; 0: as they are
  int64_t table_groups = 1;  // runs of entries of equal length, each with levels of its own

  bool operator==(const AdditiveLevels&) const = default;
};

struct Additive final : Format {
  static constexpr int kMostCodebooks = 8;
  static constexpr int kMostBits = 16;
  static constexpr int64_t kMostWeights = 16;  // of a block: out_group * in_group
  static constexpr int64_t kPerChannel = -1;   // one scale for each group of rows

  int codebooks;        // tables: 1 to kMostCodebooks
  int bits;             // of a code: 1 to kMostBits; tables have 2^bits entries
  int64_t in_group;     // columns of a block
  int64_t out_group;    // rows of a block
  int64_t scale_group;  // columns that share a scale: a multiple of in_group, or kPerChannel
  DType scale_dtype;    // float16, bfloat16 or float32
  AdditiveLevels levels;
  // [codebooks, 2^bits, out_group, in_group], of values that float16 holds; empty: fitted to the matrix.
  std::vector<float> tables;
  // [N, 2^scale_bits], ascending: what fitted() found for a matrix whose scales are codes; else empty.
  std::vector<float> scale_levels;

  // `tables` are rounded to float16, and to levels if they are stored as such. Throws InvalidArgument /
  // TypeMismatch naming the argument.
  Additive(int codebooks, int bits, int64_t in_group = 8, int64_t out_group = 1,
           int64_t scale_group = kPerChannel, DType scale_dtype = DType::f16,
           std::span<const float> tables = {}, const AdditiveLevels& levels = {});

  int64_t entries() const { return int64_t{1} << bits; }
  int64_t dim() const { return out_group * in_group; }
  int64_t row_groups(int64_t n) const { return ceil_div(n, out_group); }
  int64_t blocks(int64_t k) const { return ceil_div(k, in_group); }  // of a group of rows
  int64_t code_count(int64_t k) const { return checked_mul(blocks(k), codebooks); }
  int64_t scale_columns(int64_t k) const;  // of one scale, at least 1
  int64_t scale_count(int64_t k) const { return ceil_div(k, scale_columns(k)); }
  bool has_scale_levels(int64_t k) const {
    return levels.scale_bits > 0 && int64_t{1} << levels.scale_bits < scale_count(k);
  }
  bool has_table_levels() const {
    return levels.table_bits > 0 && int64_t{1} << levels.table_bits < entries() / levels.table_groups;
  }

  // Stored bits per weight as AQLM's publications count them: codes without padding, tables, and scales; with
  // scale_bits, scales count so many bits even where they are stored as they are, being few. 0 for an empty
  // matrix. PackedTensor::bits_per_weight() counts the bytes that are there.
  double average_bits(int64_t n, int64_t k) const;

  std::string_view name() const override { return "additive"; }
  // "additive:2x8:g8", "additive:1x16:g2x4:scale64:bf16": tables x bits, in_group or out_group x in_group;
  // "additive:2x8:g8:scale16:s4:t2x6": scale_bits, and table_bits or table_groups x table_bits.
  std::string spec() const override;
  // Without tables.
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  // fit_additive() with its defaults; with tables already there, the levels of scales alone.
  std::shared_ptr<const Format> fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                       int threads) const override;
  // Throws InvalidArgument without tables or levels that it needs, or for groups of columns that are not
  // consecutive.
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);
};

struct AdditiveFitOptions {
  int64_t sweeps = 20;  // of k-means, at most; for each table
  // Blocks of w that tables are fitted to, drawn evenly, for each entry. 0: 256, or as few as make 2^18 in
  // all, but 4 at least.
  int64_t vectors_per_entry = 0;
  uint64_t seed = 0;
  // Empty, or k numbers >= 0 such as diag(H): a block counts by the mean of its columns' (and by the square
  // of its scale).
  std::span<const double> column_weights = {};
  int threads = 0;
};

// `format` with levels of scales, and tables by residual k-means of w / scale: each is fitted to what those
// before leave. w: finite, as in Format::fitted(). Throws InvalidArgument naming the option.
std::shared_ptr<const Additive> fit_additive(const Additive& format, const FloatMatrix& w,
                                             const AdditiveFitOptions& options = {});

// A matrix of this format on the CPU with its scales and tables stored by other levels: exactly where there
// are enough of them, else by k-means. Without levels it is the same matrix, bit for bit.
PackedTensor with_levels(const PackedTensor& packed, const AdditiveLevels& levels);

}  // namespace quantloom
