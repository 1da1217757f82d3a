// Format "vector_codebook": tables of short vectors; the weights of `dim` consecutive columns are one code of
// each table: values = scale * (table[0][code 0] + table[1][code 1] + ...), summed in float32 in that order.
//
// Planes of a matrix [n, k] with G groups per row and V = ceil(k / dim) vectors (FORMATS.md has the layout):
//   codes     int32 [n, ceil(V*codebooks*bits/32)]  a dense bit stream per row, lowest bits first; the codes
//             of a vector, one for each table, follow each other
//   codebook  float16 [codebooks, entries, dim]
//   scales    scale_dtype [n, G]                    ([1, 1] per tensor)
// Where k is no multiple of dim, the last vector of a row reaches beyond it; nobody reads its values there.
//
// Tables belong to a matrix, not to its description: a format without tables fits them to the matrix
// (fitted()), one with tables takes them as they are; packed tensors hold theirs in the plane alone.
//
// How a group is fitted, and codes chosen:
//   scale = max|w| of the group, as stored: rounded to scale_dtype, at least 2^-24 (float16) or 2^-126
//           (others); 1 for a group of zeros. Tables are in its units.
//   code  = one table after the other: the entry nearest to what is left of w / scale (float32), by the sum
//   of
//           squared differences in float64, of equally near ones the first. With one table that is the
//           nearest vector; with several it is a start for a search that looks at them together.
#pragma once

#include "quantloom/formats/grouped.hpp"

namespace quantloom {

struct VectorCodebook final : ScaledFormat {
  static constexpr int64_t kMostDim = 16;
  static constexpr int64_t kMostEntries = 65536;
  static constexpr int64_t kMostCodebooks = 8;

  int64_t dim;        // columns of a vector: 1 to kMostDim
  int64_t entries;    // of a table: 2 to kMostEntries
  int64_t codebooks;  // tables: 1 to kMostCodebooks
  int bits;           // of a code: as few as number the entries
  // [codebooks, entries, dim], of values that float16 holds; empty: fitted to the matrix.
  std::vector<float> table;

  // group_size: a multiple of dim, kPerChannel or kPerTensor. `table`: codebooks * entries * dim values,
  // which are rounded to float16, or none. Throws InvalidArgument / TypeMismatch naming the argument.
  VectorCodebook(int64_t entries, int64_t dim, int64_t group_size = 64, DType scale_dtype = DType::f16,
                 int64_t codebooks = 1, std::span<const float> table = {});

  int64_t vectors(int64_t k) const { return ceil_div(k, dim); }
  int64_t code_count(int64_t k) const { return checked_mul(vectors(k), codebooks); }

  std::string_view name() const override { return "vector_codebook"; }
  // "vector_codebook:256x4:g64", "vector_codebook:2x256x8:channel" with two tables. With tables of its own
  // "vector_codebook:custom256x4-1a2b3c4d:g64": to be read by people, only the JSON description holds them.
  std::string spec() const override;
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  // With tables fitted to an even subset of the vectors of w, by k-means of w / scale weighted by scale^2,
  // one table after the other.
  std::shared_ptr<const Format> fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                       int threads) const override;
  // Throws InvalidArgument without tables, or for groups of columns that are not consecutive.
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);
};

}  // namespace quantloom
