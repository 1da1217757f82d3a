#include "quantloom/rounding/nearest.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "quantloom/parallel.hpp"
#include "rounding/scale_search.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSlabRows = 64;

// Copies rows [first_row, first_row + columns.cols()) of columns [first_column, + columns.rows()) as
// columns.
void read_columns(const FloatMatrix& w, int64_t first_row, int64_t first_column, MatrixView<float> columns) {
  std::vector<float> row(static_cast<size_t>(columns.rows()));
  for (int64_t r = 0; r < columns.cols(); ++r) {
    w.read(first_row + r, first_column, columns.rows(), row.data());
    for (int64_t c = 0; c < columns.rows(); ++c) columns(c, r) = row[static_cast<size_t>(c)];
  }
}

// Adds the squared errors of each row to `row_errors`.
void encode_group(ColumnEncoder& encoder, int64_t first_column, int64_t first_row,
                  MatrixView<const float> columns, std::span<float> buffer, std::span<double> row_errors) {
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
        row_errors[static_cast<size_t>(r)] += error * error;
      }
    }
  }
}

void fit_group(ColumnEncoder& encoder, int64_t group, int64_t first_column, int64_t first_row,
               MatrixView<const float> columns, std::span<const float> weights,
               const std::optional<ScaleSearch>& search) {
  if (!search) {
    encoder.fit(group, first_row, columns, {});
    return;
  }
  std::vector<int64_t> indices(static_cast<size_t>(columns.rows()));
  std::iota(indices.begin(), indices.end(), first_column);
  const auto group_weights = weights.empty() ? weights
                                             : weights.subspan(static_cast<size_t>(first_column),
                                                               static_cast<size_t>(columns.rows()));
  encoder.fit(group, first_row, columns,
              search_shrink(encoder, group, first_row, columns, indices, group_weights, *search));
}

void require_inputs(const char* argument, const Hessian* hessian, int64_t k) {
  if (hessian != nullptr && hessian->k() != k) {
    throw InvalidArgument(argument, text_of(hessian->k(), " inputs"), text_of(k, " as in w"));
  }
  if (hessian != nullptr && hessian->tokens() == 0) {
    throw InvalidArgument(argument, "0 tokens", "a Hessian of at least one token");
  }
}

}  // namespace

Rounded round_nearest(const FloatMatrix& w, std::shared_ptr<const Format> format,
                      const NearestOptions& options) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a format");
  static_cast<void>(resolve_threads(options.threads));
  if (options.scale_search) require_valid(*options.scale_search);
  require_inputs("hessian", options.hessian, w.cols());
  require_inputs("held_out", options.held_out, w.cols());
  if (options.hessian != nullptr || options.held_out != nullptr) {
    throw Unsupported("hessian: this build of nearest rounding computes no proxy losses");
  }
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  const auto encoder = format->column_encoder(format, n, k, {});
  require_finite(w, "w", options.threads);

  std::vector<float> weights;
  const int64_t group_size = encoder->group_size();
  const bool span_rows = encoder->parameters_span_rows();
  const int64_t buffer_size = encoder->columns_per_step() * kSlabRows;
  if (span_rows) {
    for (int64_t g = 0; g < encoder->group_count() && n > 0 && k > 0; ++g) {
      const int64_t first = g * group_size;
      const int64_t width = std::min(group_size, k - first);
      std::vector<float> values(static_cast<size_t>(checked_mul(width, n)));
      const MatrixView<float> columns(values.data(), width, n);
      read_columns(w, 0, first, columns);
      fit_group(*encoder, g, first, 0, columns, weights, options.scale_search);
    }
  }
  std::vector<double> row_errors(static_cast<size_t>(n), 0.0);
  parallel_for(k > 0 ? ceil_div(n, kSlabRows) : 0, options.threads, [&](int64_t slab) {
    const int64_t first_row = slab * kSlabRows;
    const int64_t rows = std::min(kSlabRows, n - first_row);
    const std::span<double> errors(row_errors.data() + first_row, static_cast<size_t>(rows));
    std::vector<float> values(static_cast<size_t>(checked_mul(group_size, kSlabRows)));
    std::vector<float> buffer(static_cast<size_t>(buffer_size));
    for (int64_t g = 0; g < encoder->group_count(); ++g) {
      const int64_t first = g * group_size;
      const MatrixView<float> columns(values.data(), std::min(group_size, k - first), rows);
      read_columns(w, first_row, first, columns);
      if (!span_rows) fit_group(*encoder, g, first, first_row, columns, weights, options.scale_search);
      encode_group(*encoder, first, first_row, columns, buffer, errors);
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
  return rounded;
}

}  // namespace quantloom
