// Format "outliers": any other format, and a few weights more exactly: value = dense value + outlier.
//
// Planes of a matrix [n, k] with `count` outliers, beside those of the dense format:
//   outlier_offsets  int32 [n + 1]    row r has entries [offsets[r], offsets[r + 1]); [1] if k = 0
//   outlier_columns  uint16 [count], int32 if k > 65536; rising within a row
//   outlier_values   float16 [count]  what is added to the dense value
//
// How they are chosen: the floor(percent * n * k / 100) weights of the largest magnitude in the matrix (of
// equals the first). The dense format is fitted to the others, and takes 0 in their place; an outlier is what
// is then missing, rounded to float16. Another way to choose gives `count` and makes the planes itself.
#pragma once

#include <optional>

#include "quantloom/formats/format.hpp"

namespace quantloom {

struct Outliers final : Format {
  std::shared_ptr<const Format> dense;  // of any other name
  std::optional<double> percent;        // of the weights, in (0, 100): chosen when a matrix is fitted
  int64_t count = 0;                    // of the entries, unless `percent` says it
  // Of the entries, as row * k + column, rising; empty until a matrix was fitted.
  std::vector<int64_t> positions;

  // Throw InvalidArgument naming the argument.
  Outliers(std::shared_ptr<const Format> dense, double percent);
  Outliers(std::shared_ptr<const Format> dense, int64_t count);

  int64_t entry_count(int64_t n, int64_t k) const;

  std::string_view name() const override { return "outliers"; }
  // "outliers:0.5%:uniform:4:g128:sym", or "outliers:n1234:uniform:4:g128:sym" with a count.
  std::string spec() const override;
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  std::shared_ptr<const Format> fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                       int threads) const override;
  // Throws InvalidArgument unless fitted, or for groups of columns that are not consecutive.
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);
};

// The dense part of a packed tensor whose format is Outliers; planes are shared.
PackedTensor dense_part(const PackedTensor& packed);
// The inverse: `dense` and the float16 values of outliers at positions
// row * k + column, rising.
PackedTensor with_outliers(PackedTensor dense, std::span<const int64_t> positions,
                           std::span<const uint16_t> values);

}  // namespace quantloom
