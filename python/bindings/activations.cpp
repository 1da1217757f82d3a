#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/activations/quantized_activations.hpp"

namespace quantloom::python {

namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

CudaActivationScratch scratch_of(uintptr_t index, uintptr_t workspace, int64_t workspace_bytes) {
  return {static_cast<const int32_t*>(pointer(index)), pointer(workspace), workspace_bytes};
}

// Names, dtypes and shapes.
py::list planes_of(const ActivationFormat& format, int64_t m, int64_t k, int64_t outliers) {
  py::list result;
  for (const PlaneSpec& spec : activation_planes(format, m, k, outliers)) {
    result.append(
        py::make_tuple(spec.name, std::string(name_of(spec.dtype)), py::tuple(py::cast(spec.shape))));
  }
  return result;
}

// On a CUDA device. Matrices are plain numbers, as for products: the Python side has checked the tensors that
// they stand for, and a call must cost no more than a few microseconds.
void bind_cuda_activations(py::module_& module) {
  py::class_<ActivationFormat>(module, "ActivationDescription")
      .def(py::init(&activation_format_from_json))
      .def("planes", &planes_of)
      .def("cuda_workspace", &activations_cuda_workspace);
  module.def("outlier_index_words", &outlier_index_words);
  module.def("outlier_index", [](const std::vector<int32_t>& columns, int64_t k) {
    const std::vector<int32_t> index = outlier_index(columns, k);
    return py::array_t<int32_t>(static_cast<py::ssize_t>(index.size()), index.data());
  });
  module.def("find_activation_outliers_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const ActivationFormat& format, uintptr_t index, uintptr_t count, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               const py::gil_scoped_release release;
               find_activation_outliers_cuda(matrix, format, static_cast<int32_t*>(pointer(index)),
                                             static_cast<int32_t*>(pointer(count)), pointer(stream));
             });
  module.def("quantize_activations_cuda", [](uintptr_t x, int64_t stride, int64_t m, int64_t k,
                                             const std::string& dtype, const ActivationFormat& format,
                                             const std::map<std::string, ArrayRef>& planes, uintptr_t index,
                                             uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
    const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
    QuantizedActivations out{format, m, k, to_tensors(planes, "plane")};
    const py::gil_scoped_release release;
    quantize_activations_cuda(matrix, out, scratch_of(index, workspace, workspace_bytes), pointer(stream));
  });
  module.def("round_activations_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const ActivationFormat& format, uintptr_t out, int64_t out_stride, uintptr_t index,
                uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               const py::gil_scoped_release release;
               round_activations_cuda(matrix, format, pointer(out), out_stride,
                                      scratch_of(index, workspace, workspace_bytes), pointer(stream));
             });
  module.def("dequantize_activations_cuda",
             [](const std::map<std::string, ArrayRef>& planes, const ActivationFormat& format, int64_t m,
                int64_t k, uintptr_t out, const std::string& dtype, uintptr_t stream) {
               const QuantizedActivations x{format, m, k, to_tensors(planes, "plane")};
               const DType type = dtype_from_name(dtype);
               const py::gil_scoped_release release;
               dequantize_activations_cuda(x, pointer(out), type, k, pointer(stream));
             });
}

}  // namespace

void bind_activations(py::module_& module) {
  bind_cuda_activations(module);
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
