#include "quantloom/rounding/beam_search.hpp"

#include <algorithm>
#include <cmath>

#include "calibration/error_statistics.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/additive_checks.hpp"
#include "rounding/additive_refit.hpp"
#include "rounding/code_sweep.hpp"

namespace quantloom {
namespace {

// The format of a packed tensor that was validated, and is of the size of w.
const Additive& start_format(const FloatMatrix& w, const PackedTensor& start) {
  const auto* format = dynamic_cast<const Additive*>(start.format.get());
  if (format == nullptr) {
    throw InvalidArgument("start", start.format == nullptr ? "no format" : start.format->spec(),
                          "a packed tensor of the format additive");
  }
  if (start.n != w.rows() || start.k != w.cols()) {
    throw InvalidArgument("start", text_of("[", start.n, ", ", start.k, "]"),
                          text_of("[", w.rows(), ", ", w.cols(), "], as w"));
  }
  for (const auto& [name, plane] : start.planes) {
    if (plane.device() != Device::cpu) throw Unsupported(text_of("plane ", name, " is on a CUDA device"));
  }
  validate(start);
  return *format;
}

PackedTensor start_codes(const FloatMatrix& w, const std::shared_ptr<const Additive>& format,
                         const Hessian& hessian, const BeamSearchOptions& options) {
  if (options.start == CodeStart::error_feedback) {
    ErrorFeedbackOptions feedback;
    feedback.damping = std::max(feedback.damping, options.search.damping);
    feedback.measure_losses = false;
    feedback.threads = options.search.threads;
    return round_error_feedback(w, format, hessian, feedback).tensor;
  }
  NearestOptions nearest;
  nearest.threads = options.search.threads;
  return round_nearest(w, format, nearest).tensor;
}

}  // namespace

PackedTensor search_codes(const FloatMatrix& w, const PackedTensor& start, const Hessian& hessian,
                          const CodeSearchOptions& options, std::span<const int64_t> row_groups) {
  const Additive& format = start_format(w, start);
  require_valid(options, format);
  require_row_groups(row_groups, format.row_groups(w.rows()));
  const AdditiveProblem problem(w, format, hessian, options.damping, options.threads);
  AdditiveParts parts = unpack_additive(format, start);
  sweep_codes(problem, parts, options, row_groups);
  return pack_additive(format, parts, w.rows(), w.cols(), options.threads);
}

PackedTensor refit_tables(const FloatMatrix& w, const PackedTensor& start, const Hessian& hessian,
                          const RefitOptions& options) {
  const Additive& format = start_format(w, start);
  require_valid(options);
  const AdditiveProblem problem(w, format, hessian, options.damping, options.threads);
  AdditiveParts parts = unpack_additive(format, start);
  refit_parts(problem, parts, options);
  return pack_additive(format, parts, w.rows(), w.cols(), options.threads);
}

BeamSearched round_beam_search(const FloatMatrix& w, std::shared_ptr<const Additive> wanted,
                               const Hessian& hessian, const BeamSearchOptions& options) {
  if (wanted == nullptr) throw InvalidArgument("format", "null", "a format");
  const int threads = options.search.threads;
  require_valid(options);
  require_valid(options.search, *wanted);
  static_cast<void>(wanted->planes(w.rows(), w.cols()));
  const AdditiveProblem problem(w, *wanted, hessian, options.search.damping, threads);
  if (options.held_out != nullptr) require_hessian(*options.held_out, w.cols(), "held_out");

  const std::vector<double> diagonal = hessian.diagonal();
  std::shared_ptr<const Additive> format = wanted;
  if (format->tables.empty()) {
    AdditiveFitOptions fit = options.fit;
    if (fit.column_weights.empty()) fit.column_weights = diagonal;
    fit.threads = threads;
    format = fit_additive(*wanted, w, fit);
  }
  BeamSearched result;
  PackedTensor best = start_codes(w, format, hessian, options);
  const auto loss_of = [&](const PackedTensor& packed) {
    const Hessian* const own = &hessian;
    const ErrorStatistics statistics = error_statistics(w, packed, {&own, 1}, threads);
    const double weights = static_cast<double>(w.rows()) * static_cast<double>(w.cols());
    return statistics.proxy_losses[0] + problem.shift() * statistics.mean_squared_error * weights;
  };
  const RefitOptions refit = {.steps = options.refit_steps,
                              .tables = true,
                              .scales = options.refit_scales,
                              .damping = options.search.damping,
                              .threads = threads,
                              .solver = options.refit_solver,
                              .adam = options.adam};
  // Keeps `parts` if they err less.
  const auto keep = [&](const AdditiveParts& parts) {
    PackedTensor packed = pack_additive(*format, parts, w.rows(), w.cols(), threads);
    const double loss = loss_of(packed);
    if (!(loss < result.losses.back())) return false;
    result.losses.push_back(loss);
    best = std::move(packed);
    return true;
  };
  result.losses.push_back(loss_of(best));
  CodeSearchOptions search = options.search;
  bool improves = result.losses.back() > 0;
  for (int round = 0; round < options.max_rounds && improves; ++round, ++search.seed) {
    const double before = result.losses.back();
    AdditiveParts parts = unpack_additive(*format, best);
    refit_parts(problem, parts, refit);
    sweep_codes(problem, parts, search, {});
    improves = keep(parts) && result.losses.back() < (1 - options.tolerance) * before;
  }
  if (options.refit_steps > 0 && result.losses.back() > 0) {
    AdditiveParts parts = unpack_additive(*format, best);
    refit_parts(problem, parts, refit);
    static_cast<void>(keep(parts));
  }
  result.tensor = std::move(best);

  RoundingReport& report = result.report;
  report.method = "beam_search";
  report.damping = options.search.damping;
  report.damping_tried = {options.search.damping};
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  std::vector<const Hessian*> hessians;
  if (options.measure_losses) hessians.push_back(&hessian);
  if (options.measure_losses && options.held_out != nullptr) hessians.push_back(options.held_out);
  const ErrorStatistics own = error_statistics(w, result.tensor, hessians, threads);
  report.mean_squared_error = own.mean_squared_error;
  if (!options.measure_losses) return result;
  NearestOptions nearest_options;
  nearest_options.hessian = &hessian;
  nearest_options.held_out = options.held_out;
  nearest_options.threads = threads;
  const RoundingReport nearest = round_nearest(w, format, nearest_options).report;
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.proxy_loss;
  if (options.held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.held_out_loss;
  }
  return result;
}

}  // namespace quantloom
