// Products of integers on a CUDA device. Descriptions of activations are those of activations.cpp, made once.
#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom::python {
namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

std::shared_ptr<IntegerPlanes> make_integers(const std::string& json, int64_t n, int64_t k,
                                             std::vector<int32_t> outlier_columns,
                                             const std::map<std::string, ArrayRef>& planes) {
  auto prepared = std::make_shared<IntegerPlanes>();
  prepared->format = format_from_json(json);
  prepared->n = n;
  prepared->k = k;
  prepared->outlier_columns = std::move(outlier_columns);
  prepared->planes = to_tensors(planes, "prepared plane");
  validate_integers(*prepared);
  return prepared;
}

py::list planes_of(const std::string& json, int64_t n, int64_t k, int64_t outlier_columns,
                   bool with_group_index) {
  py::list result;
  for (const PlaneSpec& spec :
       integer_planes(*format_from_json(json), n, k, outlier_columns, with_group_index)) {
    result.append(
        py::make_tuple(spec.name, std::string(name_of(spec.dtype)), py::tuple(py::cast(spec.shape))));
  }
  return result;
}

void multiply(const IntegerPlanes& w, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y,
              int64_t y_stride, int64_t m, const std::string& dtype, uintptr_t workspace,
              int64_t workspace_bytes, uintptr_t stream, const ActivationFormat& activations, bool overlap) {
  CudaMatmulArguments arguments;
  arguments.x = pointer(x);
  arguments.x_stride = x_stride;
  arguments.bias = pointer(bias);
  arguments.y = pointer(y);
  arguments.y_stride = y_stride;
  arguments.m = m;
  arguments.dtype = dtype_from_name(dtype);
  arguments.workspace = pointer(workspace);
  arguments.workspace_bytes = workspace_bytes;
  arguments.stream = pointer(stream);
  CudaIntegerOptions options;
  options.overlap = overlap;
  const py::gil_scoped_release release;
  matmul_integers_cuda(w, arguments, activations, options);
}

}  // namespace

void bind_cuda_integers(py::module_& module) {
  py::class_<IntegerPlanes, std::shared_ptr<IntegerPlanes>>(module, "IntegerPlanes")
      .def(py::init(&make_integers), py::arg("format_json"), py::arg("n"), py::arg("k"),
           py::arg("outlier_columns"), py::arg("planes"))
      .def("planes", [](const IntegerPlanes& p) { return to_numpy(p.planes, true); })
      .def_readonly("outlier_columns", &IntegerPlanes::outlier_columns)
      .def("workspace",
           [](const IntegerPlanes& w, int64_t m, const std::string& dtype,
              const ActivationFormat& activations) {
             return matmul_integers_cuda_workspace(w, m, dtype_from_name(dtype), activations);
           })
      .def("matmul", &multiply, py::arg("x"), py::arg("x_stride"), py::arg("bias"), py::arg("y"),
           py::arg("y_stride"), py::arg("m"), py::arg("dtype"), py::arg("workspace"),
           py::arg("workspace_bytes"), py::arg("stream"), py::arg("activations"), py::arg("overlap") = false);

  module.def("integer_planes", &planes_of);
  module.def("prepare_integers", [](const PackedTensor& packed, std::vector<int32_t> outlier_columns) {
    const py::gil_scoped_release release;
    return std::make_shared<IntegerPlanes>(prepare_integers(packed, std::move(outlier_columns)));
  });
  module.def("unprepare_integers", [](const IntegerPlanes& prepared) {
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(unprepare_integers(prepared));
  });
  module.def("prepare_integers_cuda",
             [](const PackedTensor& packed, IntegerPlanes& prepared, uintptr_t stream) {
               const py::gil_scoped_release release;
               prepare_integers_cuda(packed, prepared, pointer(stream));
             });
  module.def("unprepare_integers_cuda",
             [](const IntegerPlanes& prepared, PackedTensor& packed, uintptr_t stream) {
               const py::gil_scoped_release release;
               unprepare_integers_cuda(prepared, packed, pointer(stream));
             });
  module.def("why_not_integers",
             [](const std::string& json) { return why_not_integers(*format_from_json(json)); });
  module.def("why_not_matmul_integers_cuda", [](const std::string& json, const ActivationFormat& activations,
                                                int64_t k, const std::string& dtype) {
    return why_not_matmul_integers_cuda(*format_from_json(json), activations, k, dtype_from_name(dtype));
  });
}

}  // namespace quantloom::python
