#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom::python {
namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

py::dict build_info() {
  py::list architectures;
  const std::string all = cuda_architectures();
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find(';', begin), all.size());
    if (end > begin) architectures.append(all.substr(begin, end - begin));
    begin = end + 1;
  }
  py::dict info;
  info["version"] = QUANTLOOM_VERSION;
  info["cuda"] = built_with_cuda();
  info["cuda_toolkit"] = cuda_toolkit_version();
  info["architectures"] = architectures;
  info["compiler"] = kCompiler;
  return info;
}

}  // namespace

void bind_kernels(py::module_& module) {
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
  module.def("built_with_cuda", &built_with_cuda);
  module.def("build_info", &build_info);
}

}  // namespace quantloom::python
