#include "quantloom/rounding/nearest.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "calibration/error_statistics.hpp"
#include "formats/weighted_fit.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/scale_search.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSlabRows = 128;

// Copies rows [first_row, first_row + columns.cols()) of columns [first_column, + columns.rows()) as
// columns.
void read_columns(const FloatMatrix& w, int64_t first_row, int64_t first_column, MatrixView<float> columns) {
  std::vector<float> row(static_cast<size_t>(columns.rows()));
  for (int64_t r = 0; r < columns.cols(); ++r) {
    w.read(first_row + r, first_column, columns.rows(), row.data());
    for (int64_t c = 0; c < columns.rows(); ++c) columns(c, r) = row[static_cast<size_t>(c)];
  }
}

// Encodes the columns and adds each row's squared errors to `row_errors`.
void encode_group(ColumnEncoder& encoder, int64_t first_column, int64_t first_row,
                  MatrixView<const float> columns, std::span<float> buffer, double* row_errors) {
  const int64_t step = encoder.columns_per_step();
  for (int64_t c = 0; c < columns.rows(); c += step) {
    const int64_t width = std::min(step, columns.rows() - c);
    const MatrixView<float> decoded(buffer.data(), width, columns.cols());
    encoder.encode(first_column + c, first_row, columns.block(c, 0, width, columns.cols()), decoded);
    for (int64_t j = 0; j < width; ++j) {
      const float* value = columns.row(c + j);
      const float* code_value = decoded.row(j);
      for (int64_t r = 0; r < columns.cols(); ++r) {
        const double error = static_cast<double>(code_value[r]) - static_cast<double>(value[r]);
        row_errors[r] += error * error;
      }
    }
  }
}

void fit_group(ColumnEncoder& encoder, int64_t group, int64_t first_column, int64_t first_row,
               MatrixView<const float> columns, std::span<const float> weights,
               const std::optional<SearchMetric>& search) {
  if (!search) {
    auto* const weighted = dynamic_cast<WeightedFit*>(&encoder);
    if (weighted == nullptr || weights.empty()) {
      encoder.fit(group, first_row, columns, {});
    } else {
      weighted->fit_weighted(
          group, first_row, columns,
          weights.subspan(static_cast<size_t>(first_column), static_cast<size_t>(columns.rows())));
    }
    return;
  }
  std::vector<int64_t> indices(static_cast<size_t>(columns.rows()));
  std::iota(indices.begin(), indices.end(), first_column);
  search->fit(encoder, group, first_row, columns, indices);
}

}  // namespace

Rounded round_nearest(const FloatMatrix& w, std::shared_ptr<const Format> format,
                      const NearestOptions& options) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a format");
  static_cast<void>(resolve_threads(options.threads));
  if (options.scale_search) require_valid(*options.scale_search);
  std::vector<const Hessian*> hessians;
  if (options.hessian != nullptr) {
    require_hessian(*hessians.emplace_back(options.hessian), w.cols(), "hessian");
  }
  if (options.held_out != nullptr) {
    require_hessian(*hessians.emplace_back(options.held_out), w.cols(), "held_out");
  }
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  static_cast<void>(format->planes(n, k));
  require_finite(w, "w", options.threads);
  format = format->fitted(format, w, options.threads);
  const auto encoder = format->column_encoder(format, n, k, {});

  std::optional<SearchMetric> search;
  if (options.scale_search) search.emplace(*options.scale_search, options.hessian);
  std::vector<float> weights;
  if (options.hessian != nullptr) weights = column_weights(*options.hessian);
  const int64_t group_size = encoder->group_size();
  const bool span_rows = encoder->parameters_span_rows();
  const int64_t slab_rows = whole_steps(*encoder, kSlabRows);
  const int64_t buffer_size = encoder->columns_per_step() * slab_rows;
  if (span_rows) {
    for (int64_t g = 0; g < encoder->group_count() && n > 0 && k > 0; ++g) {
      const int64_t first = g * group_size;
      const int64_t width = std::min(group_size, k - first);
      std::vector<float> values(static_cast<size_t>(checked_mul(width, n)));
      const MatrixView<float> columns(values.data(), width, n);
      parallel_for(ceil_div(n, kSlabRows), options.threads, [&](int64_t slab) {
        const int64_t row = slab * kSlabRows;
        read_columns(w, row, first, columns.block(0, row, width, std::min(kSlabRows, n - row)));
      });
      fit_group(*encoder, g, first, 0, columns, weights, search);
    }
  }
  std::vector<double> row_errors(static_cast<size_t>(k > 0 ? n : 0), 0.0);
  parallel_for(k > 0 ? ceil_div(n, slab_rows) : 0, options.threads, [&](int64_t slab) {
    const int64_t first_row = slab * slab_rows;
    const int64_t rows = std::min(slab_rows, n - first_row);
    std::vector<float> values(static_cast<size_t>(checked_mul(group_size, std::min(slab_rows, n))));
    std::vector<float> buffer(static_cast<size_t>(buffer_size));
    for (int64_t g = 0; g < encoder->group_count(); ++g) {
      const int64_t first = g * group_size;
      const MatrixView<float> columns(values.data(), std::min(group_size, k - first), rows);
      read_columns(w, first_row, first, columns);
      if (!span_rows) fit_group(*encoder, g, first, first_row, columns, weights, search);
      encode_group(*encoder, first, first_row, columns, buffer, row_errors.data() + first_row);
    }
  });

  Rounded rounded;
  rounded.tensor = encoder->finish(options.threads);
  RoundingReport& report = rounded.report;
  report.method = "nearest";
  report.scale_search = options.scale_search.has_value();
  if (n > 0 && k > 0) {
    const double sum = std::accumulate(row_errors.begin(), row_errors.end(), 0.0);
    report.mean_squared_error = sum / (static_cast<double>(n) * static_cast<double>(k));
  }
  if (hessians.empty()) return rounded;
  const ErrorStatistics statistics = error_statistics(w, rounded.tensor, hessians, options.threads);
  if (options.hessian != nullptr) {
    report.tokens = options.hessian->tokens();
    report.proxy_loss = statistics.proxy_losses.front();
  }
  if (options.held_out != nullptr) report.held_out_loss = statistics.proxy_losses.back();
  report.proxy_loss_nearest = report.proxy_loss;
  report.held_out_loss_nearest = report.held_out_loss;
  if (options.scale_search) {
    NearestOptions plain = options;
    plain.scale_search.reset();
    const Rounded nearest = round_nearest(w, format, plain);
    report.proxy_loss_nearest = nearest.report.proxy_loss;
    report.held_out_loss_nearest = nearest.report.held_out_loss;
  }
  return rounded;
}

}  // namespace quantloom
