#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/transforms/hadamard.hpp"
#include "quantloom/transforms/hadamard_cuda.hpp"

namespace quantloom::python {
namespace {

// The elements of an optional vector on the CPU.
template <class T>
std::span<const T> vector_of(const std::string& argument, const ArrayRef* array, DType dtype) {
  if (array == nullptr) return {};
  if (array->dtype() != dtype) throw TypeMismatch(argument, name_of(array->dtype()), name_of(dtype));
  if (array->device() != Device::cpu) {
    throw TypeMismatch(argument, "memory of a CUDA device", "memory of the CPU");
  }
  if (array->shape().size() != 1 || !array->contiguous()) {
    throw InvalidArgument(argument, text_of(array->shape().size(), " dimensions, or gaps"),
                          "a contiguous vector");
  }
  return {static_cast<const T*>(array->data()), static_cast<size_t>(array->element_count())};
}

void transform(const ArrayRef& x, const ArrayRef& out, int64_t block, bool inverse, const ArrayRef* signs,
               double scale, const ArrayRef* channel_scale, int64_t threads) {
  const FloatMatrix from = x.float_matrix("x");
  const FloatMatrix to = out.float_matrix("out");
  if (to.dtype() != from.dtype()) throw TypeMismatch("out", name_of(to.dtype()), name_of(from.dtype()));
  if (to.rows() != from.rows() || to.cols() != from.cols()) {
    throw InvalidArgument("out", text_of("shape [", to.rows(), ", ", to.cols(), "]"),
                          text_of("[", from.rows(), ", ", from.cols(), "]"));
  }
  HadamardOptions options;
  options.block = block;
  options.inverse = inverse;
  options.signs = vector_of<uint8_t>("signs", signs, DType::u8);
  options.scale = static_cast<float>(scale);
  options.channel_scale = vector_of<float>("scale", channel_scale, DType::f32);
  options.threads = to_int("threads", threads);
  const py::gil_scoped_release release;
  hadamard(from, out.data(), to.stride(), options);
}

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

// Plain numbers, as for products: the Python side has checked the tensors that they stand for.
void transform_cuda(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows,
                    int64_t cols, const std::string& dtype, int64_t block, bool inverse, uintptr_t signs,
                    double scale, uintptr_t channel_scale, uintptr_t stream) {
  CudaHadamardOptions options;
  options.block = block;
  options.inverse = inverse;
  options.signs = static_cast<const uint8_t*>(pointer(signs));
  options.scale = static_cast<float>(scale);
  options.channel_scale = static_cast<const float*>(pointer(channel_scale));
  const CudaMatrix from{pointer(x), dtype_from_name(dtype), rows, cols, x_stride};
  const py::gil_scoped_release release;
  hadamard_cuda(from, pointer(out), out_stride, options, pointer(stream));
}

py::object size_of_block(int64_t n) {
  const std::optional<HadamardSize> size = hadamard_size(n);
  if (!size) return py::none();
  return py::make_tuple(size->order, size->power);
}

py::object why_not_cuda(int64_t n, const std::string& dtype) {
  const std::optional<HadamardSize> size = hadamard_size(n);
  if (!size) return py::str("no Hadamard matrix of this size is known");
  const std::optional<std::string> reason = why_not_hadamard_cuda(*size, dtype_from_name(dtype));
  if (!reason) return py::none();
  return py::str(*reason);
}

}  // namespace

void bind_transforms(py::module_& module) {
  module.def("hadamard", &transform, py::arg("x"), py::arg("out"), py::arg("block"), py::arg("inverse"),
             py::arg("signs").none(true), py::arg("scale"), py::arg("channel_scale").none(true),
             py::arg("threads"));
  module.def("hadamard_cuda", &transform_cuda);
  module.def("hadamard_size", &size_of_block);
  module.def("why_not_hadamard_cuda", &why_not_cuda);
  module.def("largest_hadamard_block", &largest_hadamard_block);
  module.def("require_hadamard_block", [](int64_t cols, int64_t block) {
    const HadamardSize size = require_hadamard_block(cols, block);
    return size.order << size.power;
  });
  module.def("hadamard_matrix", [](int64_t n) {
    const std::vector<int8_t> values = hadamard_matrix(n);
    return py::array_t<int8_t>({n, n}, values.data());
  });
  module.def("random_signs", [](int64_t cols, uint64_t seed) {
    const std::vector<uint8_t> bits = random_signs(cols, seed);
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(bits.size()), bits.data());
  });
}

}  // namespace quantloom::python
