#include "quantloom/rounding/channel_scales.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calibration.hpp"
#include "reports.hpp"

namespace quantloom::python {

py::dict to_python(const ChannelScales& found) {
  py::dict result;
  result["codes"] = py::bytes(reinterpret_cast<const char*>(found.codes.data()), found.codes.size());
  result["exponent"] = found.exponent;
  result["loss"] = found.loss;
  result["losses"] = found.losses;
  return result;
}

namespace {

py::dict search(const std::vector<ArrayRef>& weights, const std::vector<std::string>& formats,
                const SharedHessian& hessian, const std::vector<double>& magnitudes, int64_t steps,
                int64_t code_step, int64_t threads) {
  if (weights.size() != formats.size()) {
    throw InvalidArgument("formats", text_of(formats.size()), text_of(weights.size(), ", as many as layers"));
  }
  std::vector<ScaledLayer> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.push_back({weights[i].float_matrix("w"), format_from_json(formats[i])});
  }
  ChannelScales found;
  {
    const py::gil_scoped_release release;
    const HessianLocks hessians(&hessian, nullptr);
    found = search_channel_scales(layers, *hessians.first(), magnitudes,
                                  {.steps = to_int("steps", steps),
                                   .code_step = to_int("code_step", code_step),
                                   .threads = to_int("threads", threads)});
  }
  return to_python(found);
}

std::vector<float> values_of(const py::bytes& codes) {
  const std::string text = codes;
  std::vector<float> scales;
  for (const char code : text) scales.push_back(channel_scale(static_cast<int8_t>(code)));
  return scales;
}

}  // namespace

void bind_channel_scales(py::module_& module) {
  module.def("search_channel_scales", &search);
  module.def("channel_scales", &values_of);
  module.def("channel_scale_codes",
             [](const std::vector<double>& magnitudes, double exponent, int64_t code_step) {
               const auto codes = channel_scale_codes(magnitudes, exponent, to_int("code_step", code_step));
               return py::bytes(reinterpret_cast<const char*>(codes.data()), codes.size());
             });
  module.attr("LARGEST_SCALE_CODE") = kLargestScaleCode;
}

}  // namespace quantloom::python
