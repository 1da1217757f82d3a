#include "quantloom/rounding/error_feedback.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "algebra/dense_tiles.hpp"
#include "calibration/error_statistics.hpp"
#include "formats/weighted_fit.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"
#include "rounding/feedback_report.hpp"
#include "rounding/inverse_factor.hpp"
#include "rounding/outlier_search.hpp"
#include "rounding/scale_search.hpp"
#include "rounding/walk.hpp"

namespace quantloom {

namespace {

// Rows that one thread walks through all columns with. Part of the result's definition only through the
// rounding of float32 products, but fixed, so that threads change nothing.
constexpr int64_t kSlabRows = 256;
constexpr int64_t kSubBlock = 16;     // columns between updates of the rest of a block
constexpr int64_t kUpdateTile = 512;  // columns of the remainder updated by one product

// Of each slab, the rows from its first one on that a sampled walk takes: an eighth or a little more.
constexpr int64_t kSampleRows = 32;
// Below this many rows, walks over a sample save too little.
constexpr int64_t kSampledRows = 2048;

struct Outlier {
  int64_t position;  // row * k + column
  uint16_t value;    // beyond the dense value, float16
};

// What all slabs share.
struct Plan {
  const FloatMatrix& w;
  ColumnEncoder& encoder;
  const ErrorFeedbackOptions& options;
  std::vector<int64_t> order;  // the column at each position of the walk
  std::vector<bool> dead;      // by column
  std::vector<float> weights;  // by column: what its errors count in the fit of a group
  std::optional<SearchMetric> search;
  bool fit_on_the_walk = false;
  MatrixView<const float> upper;
  // With a search for outliers:
  int code_bits = 0;
  std::vector<float> inverse_pivots;  // by column, 1 / U_jj^2; 0 for dead ones
  double unit = 0;                    // of thresholds, in the scale of U
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

// Fits a group on `values`, the columns that `columns` names, but for outliers beyond `threshold`.
void fit_group(const Plan& plan, int64_t group, int64_t first_row, MatrixView<const float> values,
               std::span<const int64_t> columns, double threshold) {
  std::vector<float> copy;
  if (plan.code_bits > 0) {
    std::vector<float> weights;
    weights.reserve(columns.size());
    for (const int64_t column : columns) weights.push_back(plan.inverse_pivots[static_cast<size_t>(column)]);
    values = without_outliers(values, weights, plan.code_bits, threshold * plan.unit, copy);
  }
  if (plan.search) {
    plan.search->fit(plan.encoder, group, first_row, values, columns);
  } else if (auto* const weighted = dynamic_cast<WeightedFit*>(&plan.encoder)) {
    std::vector<float> weights;
    weights.reserve(columns.size());
    for (const int64_t column : columns) weights.push_back(plan.weights[static_cast<size_t>(column)]);
    weighted->fit_weighted(group, first_row, values, weights);
  } else {
    plan.encoder.fit(group, first_row, values, {});
  }
}

// Fits all groups on the weights as they are, for `rows` rows from first_row.
void fit_up_front(const Plan& plan, int64_t first_row, int64_t rows, double threshold) {
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
              std::span(natural).subspan(static_cast<size_t>(g * size), static_cast<size_t>(width)),
              threshold);
  }
}

// One slab of rows on its walk through the columns.
class Slab {
 public:
  // Weights whose errors go beyond `threshold` are appended to `outliers`.
  Slab(const Plan& plan, int64_t first_row, int64_t rows, double threshold, std::vector<Outlier>* outliers)
      : plan_(plan),
        threshold_(threshold),
        tiles_(algebra::tiles()),
        first_row_(first_row),
        rows_(rows),
        step_(plan.encoder.columns_per_step()),
        block_(checked_pad(plan.options.block, step_)),
        outliers_(outliers),
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
    if (plan_.code_bits > 0) keep_outliers(position, values.row(0), error.row(0));
    const int64_t next = position + step_;
    for (int64_t c = 0; c < step_ && next < run_end; ++c) {
      tiles_.push_column_f32(run_end - next, rows_, &plan_.upper(position + c, next), error.row(c),
                             working_.row(next), rows_);
    }
  }

  // Takes the weights whose errors are too large as outliers, and leaves what float16 misses of them.
  void keep_outliers(int64_t position, const float* value, float* error) {
    const int64_t column = plan_.order[static_cast<size_t>(position)];
    if (plan_.dead[static_cast<size_t>(column)]) return;
    const auto largest = static_cast<float>(std::sqrt(threshold_ * plan_.unit));
    const float pivot = plan_.upper(position, position);
    const float* nearest = decoded_.row(0);
    for (int64_t r = 0; r < rows_; ++r) {
      if (!(std::abs(error[r]) > largest)) continue;
      const uint16_t missing = f16_from_float(value[r] - nearest[r]);
      if (!std::isfinite(float_from_f16(missing))) {
        throw NumericError(text_of("outlier of row ", first_row_ + r, ", column ", column, ": got ", value[r],
                                   ", expected at most 65504 beyond the dense value"));
      }
      error[r] = (value[r] - (nearest[r] + float_from_f16(missing))) / pivot;
      outliers_->push_back({(first_row_ + r) * working_.rows() + column, missing});
    }
  }

