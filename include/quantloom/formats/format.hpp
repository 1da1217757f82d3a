// The small interface that every format implements, and the table of all formats.
//
// A format says what is stored and how it decodes. It knows nothing of how codes are chosen: a
// rounding (nearest, error feedback, ...) drives the format's ColumnEncoder.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantloom/matrix_view.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// A plane that a format prescribes for a matrix of a given size.
struct PlaneSpec {
  std::string name;
  DType dtype = DType::u8;
  std::vector<int64_t> shape;
  bool optional = false;
};

// The state of encoding one matrix [n, k]. A rounding walks the columns in the order it likes; the
// encoder keeps parameters and codes. Values come as columns: a view [columns, rows] whose row c is
// column c of the weights, for the weight rows [first_row, first_row + values.cols()). Calls for
// disjoint row ranges may run concurrently.
class ColumnEncoder {
 public:
  virtual ~ColumnEncoder() = default;
  // Columns that one call of encode() takes: 1 for scalar grids, the vector length or tile width of
  // others.
  virtual int64_t columns_per_step() const = 0;
  // Parameter groups along in_features, and the columns in each (the last one may be shorter).
  virtual int64_t group_count() const = 0;
  virtual int64_t group_size() const = 0;
  // True if a group's parameters are shared by all rows, so that fit() must see all rows at once.
  virtual bool parameters_span_rows() const = 0;
  // Consecutive rows whose parameters are fitted together, counted from row 0 (the last ones of a matrix may
  // be fewer): fit() and refine() take whole runs of so many rows.
  virtual int64_t rows_per_step() const { return 1; }
  // Fits and stores the parameters of `group` from its columns. `shrink` multiplies the range that the
  // grid covers: empty for 1 everywhere, else one factor in (0, 1] for each row of `values` (only
  // shrink[0] counts if parameters_span_rows()). Throws NumericError if the parameters do not fit
  // their stored type.
  virtual void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
                   std::span<const float> shrink) = 0;
  // After fit() of the same values: among the parameters that what fit() settled for several groups leaves to
  // each of them, stores those with the least sum of column_weights[c] * (rounding error)^2, one weight >= 0
  // for each row of `values`. Nothing for formats whose groups share no parameters.
  virtual void refine(int64_t /*group*/, int64_t /*first_row*/, MatrixView<const float> /*values*/,
                      std::span<const float> /*column_weights*/) {}
  // Chooses the code nearest to each value of columns [column, column + columns_per_step()) under the
  // fitted parameters, stores it, and writes the decoded values (same shape as `values`).
  virtual void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
                      MatrixView<float> decoded) = 0;
  // Packs all codes. Call once, after every column was encoded.
  virtual PackedTensor finish(int threads) = 0;
  PackedTensor finish() { return finish(0); }
};

class Format {
 public:
  virtual ~Format() = default;
  // The word by which files and tables know the format: "uniform".
  virtual std::string_view name() const = 0;
  // The short form for tables and the command line: "uniform:4:g128:sym".
  virtual std::string spec() const = 0;
  // The whole description as a JSON object with sorted keys; format_from_json() reads it back.
  virtual std::string to_json() const = 0;
  // The planes of a matrix [n, k]. Throws InvalidArgument if the format cannot take that size.
  virtual std::vector<PlaneSpec> planes(int64_t n, int64_t k) const = 0;
  // Checks plane values (shapes are already checked); throws InvalidArgument naming the plane.
  virtual void validate_values(const PackedTensor& packed) const = 0;
  // Decodes rows [first_row, first_row + out.rows()) to `out` [rows, k].
  virtual void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const = 0;
  // The format with what it takes from a whole matrix before a group is fitted, such as tables; `self` for
  // those that take nothing. w must be finite, of a size that planes() takes.
  virtual std::shared_ptr<const Format> fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                               int threads) const;
  // `group_of_column`: empty for groups of consecutive columns, else k entries in
  // [0, group_count) with at most group_size columns each; stored as plane "group_index".
  virtual std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                        int64_t k,
                                                        std::span<const int32_t> group_of_column) const = 0;
};

// One row of the table of formats.
struct FormatEntry {
  std::string_view name;
  std::string_view summary;
  std::shared_ptr<const Format> (*from_json)(std::string_view json);
  std::shared_ptr<const Format> (*from_spec)(std::string_view spec);
  // Representative formats, in their short form, that tests and listings enumerate.
  std::vector<std::string> examples;
};

const std::vector<FormatEntry>& format_table();
// Both throw InvalidArgument naming what was not understood.
std::shared_ptr<const Format> format_from_json(std::string_view json);
std::shared_ptr<const Format> format_from_spec(std::string_view spec);

}  // namespace quantloom
