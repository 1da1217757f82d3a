#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/activations/quantized_activations.hpp"

namespace quantloom::python {

void bind_activations(py::module_& module) {
  module.def("activations_from_spec",
             [](const std::string& spec) { return activation_format_from_spec(spec).to_json(); });
  module.def("activations_canonical",
             [](const std::string& json) { return activation_format_from_json(json).to_json(); });
  module.def("activations_spec",
             [](const std::string& json) { return activation_format_from_json(json).spec(); });
  module.def("activations_with_range", [](const std::string& json, double low, double high) {
    return with_range(activation_format_from_json(json), static_cast<float>(low), static_cast<float>(high))
        .to_json();
  });
  module.def("quantize_activations", [](const ArrayRef& x, const std::string& json, int64_t threads) {
    const FloatMatrix in = x.float_matrix("x");
    const ActivationFormat format = activation_format_from_json(json);
    QuantizedActivations result;
    {
      const py::gil_scoped_release release;
      result = quantize_activations(in, format, to_int("threads", threads));
    }
    return to_numpy(result.planes, true);
  });
  module.def("dequantize_activations", [](const std::map<std::string, ArrayRef>& planes,
                                          const std::string& json, const ArrayRef& out, int64_t threads) {
    const auto view = out.matrix<float>("out", DType::f32);
    const QuantizedActivations x{activation_format_from_json(json), view.rows(), view.cols(),
                                 to_tensors(planes, "plane")};
    const py::gil_scoped_release release;
    dequantize_activations(x, view, to_int("threads", threads));
  });
  module.def("round_activations",
             [](const ArrayRef& x, const ArrayRef& out, const std::string& json, int64_t threads) {
               const FloatMatrix in = x.float_matrix("x");
               const auto view = out.matrix<float>("out", DType::f32);
               const ActivationFormat format = activation_format_from_json(json);
               const py::gil_scoped_release release;
               round_activations(in, format, view, to_int("threads", threads));
             });
}

}  // namespace quantloom::python
