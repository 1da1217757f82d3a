#include "quantloom/rounding/error_feedback.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "algebra/dense_tiles.hpp"
#include "calibration/error_statistics.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"
#include "rounding/feedback_report.hpp"
#include "rounding/inverse_factor.hpp"
#include "rounding/scale_search.hpp"
#include "rounding/walk.hpp"

namespace quantloom {

namespace {

// Rows that one thread walks through all columns with. Part of the result's definition only through the
// rounding of float32 products, but fixed, so that threads change nothing.
constexpr int64_t kSlabRows = 256;
constexpr int64_t kSubBlock = 16;     // columns between updates of the rest of a block
constexpr int64_t kUpdateTile = 512;  // columns of the remainder updated by one product

// What all slabs share.
struct Plan {
  const FloatMatrix& w;
  ColumnEncoder& encoder;
  const ErrorFeedbackOptions& options;
  std::vector<int64_t> order;  // the column at each position of the walk
  std::vector<bool> dead;      // by column
  std::optional<SearchMetric> search;
  bool fit_on_the_walk = false;
  MatrixView<const float> upper;
};

// out [columns.size(), rows]: the given columns of weight rows from first_row; dead ones are zero.
void load_columns(const Plan& plan, int64_t first_row, std::span<const int64_t> columns,
                  MatrixView<float> out) {
  constexpr int64_t kRowsAtOnce = 16;
  const int64_t k = plan.w.cols();
  std::vector<float> rows(static_cast<size_t>(kRowsAtOnce * k));
  for (int64_t r = 0; r < out.cols(); r += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, out.cols() - r);
    for (int64_t i = 0; i < count; ++i) plan.w.read(first_row + r + i, 0, k, rows.data() + i * k);
    for (size_t p = 0; p < columns.size(); ++p) {
      const int64_t column = columns[p];
      float* target = out.row(static_cast<int64_t>(p)) + r;
      if (plan.dead[static_cast<size_t>(column)]) {
        std::fill_n(target, count, 0.0F);
      } else {
        for (int64_t i = 0; i < count; ++i) target[i] = rows[static_cast<size_t>(i * k + column)];
      }
    }
  }
}

// Fits a group on `values`, the columns that `columns` names.
void fit_group(const Plan& plan, int64_t group, int64_t first_row, MatrixView<const float> values,
               std::span<const int64_t> columns) {
  if (!plan.search) {
    plan.encoder.fit(group, first_row, values, {});
    return;
  }
  plan.encoder.fit(group, first_row, values,
                   plan.search->shrink(plan.encoder, group, first_row, values, columns));
}

// Fits all groups on the weights as they are, for `rows` rows from first_row.
void fit_up_front(const Plan& plan, int64_t first_row, int64_t rows) {
  const int64_t k = plan.w.cols();
  std::vector<int64_t> natural(static_cast<size_t>(k));
  std::iota(natural.begin(), natural.end(), int64_t{0});
  std::vector<float> storage(static_cast<size_t>(checked_mul(k, rows)));
  const MatrixView<float> values(storage.data(), k, rows);
  load_columns(plan, first_row, natural, values);
  const int64_t size = plan.encoder.group_size();
  for (int64_t g = 0; g < plan.encoder.group_count(); ++g) {
    const int64_t width = std::min(size, k - g * size);
    fit_group(plan, g, first_row, values.block(g * size, 0, width, rows),
              std::span(natural).subspan(static_cast<size_t>(g * size), static_cast<size_t>(width)));
  }
}

// One slab of rows on its walk through the columns.
class Slab {
 public:
  Slab(const Plan& plan, int64_t first_row, int64_t rows)
      : plan_(plan),
        tiles_(algebra::tiles()),
        first_row_(first_row),
        rows_(rows),
        step_(plan.encoder.columns_per_step()),
        block_(checked_pad(plan.options.block, step_)),
        working_storage_(static_cast<size_t>(checked_mul(plan.w.cols(), rows))),
        error_storage_(static_cast<size_t>(checked_mul(std::min(block_, plan.w.cols()), rows))),
        decoded_storage_(static_cast<size_t>(checked_mul(step_, rows))),
        working_(working_storage_.data(), plan.w.cols(), rows),
        decoded_(decoded_storage_.data(), step_, rows) {}

  void round() {
    const int64_t k = working_.rows();
    load_columns(plan_, first_row_, plan_.order, working_);
    for (int64_t begin = 0; begin < k;) {
      const int64_t end = end_of_run(begin, block_, k);
      round_block(begin, end);
      push(begin, end, end, k, begin);
      begin = end;
    }
  }

