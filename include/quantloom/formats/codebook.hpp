// Format "codebook": a table of values, value = scale * table[code].
//
// Planes of a matrix [n, k] with G groups per row (FORMATS.md has the byte layout):
//   codes        int32 [n, ceil(k*bits/32)]   a dense bit stream per row, lowest bits first
//   codebook     float16 [entries]            the table, strictly rising; the same as the description's
//   scales       scale_dtype [n, G]           ([1, 1] per tensor)
//   group_index  int32 [k]                    only if columns of a group are not consecutive
//
// How a group is fitted, and a code chosen:
//   scale = max|w| / max|table|, as stored: rounded to scale_dtype, at least 2^-24 (float16) or 2^-126
//           (others). A group of zeros has scale 1 if the table holds 0, else the smallest scale.
//   code = the number of midpoints (table[i] + table[i+1]) / 2 below w / scale, all in float32: the entry
//          nearest to w / scale, of two equally near the lower one
#pragma once

#include <optional>

#include "quantloom/formats/grouped.hpp"

namespace quantloom {

struct Codebook final : GroupedFormat {
  // 2 to 2^bits values that float16 holds, strictly rising.
  std::vector<float> table;
  // A name of codebook_tables(), if this is its table at its width; else empty.
  std::string table_name;

  // Rounds `values` to float16. `bits`: by default as few as the table needs. Throws InvalidArgument /
  // TypeMismatch naming the argument, also if values coincide once rounded.
  explicit Codebook(std::span<const float> values, int64_t group_size = 64, DType scale_dtype = DType::f16,
                    std::optional<int> bits = std::nullopt);
  // A table of codebook_tables().
  explicit Codebook(std::string_view name, int64_t group_size = 64, DType scale_dtype = DType::f16,
                    std::optional<int> bits = std::nullopt);

  float largest_magnitude() const { return std::max(-table.front(), table.back()); }

  std::string_view name() const override { return "codebook"; }
  // "codebook:nf4:g64"; "codebook:custom4-1a2b3c4d:g64" for a table without a name, by its width and a hash:
  // to be read by people, only the JSON description holds the table.
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

// A well-known table.
struct CodebookTable {
  std::string_view name;
  std::string_view summary;
  std::vector<float> values;  // before rounding to float16
};

const std::vector<CodebookTable>& codebook_tables();

}  // namespace quantloom
