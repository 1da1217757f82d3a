#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/kernels/cuda_check.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"

namespace quantloom::python {
namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

// pybind11 holds no pointers to const.
struct Prepared {
  std::shared_ptr<const PreparedTensor> tensor;
};

Activations to_activations(const std::string& name) {
  if (name == "exact") return Activations::exact;
  if (name == "int8") return Activations::int8;
  throw InvalidArgument("activations", name, "exact or int8");
}

py::list table() {
  py::list result;
  for (const KernelEntry& entry : kernel_table()) {
    py::dict row;
    row["operation"] = entry.operation;
    row["format"] = entry.format;
    row["bits"] = entry.bits;
    row["groups"] = entry.groups;
    row["device"] = entry.device;
    row["activations"] = entry.activations;
    row["tokens"] = entry.tokens;
    row["kernel"] = entry.kernel;
    row["target"] = entry.target;
    result.append(row);
  }
  return result;
}

py::list cuda_libraries() {
  py::list result;
  for (const CudaLibraryFacts& library : examine_cuda_libraries()) {
    py::dict row;
    row["name"] = library.name;
    row["path"] = library.path;
    row["problem"] = library.problem;
    result.append(row);
  }
  return result;
}

py::dict build_info() {
  py::list architectures;
  const std::string all = cuda_architectures();
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find_first_of(",;", begin), all.size());
    if (end > begin) architectures.append(all.substr(begin, end - begin));
    begin = end + 1;
  }
  py::dict info;
  info["version"] = QUANTLOOM_VERSION;
  info["cuda"] = built_with_cuda();
  info["cuda_toolkit"] = cuda_toolkit_version();
  info["architectures"] = architectures;
  info["compiler"] = kCompiler;
  info["cpu_target"] = cpu_target();
  return info;
}

}  // namespace

void bind_kernels(py::module_& module) {
  py::class_<Prepared>(module, "Prepared")
      .def_property_readonly("n", [](const Prepared& p) { return p.tensor->n(); })
      .def_property_readonly("k", [](const Prepared& p) { return p.tensor->k(); })
      .def_property_readonly("byte_count", [](const Prepared& p) { return p.tensor->byte_count(); });
  module.def("prepare", [](const PackedTensor& packed, int64_t threads) {
    const py::gil_scoped_release release;
    return Prepared{prepare(packed, to_int("threads", threads))};
  });
  module.def("matmul", [](const ArrayRef& x, const Prepared& w, const ArrayRef& y,
                          const std::string& activations, int64_t threads) {
    const FloatMatrix in = x.float_matrix("x");
    const auto out = y.matrix<float>("y", DType::f32);
    const MatmulOptions options{to_activations(activations), to_int("threads", threads)};
    const py::gil_scoped_release release;
    matmul(in, *w.tensor, out, options);
  });
  module.def("matmul_activations", [](const ArrayRef& x, const Prepared& w, const ArrayRef& y,
                                      const std::string& activations, int64_t threads) {
    const FloatMatrix in = x.float_matrix("x");
    const auto out = y.matrix<float>("y", DType::f32);
    const ActivationFormat format = activation_format_from_json(activations);
    const py::gil_scoped_release release;
    matmul(in, *w.tensor, out, format, to_int("threads", threads));
  });
  module.def("matmul_is_integer", [](const Prepared& w, const std::string& activations) {
    return matmul_is_integer(*w.tensor, activation_format_from_json(activations));
  });
  module.def("matmul_reference", [](const ArrayRef& x, const PackedTensor& packed, const ArrayRef& y) {
    const FloatMatrix in = x.float_matrix("x");
    const auto out = y.matrix<float>("y", DType::f32);
    const py::gil_scoped_release release;
    matmul_reference(in, packed, out);
  });
  module.def("dequantize_cuda", [](const PackedTensor& packed, const ArrayRef& out, uintptr_t stream) {
    out.require_rank_2("out");
    if (out.device() != Device::cuda)
      throw TypeMismatch("out", "memory of the CPU", "memory of a CUDA device");
    if (out.shape()[0] != packed.n || out.shape()[1] != packed.k) {
      throw InvalidArgument("out", text_of("shape [", out.shape()[0], ", ", out.shape()[1], "]"),
                            text_of("[", packed.n, ", ", packed.k, "]"));
    }
    const py::gil_scoped_release release;
    dequantize_cuda(packed, out.data(), out.dtype(), out.row_stride(), reinterpret_cast<void*>(stream));
  });
  module.def("multiply_on_cuda", [](const ArrayRef& x, const PackedTensor& packed, const ArrayRef& y) {
    const auto in = x.matrix<const float>("x", DType::f32);
    const auto out = y.matrix<float>("y", DType::f32);
    const py::gil_scoped_release release;
    multiply_on_cuda(packed, in, out);
  });
  module.def("multiply_integers_on_cuda", [](const ArrayRef& x, const PackedTensor& packed,
                                             const std::string& activations, const ArrayRef& y) {
    const auto in = x.matrix<const float>("x", DType::f32);
    const auto out = y.matrix<float>("y", DType::f32);
    const py::gil_scoped_release release;
    multiply_integers_on_cuda(packed, in, activation_format_from_json(activations), out);
  });
  module.def("cuda_libraries", &cuda_libraries);
  module.def("kernel_table", &table);
  module.def("built_with_cuda", &built_with_cuda);
  module.def("build_info", &build_info);
}

}  // namespace quantloom::python