 private:
  // Where a run of at most `length` columns from `begin` ends. A group that is fitted on the walk needs
  // all its columns up to date at its first one: a run never enters a group that reaches beyond its end.
  int64_t end_of_run(int64_t begin, int64_t length, int64_t limit) const {
    const int64_t end = std::min(length < limit - begin ? begin + length : limit, limit);
    if (!plan_.fit_on_the_walk || end == working_.rows()) return end;
    const int64_t size = plan_.encoder.group_size();
    const int64_t last_start = (end - 1) / size * size;
    return last_start > begin && last_start + size > end ? last_start : end;
  }

  void round_block(int64_t begin, int64_t end) {
    const int64_t run = checked_pad(kSubBlock, step_);
    for (int64_t sub = begin; sub < end;) {
      const int64_t sub_end = end_of_run(sub, run, end);
      for (int64_t column = sub; column < sub_end; column += step_) round_step(column, sub_end, begin);
      push(sub, sub_end, sub_end, end, begin);
      sub = sub_end;
    }
  }

  MatrixView<float> errors(int64_t position, int64_t count, int64_t block_begin) {
    return {error_storage_.data() + (position - block_begin) * rows_, count, rows_};
  }

  // Encodes the columns of one step, and pushes their errors onto the rest of the run.
  void round_step(int64_t position, int64_t run_end, int64_t block_begin) {
    if (plan_.fit_on_the_walk) fit_group_at(position);
    const MatrixView<float> values = working_.block(position, 0, step_, rows_);
    plan_.encoder.encode(plan_.order[static_cast<size_t>(position)], first_row_, values, decoded_);
    const MatrixView<float> error = errors(position, step_, block_begin);
    // error * U_ss = values - decoded, for the step's own triangle U_ss.
    for (int64_t c = 0; c < step_; ++c) {
      float* e = error.row(c);
      const float* value = values.row(c);
      const float* nearest = decoded_.row(c);
      for (int64_t r = 0; r < rows_; ++r) e[r] = value[r] - nearest[r];
      for (int64_t before = 0; before < c; ++before) {
        tiles_.push_column_f32(1, rows_, &plan_.upper(position + before, position + c), error.row(before), e,
                               rows_);
      }
      const float pivot = plan_.upper(position + c, position + c);
      for (int64_t r = 0; r < rows_; ++r) e[r] /= pivot;
    }
    const int64_t next = position + step_;
    for (int64_t c = 0; c < step_ && next < run_end; ++c) {
      tiles_.push_column_f32(run_end - next, rows_, &plan_.upper(position + c, next), error.row(c),
                             working_.row(next), rows_);
    }
  }

  void fit_group_at(int64_t position) {
    const int64_t size = plan_.encoder.group_size();
    if (position % size != 0) return;
    const int64_t width = std::min(size, working_.rows() - position);
    fit_group(plan_, position / size, first_row_, working_.block(position, 0, width, rows_),
              std::span(plan_.order).subspan(static_cast<size_t>(position), static_cast<size_t>(width)));
  }

  // Pushes the errors of columns [begin, end) onto columns [first, last).
  void push(int64_t begin, int64_t end, int64_t first, int64_t last, int64_t block_begin) {
    const MatrixView<float> error = errors(begin, end - begin, block_begin);
    for (int64_t tile = first; tile < last; tile += kUpdateTile) {
      tiles_.gemm_tn_f32(std::min(kUpdateTile, last - tile), rows_, end - begin, -1.0F,
                         plan_.upper.row(begin) + tile, plan_.upper.stride(), error.data(), rows_,
                         working_.row(tile), rows_);
    }
  }

  const Plan& plan_;
  const algebra::TileTable& tiles_;
  int64_t first_row_;
  int64_t rows_;
  int64_t step_;
  int64_t block_;
  std::vector<float> working_storage_;
  std::vector<float> error_storage_;
  std::vector<float> decoded_storage_;
  MatrixView<float> working_;  // [k, rows]: columns in the order of the walk
  MatrixView<float> decoded_;  // [step, rows]
};

// Chooses all codes; returns with the factor's memory released.
void round_columns(const FloatMatrix& w, ColumnEncoder& encoder, const ErrorFeedbackOptions& options,
                   const Hessian& hessian, bool fit_on_the_walk, std::vector<int64_t> order,
                   RoundingReport& report) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  const InverseFactor factor(hessian, order, options.damping, options.damping_ladder, options.threads);
  report.damping_tried = factor.damping_tried();
  report.damping = report.damping_tried.back();
  if (n == 0 || k == 0) return;

