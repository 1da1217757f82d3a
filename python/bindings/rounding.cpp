#include "quantloom/rounding/rounding.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calibration.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"
#include "reports.hpp"

namespace quantloom::python {

std::optional<ScaleSearch> to_search(const Search& search) {
  if (!search) return std::nullopt;
  const auto& [steps, smallest, norm, output_error] = *search;
  return ScaleSearch{to_int("steps", steps), smallest, norm, output_error};
}

py::dict to_python(const RoundingReport& report) {
  py::dict fields;
  fields["method"] = report.method;
  fields["scale_search"] = report.scale_search;
  fields["act_order"] = report.act_order;
  fields["static_groups"] = report.static_groups;
  fields["damping"] = report.damping;
  fields["damping_tried"] = report.damping_tried;
  fields["dead_columns"] = report.dead_columns;
  fields["tokens"] = report.tokens;
  fields["mean_squared_error"] = report.mean_squared_error;
  fields["outliers"] = report.outliers;
  fields["outlier_threshold"] = report.outlier_threshold;
  fields["proxy_loss"] = report.proxy_loss;
  fields["proxy_loss_nearest"] = report.proxy_loss_nearest;
  fields["held_out_loss"] = report.held_out_loss;
  fields["held_out_loss_nearest"] = report.held_out_loss_nearest;
  fields["two_sided_loss"] = report.two_sided_loss;
  fields["two_sided_loss_nearest"] = report.two_sided_loss_nearest;
  fields["trellis_ratio"] = report.trellis_ratio;
  return fields;
}

std::optional<OutlierSearch> to_outlier_search(const Budget& budget) {
  if (!budget) return std::nullopt;
  const auto& [percent, bits, threshold] = *budget;
  return OutlierSearch{percent, bits, threshold};
}

namespace {

py::tuple to_pair(Rounded rounded) {
  const py::dict fields = to_python(rounded.report);
  return py::make_tuple(std::make_shared<PackedTensor>(std::move(rounded.tensor)), fields);
}

py::tuple nearest(const ArrayRef& w, const std::string& format, const Search& search,
                  const SharedHessian* hessian, const SharedHessian* held_out, int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  Rounded rounded;
  {
    const py::gil_scoped_release release;
    const HessianLocks hessians(hessian, held_out);
    rounded = round_nearest(weights, format_from_json(format),
                            {.scale_search = to_search(search),
                             .hessian = hessians.first(),
                             .held_out = hessians.second(),
                             .threads = to_int("threads", threads)});
  }
  return to_pair(std::move(rounded));
}

py::tuple error_feedback(const ArrayRef& w, const std::string& format, const SharedHessian& hessian,
                         double damping, std::vector<double> damping_ladder, bool act_order,
                         bool static_groups, int64_t block, const Search& search, const Budget& outliers,
                         const SharedHessian* held_out, int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  Rounded rounded;
  {
    const py::gil_scoped_release release;
    const HessianLocks hessians(&hessian, held_out);
    rounded = round_error_feedback(weights, format_from_json(format), *hessians.first(),
                                   {.damping = damping,
                                    .damping_ladder = std::move(damping_ladder),
                                    .act_order = act_order,
                                    .static_groups = static_groups,
                                    .block = block,
                                    .scale_search = to_search(search),
                                    .outliers = to_outlier_search(outliers),
                                    .held_out = hessians.second(),
                                    .threads = to_int("threads", threads)});
  }
  return to_pair(std::move(rounded));
}

py::tuple trellis_feedback(const ArrayRef& w, const std::string& format, const SharedHessian& hessian,
                           bool consistent_hessian, bool refit, std::vector<double> ratio_factors,
                           double damping, std::vector<double> damping_ladder, bool act_order, int64_t block,
                           const SharedHessian* held_out, const SharedHessian* output_hessian,
                           int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  Rounded rounded;
  {
    const py::gil_scoped_release release;
    const HessianLocks hessians(&hessian, held_out, output_hessian);
    ErrorFeedbackOptions options;
    options.output_hessian = hessians.third();
    options.damping = damping;
    options.damping_ladder = std::move(damping_ladder);
    options.act_order = act_order;
    options.block = block;
    options.held_out = hessians.second();
    options.threads = to_int("threads", threads);
    rounded = round_trellis_feedback(
        weights, std::dynamic_pointer_cast<const Trellis>(format_from_json(format)), *hessians.first(),
        options, {consistent_hessian, refit, refit, std::move(ratio_factors)});
  }
  return to_pair(std::move(rounded));
}

}  // namespace

void bind_rounding(py::module_& module) {
  module.def("round_nearest", &nearest);
  module.def("round_error_feedback", &error_feedback);
  module.def("round_trellis_feedback", &trellis_feedback);
}

}  // namespace quantloom::python
