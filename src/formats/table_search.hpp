// Tables of short vectors made ready to be searched one after the other, for the encoders of formats that add
// their entries up; and the fit of such tables.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fit/codebook_finder.hpp"

namespace quantloom {

float largest_magnitude(std::span<const float> values);

class TableSearch {
 public:
  // tables [books, entries, dim], finite; they must outlive the search.
  TableSearch(std::span<const float> tables, int64_t books, int64_t entries, int64_t dim);

  int64_t books() const { return static_cast<int64_t>(finders_.size()); }
  MatrixView<const float> table(int64_t book) const {
    return {tables_.data() + book * entries_ * dim_, entries_, dim_};
  }
  // No sum of one entry of each table has a larger element.
  float outermost() const { return outermost_; }

  // Takes from each table, one after the other, the entry nearest to what those before leave of a row, whose
  // elements are columns of `group`; of those from `width` on nothing is wanted, and nothing is left.
  //   left   [rows, dim]: what is wanted; what is left over afterwards
  //   sum    [rows, dim]: the sums of the entries, in float32, in the order of the tables
  //   codes  [rows, books]
  void encode(MatrixView<float> left, int64_t group, int64_t width, float* sum, uint16_t* codes) const;

 private:
  void find(int64_t book, MatrixView<const float> x, int32_t* codes) const;

  std::span<const float> tables_;
  int64_t entries_;
  int64_t dim_;
  float reach_;
  float outermost_ = 0;
  std::vector<fit::CodebookFinder> finders_;
};

// Residual k-means: each table is fitted to what the tables before leave of the rows of `x` [count, dim],
// which is overwritten. `weights`: one for each row, >= 0. Tables [books, entries, dim], before rounding to
// float16.
std::vector<float> fit_residual_tables(MatrixView<float> x, std::span<const float> weights, int64_t books,
                                       int64_t entries, int64_t sweeps, uint64_t seed, int threads);

}  // namespace quantloom
