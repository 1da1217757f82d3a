#include "rounding/scale_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "algebra/dense_tiles.hpp"
#include "calibration/error_statistics.hpp"
#include "formats/shared_scales.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace {

// row_error [rows] = diag(E^T H E) for E [count, rows].
void measure_output_errors(MatrixView<const float> hessian, MatrixView<const float> errors,
                           std::span<float> products, std::span<double> row_error) {
  const int64_t count = errors.rows();
  const int64_t rows = errors.cols();
  std::fill(products.begin(), products.end(), 0.0F);
  algebra::tiles().gemm_tn_f32(count, rows, count, 1.0F, hessian.data(), hessian.stride(), errors.data(),
                               errors.stride(), products.data(), rows);
  for (int64_t c = 0; c < count; ++c) {
    const float* error = errors.row(c);
    const float* product = products.data() + c * rows;
    for (int64_t r = 0; r < rows; ++r) row_error[r] += static_cast<double>(error[r]) * product[r];
  }
}

}  // namespace

void require_valid(const ScaleSearch& search) {
  if (search.steps < 1) throw InvalidArgument("scale_search.steps", text_of(search.steps), "1 or more");
  if (!(search.smallest > 0 && search.smallest < 1)) {
    throw InvalidArgument("scale_search.smallest", text_of(search.smallest), "a factor between 0 and 1");
  }
  if (!(search.norm > 0 && std::isfinite(search.norm))) {
    throw InvalidArgument("scale_search.norm", text_of(search.norm), "a positive exponent");
  }
  if (search.output_error && search.norm != 2.0) {
    throw InvalidArgument("scale_search.norm", text_of(search.norm), "2 for a search by output error");
  }
}

std::vector<float> search_shrink(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                                 MatrixView<const float> columns, std::span<const int64_t> column_indices,
                                 std::span<const float> column_weights, const ScaleSearch& search,
                                 MatrixView<const float> column_hessian) {
  const int64_t count = columns.rows();
  const int64_t rows = columns.cols();
  const int64_t step = encoder.columns_per_step();
  const bool shared = encoder.parameters_span_rows();
  const int64_t run = shares_scales(encoder) ? encoder.rows_per_step() : 1;
  const auto row_count = static_cast<size_t>(rows);
  const size_t factor_count = shared ? 1 : row_count;
  std::vector<float> best(factor_count, 1.0F);
  std::vector<double> best_error(factor_count, std::numeric_limits<double>::infinity());
  std::vector<float> factors(row_count);
  std::vector<double> row_error(row_count);
  std::vector<float> decoded_values(static_cast<size_t>(checked_mul(step, rows)));
  std::vector<float> error_values(search.output_error ? static_cast<size_t>(checked_mul(count, rows))
                                                      : size_t{0});
  std::vector<float> products(error_values.size());
  const MatrixView<float> errors(error_values.data(), search.output_error ? count : 0, rows);
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
        if (search.output_error) {
          for (int64_t r = 0; r < rows; ++r) errors(c + j, r) = code_value[r] - value[r];
        } else if (search.norm == 2.0) {
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
    if (search.output_error) measure_output_errors(column_hessian, errors, products, row_error);
    if (shared) {
      double total = 0;
      for (const double error : row_error) total += error;
      row_error.assign(row_count, total);
    }
    for (int64_t first = 0; run > 1 && first < rows; first += run) {
      const auto own = std::span(row_error).subspan(static_cast<size_t>(first),
                                                    static_cast<size_t>(std::min(run, rows - first)));
      std::ranges::fill(own, std::accumulate(own.begin(), own.end(), 0.0));
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

SearchMetric::SearchMetric(const ScaleSearch& search, const Hessian* hessian) : search_(search) {
  if (hessian == nullptr) {
    if (!search.output_error) return;
    throw InvalidArgument("scale_search", "a search by output error without a Hessian", "a Hessian");
  }
  k_ = hessian->k();
  if (!search.output_error) {
    weights_ = column_weights(*hessian);
    return;
  }
  const MatrixView<const double> sum = hessian->sum();
  double largest = 0;
  for (int64_t j = 0; j < k_; ++j) largest = std::max(largest, sum(j, j));
  const double factor = largest > 0 ? 1 / largest : 1;
  hessian_.resize(static_cast<size_t>(checked_mul(k_, k_)));
  for (int64_t i = 0; i < k_; ++i) {
    for (int64_t j = 0; j < k_; ++j) {
      hessian_[static_cast<size_t>(i * k_ + j)] = static_cast<float>(sum(i, j) * factor);
    }
  }
}

SearchMetric::SearchMetric(const ScaleSearch& search, std::vector<float> weights)
    : search_(search), k_(std::ssize(weights)), weights_(std::move(weights)) {}

std::vector<float> SearchMetric::shrink(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                                        MatrixView<const float> columns,
                                        std::span<const int64_t> column_indices) const {
  const int64_t count = std::ssize(column_indices);
  if (hessian_.empty()) {
    std::vector<float> weights;
    for (size_t c = 0; c < column_indices.size() && !weights_.empty(); ++c) {
      weights.push_back(weights_[static_cast<size_t>(column_indices[c])]);
    }
    return search_shrink(encoder, group, first_row, columns, column_indices, weights, search_);
  }
  const MatrixView<const float> all(hessian_.data(), k_, k_);
  bool consecutive = true;
  for (int64_t c = 1; c < count; ++c) {
    consecutive = consecutive && column_indices[c] == column_indices[c - 1] + 1;
  }
  if (consecutive && count > 0) {
    const int64_t first = column_indices.front();
    return search_shrink(encoder, group, first_row, columns, column_indices, {}, search_,
                         all.block(first, first, count, count));
  }
  std::vector<float> gathered(static_cast<size_t>(checked_mul(count, count)));
  const MatrixView<float> own(gathered.data(), count, count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) own(i, j) = all(column_indices[i], column_indices[j]);
  }
  return search_shrink(encoder, group, first_row, columns, column_indices, {}, search_, own);
}

void SearchMetric::fit(ColumnEncoder& encoder, int64_t group, int64_t first_row,
                       MatrixView<const float> columns, std::span<const int64_t> column_indices) const {
  encoder.fit(group, first_row, columns, shrink(encoder, group, first_row, columns, column_indices));
  std::vector<float> weights;
  for (const int64_t column : column_indices) {
    const auto at = static_cast<size_t>(column);
    weights.push_back(!hessian_.empty() ? hessian_[at * static_cast<size_t>(k_ + 1)]
                                        : (weights_.empty() ? 1.0F : weights_[at]));
  }
  encoder.refine(group, first_row, columns, weights);
}

int64_t whole_steps(const ColumnEncoder& encoder, int64_t rows) {
  const int64_t step = encoder.rows_per_step();
  return std::max(rows / step * step, step);
}

}  // namespace quantloom
