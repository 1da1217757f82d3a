// Encoders whose fit of a group can weigh columns.
#pragma once

#include <span>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

class WeightedFit {
 public:
  virtual ~WeightedFit() = default;
  // ColumnEncoder::fit() with a weight >= 0 for each column of `values`: how much its errors count.
  virtual void fit_weighted(int64_t group, int64_t first_row, MatrixView<const float> values,
                            std::span<const float> weights) = 0;
};

}  // namespace quantloom