  void fit_group_at(int64_t position) {
    const int64_t size = plan_.encoder.group_size();
    if (position % size != 0) return;
    const int64_t width = std::min(size, working_.rows() - position);
    fit_group(plan_, position / size, first_row_, working_.block(position, 0, width, rows_),
              std::span(plan_.order).subspan(static_cast<size_t>(position), static_cast<size_t>(width)),
              threshold_);
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
  double threshold_;
  const algebra::TileTable& tiles_;
  int64_t first_row_;
  int64_t rows_;
  int64_t step_;
  int64_t block_;
  std::vector<Outlier>* outliers_;
  std::vector<float> working_storage_;
  std::vector<float> error_storage_;
  std::vector<float> decoded_storage_;
  MatrixView<float> working_;  // [k, rows]: columns in the order of the walk
  MatrixView<float> decoded_;  // [step, rows]
};

// Chooses the codes of all rows, or of a sample of them. Returns the outliers, by slab.
std::vector<std::vector<Outlier>> walk(const Plan& plan, double threshold, bool sample) {
  const int64_t n = plan.w.rows();
  const int64_t slab_rows = whole_steps(plan.encoder, kSlabRows);
  const int64_t slabs = ceil_div(n, slab_rows);
  const bool span_rows = plan.encoder.parameters_span_rows();
  if (span_rows) fit_up_front(plan, 0, n, threshold);
  std::vector<std::vector<Outlier>> outliers(static_cast<size_t>(slabs));
  parallel_for(slabs, plan.options.threads, [&](int64_t slab) {
    const int64_t first_row = slab * slab_rows;
    int64_t rows = std::min(slab_rows, n - first_row);
    if (sample) rows = std::min(rows, whole_steps(plan.encoder, kSampleRows));
    if (!span_rows && !plan.fit_on_the_walk) fit_up_front(plan, first_row, rows, threshold);
    Slab(plan, first_row, rows, threshold, &outliers[static_cast<size_t>(slab)]).round();
  });
  return outliers;
}

// The mean over live columns of (mean w^2) / U_jj^2.
double mean_relative_energy(const Plan& plan) {
  const int64_t n = plan.w.rows();
  const int64_t k = plan.w.cols();
  std::vector<double> energy(static_cast<size_t>(k), 0.0);
  std::vector<float> row(energy.size());
  for (int64_t r = 0; r < n; ++r) {
    plan.w.read(r, 0, k, row.data());
    for (size_t j = 0; j < row.size(); ++j) energy[j] += double{row[j]} * double{row[j]};
  }
  double sum = 0;
  for (size_t j = 0; j < energy.size(); ++j) sum += energy[j] * double{plan.inverse_pivots[j]};
  const auto live = std::count(plan.dead.begin(), plan.dead.end(), false);
  return sum / (static_cast<double>(n) * static_cast<double>(live));
}

// Walks at thresholds until one keeps to the budget and spends it. Returns the outliers, by position.
std::vector<Outlier> search_outliers(Plan& plan, const Format& dense, int64_t budget,
                                     RoundingReport& report) {
  const OutlierSearch& search = *plan.options.outliers;
  const int64_t n = plan.w.rows();
  const int64_t k = plan.w.cols();
  plan.code_bits = scalar_bits(dense);
  plan.inverse_pivots.resize(static_cast<size_t>(k));
  for (int64_t p = 0; p < k; ++p) {
    const auto column = static_cast<size_t>(plan.order[static_cast<size_t>(p)]);
    const float pivot = plan.upper(p, p);
    plan.inverse_pivots[column] = plan.dead[column] ? 0.0F : 1 / (pivot * pivot);
  }
  // On the walk, an error in a column costs what is left of it when the columns to come make up for it.
  if (plan.fit_on_the_walk && plan.search && !plan.options.scale_search->output_error) {
    const float largest = *std::max_element(plan.inverse_pivots.begin(), plan.inverse_pivots.end());
    std::vector<float> weights = plan.inverse_pivots;
    for (float& weight : weights) weight /= largest;
    plan.search.emplace(*plan.options.scale_search, std::move(weights));
  }
  plan.unit = mean_relative_energy(plan);
  std::vector<std::vector<Outlier>> slabs;
  const auto count = [&](double threshold, bool sample) {
    slabs = walk(plan, threshold, sample);
    int64_t sum = 0;
    for (const auto& slab : slabs) sum += std::ssize(slab);
    return sum;
  };
  report.outlier_threshold = std::numeric_limits<double>::infinity();
  if (search.threshold) {
    report.outlier_threshold = *search.threshold;
    static_cast<void>(count(*search.threshold, false));
  } else {
    int64_t sampled = 0;
    const int64_t slab_rows = whole_steps(plan.encoder, kSlabRows);
    const int64_t sample_rows = whole_steps(plan.encoder, kSampleRows);
    for (int64_t row = 0; row < n; row += slab_rows) sampled += std::min({sample_rows, slab_rows, n - row});
    const double share = n < kSampledRows ? 1.0 : static_cast<double>(sampled) / static_cast<double>(n);
    report.outlier_threshold = find_threshold(budget, share, count);
  }
  std::vector<Outlier> outliers;
  for (const auto& slab : slabs) outliers.insert(outliers.end(), slab.begin(), slab.end());
  std::ranges::sort(outliers, {}, &Outlier::position);
  report.outliers = std::ssize(outliers);
  return outliers;
}

// Chooses all codes, and returns the outliers; returns with the factor's memory released.
std::vector<Outlier> round_columns(const FloatMatrix& w, ColumnEncoder& encoder, const Format& format,
                                   int64_t budget, const ErrorFeedbackOptions& options,
                                   const Hessian& hessian, bool fit_on_the_walk, std::vector<int64_t> order,
                                   RoundingReport& report) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  const InverseFactor factor(hessian, order, options.damping, options.damping_ladder, options.threads);
  report.damping_tried = factor.damping_tried();
  report.damping = report.damping_tried.back();
  if (n == 0 || k == 0) return {};

