// Search for the factor by which to shrink a group's range, shared by all roundings.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom {

// Throws InvalidArgument naming the field that is out of range.
void require_valid(const ScaleSearch& search);

// For each row of a group, the factor with the least weighted error of nearest rounding (the larger
// factor on a tie); one factor for all rows if encoder.parameters_span_rows().
//   columns         [c, rows]: the group's columns, for the weight rows from first_row
//   column_indices  [c]: the weight column in each row of `columns`; runs of columns_per_step()
//                   consecutive ones where the format encodes more than one at once
//   column_weights  [c], >= 0: how much an error in each column counts; empty for 1 everywhere
//   column_hessian  [c, c]: the metric if search.output_error, else not read
// Works through fit() and encode() alone: the group's parameters and codes are left at the last factor
// tried, so that the caller fits once more with the result.
std::vector<float> search_shrink(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                                 MatrixView<const float> columns, std::span<const int64_t> column_indices,
                                 std::span<const float> column_weights, const ScaleSearch& search,
                                 MatrixView<const float> column_hessian = {});

// What a search measures errors with: diag(H), or all of H if search.output_error, scaled to a largest
// diagonal entry of 1. Without a Hessian every column counts alike.
class SearchMetric {
 public:
  SearchMetric() = default;
  // Throws InvalidArgument if search.output_error and there is no Hessian.
  SearchMetric(const ScaleSearch& search, const Hessian* hessian);
  // With the weight of each column, not by output error.
  SearchMetric(const ScaleSearch& search, std::vector<float> weights);
  // search_shrink() with the entries that belong to `column_indices`.
  std::vector<float> shrink(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                            MatrixView<const float> columns, std::span<const int64_t> column_indices) const;
  // Fits the group with those factors, and refines its parameters by the diagonal.
  void fit(ColumnEncoder& encoder, int64_t group, int64_t first_row, MatrixView<const float> columns,
           std::span<const int64_t> column_indices) const;

 private:
  ScaleSearch search_;
  int64_t k_ = 0;
  std::vector<float> weights_;  // [k] or empty
  std::vector<float> hessian_;  // [k, k] or empty
};

// `rows` down to a multiple of the rows that the encoder fits together, or those if they are more: what a
// thread may take at once.
int64_t whole_steps(const ColumnEncoder& encoder, int64_t rows);

}  // namespace quantloom
