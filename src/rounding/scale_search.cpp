#include "rounding/scale_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantloom {

void require_valid(const ScaleSearch& search) {
  if (search.steps < 1) throw InvalidArgument("scale_search.steps", text_of(search.steps), "1 or more");
  if (!(search.smallest > 0 && search.smallest < 1)) {
    throw InvalidArgument("scale_search.smallest", text_of(search.smallest), "a factor between 0 and 1");
  }
  if (!(search.norm > 0 && std::isfinite(search.norm))) {
    throw InvalidArgument("scale_search.norm", text_of(search.norm), "a positive exponent");
  }
}

std::vector<float> search_shrink(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                                 MatrixView<const float> columns, std::span<const int64_t> column_indices,
                                 std::span<const float> column_weights, const ScaleSearch& search) {
  const int64_t count = columns.rows();
  const int64_t rows = columns.cols();
  const int64_t step = encoder.columns_per_step();
  const bool shared = encoder.parameters_span_rows();
  const auto row_count = static_cast<size_t>(rows);
  const size_t factor_count = shared ? 1 : row_count;
  std::vector<float> best(factor_count, 1.0F);
  std::vector<double> best_error(factor_count, std::numeric_limits<double>::infinity());
  std::vector<float> factors(row_count);
  std::vector<double> row_error(row_count);
  std::vector<float> decoded_values(static_cast<size_t>(checked_mul(step, rows)));
  for (int i = 0; i < search.steps; ++i) {
    const double fraction = search.steps == 1 ? 0.0 : static_cast<double>(i) / (search.steps - 1);
    const auto factor = static_cast<float>(1.0 - fraction * (1.0 - search.smallest));
    std::fill(factors.begin(), factors.end(), factor);
    std::fill(row_error.begin(), row_error.end(), 0.0);
    encoder.fit(group, first_row, columns, factors);
    for (int64_t c = 0; c < count; c += step) {
      const int64_t width = std::min(step, count - c);
      const MatrixView<float> decoded(decoded_values.data(), width, rows);
      encoder.encode(column_indices[static_cast<size_t>(c)], first_row, columns.block(c, 0, width, rows),
                     decoded);
      for (int64_t j = 0; j < width; ++j) {
        const double weight = column_weights.empty() ? 1.0 : column_weights[static_cast<size_t>(c + j)];
        const float* value = columns.row(c + j);
        const float* code_value = decoded.row(j);
        if (search.norm == 2.0) {
          for (int64_t r = 0; r < rows; ++r) {
            const double error = static_cast<double>(code_value[r]) - static_cast<double>(value[r]);
            row_error[r] += weight * (error * error);
          }
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            const double error = static_cast<double>(code_value[r]) - static_cast<double>(value[r]);
            row_error[r] += weight * std::pow(std::abs(error), search.norm);
          }
        }
      }
    }
    if (shared) {
      double total = 0;
      for (const double error : row_error) total += error;
      row_error.assign(row_count, total);
    }
    for (size_t f = 0; f < std::min(factor_count, row_count); ++f) {
      if (row_error[f] < best_error[f]) {
        best_error[f] = row_error[f];
        best[f] = factor;
      }
    }
  }
  return best;
}

}  // namespace quantloom