  const std::vector<double> diagonal = hessian.diagonal();
  Plan plan{w, encoder, options, std::move(order), {}, {}, fit_on_the_walk, factor.upper()};
  plan.dead.resize(static_cast<size_t>(k));
  for (size_t j = 0; j < plan.dead.size(); ++j) plan.dead[j] = diagonal[j] == 0;
  if (options.scale_search) plan.search.emplace(*options.scale_search, &hessian);
  const bool span_rows = encoder.parameters_span_rows();
  if (span_rows) fit_up_front(plan, 0, n);
  parallel_for(ceil_div(n, kSlabRows), options.threads, [&](int64_t slab) {
    const int64_t first_row = slab * kSlabRows;
    const int64_t rows = std::min(kSlabRows, n - first_row);
    if (!span_rows && !fit_on_the_walk) fit_up_front(plan, first_row, rows);
    Slab(plan, first_row, rows).round();
  });
}

// The encoder for groups of columns in the order of the walk.
std::unique_ptr<ColumnEncoder> walking_encoder(const std::shared_ptr<const Format>& format, int64_t n,
                                               std::span<const int64_t> order, int64_t group_size) {
  std::vector<int32_t> group_of_column(order.size());
  for (size_t p = 0; p < order.size(); ++p) {
    group_of_column[static_cast<size_t>(order[p])] =
        static_cast<int32_t>(static_cast<int64_t>(p) / group_size);
  }
  return format->column_encoder(format, n, static_cast<int64_t>(order.size()), group_of_column);
}

}  // namespace

void measure_feedback(const FloatMatrix& w, const std::shared_ptr<const Format>& format,
                      const Hessian& hessian, const ErrorFeedbackOptions& options, Rounded& rounded) {
  std::vector<const Hessian*> hessians;
  if (options.measure_losses) {
    hessians.push_back(&hessian);
    if (options.held_out != nullptr) hessians.push_back(options.held_out);
  }
  const ErrorStatistics own = error_statistics(w, rounded.tensor, hessians, options.threads);
  RoundingReport& report = rounded.report;
  report.mean_squared_error = own.mean_squared_error;
  if (!options.measure_losses) return;
  NearestOptions nearest_options;
  nearest_options.scale_search = options.scale_search;
  nearest_options.hessian = &hessian;
  nearest_options.held_out = options.held_out;
  nearest_options.threads = options.threads;
  const RoundingReport nearest = round_nearest(w, format, nearest_options).report;
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.proxy_loss;
  if (options.held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.held_out_loss;
  }
}

Rounded round_error_feedback(const FloatMatrix& w, std::shared_ptr<const Format> format,
                             const Hessian& hessian, const ErrorFeedbackOptions& options) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a format");
  require_valid(options);
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  static_cast<void>(format->planes(n, k));
  if (const auto trellis = std::dynamic_pointer_cast<const Trellis>(format);
      trellis && trellis->rotation > 0) {
    return round_trellis_feedback(w, trellis, hessian, options);
  }
  require_usable(hessian, k);
  if (options.held_out != nullptr) require_hessian(*options.held_out, k, "held_out");
  require_finite(w, "w", options.threads);
  format = format->fitted(format, w, options.threads);
  std::unique_ptr<ColumnEncoder> encoder = format->column_encoder(format, n, k, {});
  const int64_t step = encoder->columns_per_step();
  if (k % step != 0) {
    throw InvalidArgument("w", text_of(k, " columns"),
                          text_of("a multiple of ", step, ", the format's step"));
  }

  const std::vector<double> diagonal = hessian.diagonal();
  std::vector<int64_t> order = walk_order(diagonal, step, options.act_order);
  const bool span_rows = encoder->parameters_span_rows();
  const bool fit_on_the_walk = !options.static_groups && !span_rows && encoder->group_count() > 1;
  if (fit_on_the_walk) {
    if (encoder->group_size() % step != 0) {
      throw InvalidArgument("static_groups",
                            text_of("false for groups of ", encoder->group_size(), " columns"),
                            text_of("groups of a multiple of ", step, " columns, the format's step"));
    }
    if (options.act_order) encoder = walking_encoder(format, n, order, encoder->group_size());
  }

  Rounded rounded;
  RoundingReport& report = rounded.report;
  report.method = "gptq";
  report.scale_search = options.scale_search.has_value();
  report.act_order = options.act_order;
  report.static_groups = !fit_on_the_walk;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);

  round_columns(w, *encoder, options, hessian, fit_on_the_walk, std::move(order), report);
  rounded.tensor = encoder->finish(options.threads);
  measure_feedback(w, format, hessian, options, rounded);
  return rounded;
}

}  // namespace quantloom