  const std::vector<double> diagonal = hessian.diagonal();
  Plan plan{
      w, encoder, options, std::move(order), {}, column_weights(hessian), {}, fit_on_the_walk, factor.upper(),
      0, {},      0};
  plan.dead.resize(static_cast<size_t>(k));
  for (size_t j = 0; j < plan.dead.size(); ++j) plan.dead[j] = diagonal[j] == 0;
  if (options.scale_search) plan.search.emplace(*options.scale_search, &hessian);
  if (options.outliers) return search_outliers(plan, format, budget, report);
  static_cast<void>(walk(plan, 0, false));
  return {};
}

// The result with its outliers; `format` becomes what nearest rounding to the same bits is compared in.
PackedTensor assemble(PackedTensor dense, const std::vector<Outlier>& outliers,
                      std::shared_ptr<const Format>& format) {
  std::vector<int64_t> positions;
  std::vector<uint16_t> values;
  for (const Outlier& outlier : outliers) {
    positions.push_back(outlier.position);
    values.push_back(outlier.value);
  }
  const double weights = static_cast<double>(dense.n) * static_cast<double>(dense.k);
  const double percent = 100 * static_cast<double>(outliers.size()) / weights;
  if (percent > 0 && percent < 100) format = std::make_shared<const Outliers>(format, percent);
  return with_outliers(std::move(dense), positions, values);
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
  const Rounded nearest = round_nearest(w, format, nearest_options);
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.report.proxy_loss;
  if (options.held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.report.held_out_loss;
  }
  if (options.output_hessian != nullptr) {
    const auto two_sided = [&](const PackedTensor& packed) {
      std::vector<float> decoded(static_cast<size_t>(checked_mul(packed.n, packed.k)));
      const MatrixView<float> view(decoded.data(), packed.n, packed.k);
      dequantize(packed, view, options.threads);
      return proxy_loss(w, view, hessian, *options.output_hessian, options.threads);
    };
    report.two_sided_loss = two_sided(rounded.tensor);
    report.two_sided_loss_nearest = two_sided(nearest.tensor);
  }
}

Rounded round_error_feedback(const FloatMatrix& w, std::shared_ptr<const Format> format,
                             const Hessian& hessian, const ErrorFeedbackOptions& options) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a format");
  require_valid(options);
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  static_cast<void>(format->planes(n, k));
  if (options.outliers) {
    static_cast<void>(scalar_bits(*format));
  }
  if (const auto trellis = std::dynamic_pointer_cast<const Trellis>(format);
      trellis && trellis->rotation > 0) {
    return round_trellis_feedback(w, trellis, hessian, options);
  }
  if (options.output_hessian != nullptr) {
    throw InvalidArgument("output_hessian", text_of("one for ", format->spec()),
                          "none: feedback along rows is for a trellis with its rotation");
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
  const bool indexed = fit_on_the_walk && options.act_order;
  const int64_t budget = options.outliers ? outlier_budget(*options.outliers, *format, n, k, indexed) : 0;

  Rounded rounded;
  RoundingReport& report = rounded.report;
  report.method = "gptq";
  report.scale_search = options.scale_search.has_value();
  report.act_order = options.act_order;
  report.static_groups = !fit_on_the_walk;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);

  const std::vector<Outlier> outliers = round_columns(w, *encoder, *format, budget, options, hessian,
                                                      fit_on_the_walk, std::move(order), report);
  rounded.tensor = encoder->finish(options.threads);
  if (options.outliers) rounded.tensor = assemble(std::move(rounded.tensor), outliers, format);
  measure_feedback(w, format, hessian, options, rounded);
  return rounded;
}

}  // namespace quantloom
