#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/kernels/cuda_libraries.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom::python {
namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

std::shared_ptr<PreparedPlanes> make_prepared(const std::string& json, int64_t n, int64_t k,
                                              const std::map<std::string, ArrayRef>& planes) {
  auto prepared = std::make_shared<PreparedPlanes>();
  prepared->format = format_from_json(json);
  prepared->n = n;
  prepared->k = k;
  prepared->planes = to_tensors(planes, "prepared plane");
  validate(*prepared);
  return prepared;
}

py::list planes_of(const std::string& json, int64_t n, int64_t k, bool with_group_index) {
  py::list result;
  for (const PlaneSpec& spec : prepared_planes(*format_from_json(json), n, k, with_group_index)) {
    result.append(
        py::make_tuple(spec.name, std::string(name_of(spec.dtype)), py::tuple(py::cast(spec.shape))));
  }
  return result;
}

// `group_index`: of int32 on the CPU, or none.
py::object source_of(const std::string& json, int64_t k, const ArrayRef* group_index) {
  std::span<const int32_t> groups;
  Tensor plane;
  if (group_index != nullptr) {
    if (group_index->dtype() != DType::i32 || group_index->device() != Device::cpu) {
      throw TypeMismatch("group_index", name_of(group_index->dtype()), "int32 on the CPU");
    }
    plane = group_index->tensor("group_index");
    groups = plane.values<int32_t>();
  }
  const std::vector<int32_t> source = fragment_source(*format_from_json(json), k, groups);
  return py::array_t<int32_t>(static_cast<py::ssize_t>(source.size()), source.data());
}

CudaMatmulOptions to_options(bool overlap, const std::string& kernel, int64_t splits) {
  return {overlap, kernel, to_int("splits", splits)};
}

}  // namespace

// The arguments of products are plain numbers: the Python side has checked the tensors that they stand for,
// and the call itself must cost no more than a few microseconds.
void bind_cuda(py::module_& module) {
  py::class_<CudaMatmulOptions>(module, "CudaMatmulOptions")
      .def(py::init(&to_options), py::arg("overlap") = false, py::arg("kernel") = "", py::arg("splits") = 0);

  py::class_<PreparedPlanes, std::shared_ptr<PreparedPlanes>>(module, "PreparedPlanes")
      .def(py::init(&make_prepared), py::arg("format_json"), py::arg("n"), py::arg("k"), py::arg("planes"))
      .def("planes", [](const PreparedPlanes& p) { return to_numpy(p.planes, true); })
      .def(
          "workspace",
          [](const PreparedPlanes& w, int64_t m, const std::string& dtype, const CudaMatmulOptions& options) {
            return matmul_cuda_workspace(w, m, dtype_from_name(dtype), options);
          })
      .def("matmul", [](const PreparedPlanes& w, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y,
                        int64_t y_stride, int64_t m, const std::string& dtype, uintptr_t workspace,
                        int64_t workspace_bytes, uintptr_t stream, const CudaMatmulOptions& options) {
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
        const py::gil_scoped_release release;
        matmul_cuda(w, arguments, options);
      });

  module.def("decode_fragments_cuda", [](const PreparedPlanes& w, uintptr_t out, const std::string& dtype,
                                         int64_t stride, uintptr_t stream) {
    const DType type = dtype_from_name(dtype);
    const py::gil_scoped_release release;
    decode_fragments_cuda(w, pointer(out), type, stride, pointer(stream));
  });
  module.def("prepared_planes", &planes_of);
  module.def("fragment_source", &source_of, py::arg("format_json"), py::arg("k"),
             py::arg("group_index").none(true));
  module.def("prepare_fragments", [](const PackedTensor& packed) {
    const py::gil_scoped_release release;
    return std::make_shared<PreparedPlanes>(prepare_fragments(packed));
  });
  module.def("unprepare_fragments", [](const PreparedPlanes& prepared) {
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(unprepare_fragments(prepared));
  });
  module.def("prepare_cuda", [](const PackedTensor& packed, PreparedPlanes& prepared, uintptr_t stream) {
    const py::gil_scoped_release release;
    prepare_cuda(packed, prepared, pointer(stream));
  });
  module.def("unprepare_cuda", [](const PreparedPlanes& prepared, PackedTensor& packed, uintptr_t stream) {
    const py::gil_scoped_release release;
    unprepare_cuda(prepared, packed, pointer(stream));
  });
  module.def("why_not_matmul_cuda", [](const std::string& json, int64_t m, const std::string& dtype,
                                       const CudaMatmulOptions& options) {
    return why_not_matmul_cuda(*format_from_json(json), m, dtype_from_name(dtype), options);
  });
  module.def("set_cuda_library_folders", &set_cuda_library_folders);
}

}  // namespace quantloom::python
