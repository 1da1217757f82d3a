#include "arrays.hpp"

#include <pybind11/stl.h>

#include <limits>

namespace quantloom::python {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

// The owner may be dropped by any thread, with or without the GIL.
std::shared_ptr<const void> keep_alive(py::object owner) {
  return {owner.release().ptr(), [](const void* object) {
            if (object == nullptr || Py_IsInitialized() == 0) return;
            const py::gil_scoped_acquire gil;
            Py_DECREF(static_cast<PyObject*>(const_cast<void*>(object)));
          }};
}

}  // namespace

ArrayRef::ArrayRef(uintptr_t address, const std::string& dtype, std::vector<int64_t> shape,
                   std::vector<int64_t> strides, const std::string& device, py::object owner)
    : data_(reinterpret_cast<void*>(address)),
      dtype_(dtype_from_name(dtype)),
      device_(device.starts_with("cuda") ? Device::cuda : Device::cpu),
      shape_(std::move(shape)),
      strides_(std::move(strides)),
      element_count_(checked_product(shape_)),
      owner_(std::move(owner)) {
  if (strides_.size() != shape_.size()) {
    throw InvalidArgument("strides", text_of(strides_.size(), " of them"), text_of(shape_.size()));
  }
  if (data_ == nullptr && element_count_ > 0) {
    throw InvalidArgument("array", "no memory", text_of(element_count_, " elements"));
  }
}

bool ArrayRef::contiguous() const {
  if (element_count_ == 0) return true;
  int64_t expected = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] != 1 && strides_[i] != expected) return false;
    expected *= shape_[i];  // a divisor of element_count_, which was checked
  }
  return true;
}

int64_t ArrayRef::row_stride() const {
  return element_count_ == 0 || shape_[0] <= 1 ? shape_[1] : strides_[0];
}

void ArrayRef::require_rank_2(std::string_view argument) const {
  if (shape_.size() != 2) throw InvalidArgument(argument, "shape " + shape_text(shape_), "2 dimensions");
  if (element_count_ > 0 && shape_[1] > 1 && strides_[1] != 1) {
    throw InvalidArgument(argument, text_of("elements ", strides_[1], " apart"), "contiguous rows");
  }
}

void ArrayRef::require_matrix(std::string_view argument) const {
  require_rank_2(argument);
  if (device_ != Device::cpu) throw TypeMismatch(argument, "memory of a CUDA device", "memory of the CPU");
  if (row_stride() < shape_[1]) {
    throw InvalidArgument(argument, text_of("rows ", row_stride(), " elements apart"),
                          text_of("at least ", shape_[1]));
  }
}

void ArrayRef::require_dtype(std::string_view argument, DType expected) const {
  if (dtype_ != expected) throw TypeMismatch(argument, name_of(dtype_), name_of(expected));
}

FloatMatrix ArrayRef::float_matrix(std::string_view argument) const {
  require_matrix(argument);
  return {data_, dtype_, shape_[0], shape_[1], row_stride()};
}

CudaMatrix ArrayRef::cuda_matrix(std::string_view argument) const {
  require_rank_2(argument);
  if (device_ != Device::cuda) throw TypeMismatch(argument, "memory of the CPU", "memory of a CUDA device");
  return {data_, dtype_, shape_[0], shape_[1], row_stride()};
}

Tensor ArrayRef::tensor(std::string_view argument) const {
  if (!contiguous()) throw InvalidArgument(argument, "an array with gaps", "a contiguous array");
  return {dtype_, shape_, data_, keep_alive(owner_), device_};
}

py::tuple to_numpy(const Tensor& tensor, bool writeable) {
  const std::string name(name_of(tensor.dtype()));
  const py::dtype dtype(tensor.dtype() == DType::bf16 ? "uint16" : name);
  auto* kept = new Tensor(tensor);
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<Tensor*>(pointer); });
  py::array array(dtype, tensor.shape(), kept->bytes(), owner);
  if (!writeable) array.attr("setflags")(py::arg("write") = false);
  return py::make_tuple(name, array);
}

py::dict to_numpy(const std::map<std::string, Tensor>& tensors, bool writeable) {
  py::dict result;
  for (const auto& [name, tensor] : tensors) result[py::str(name)] = to_numpy(tensor, writeable);
  return result;
}

std::map<std::string, Tensor> to_tensors(const std::map<std::string, ArrayRef>& arrays,
                                         const std::string& argument) {
  std::map<std::string, Tensor> result;
  for (const auto& [name, array] : arrays) result.emplace(name, array.tensor(argument + " " + name));
  return result;
}

int to_int(const std::string& argument, int64_t value) {
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
    throw InvalidArgument(argument, std::to_string(value), "a number of 32 bits");
  }
  return static_cast<int>(value);
}

void bind_arrays(py::module_& module) {
  py::class_<ArrayRef>(module, "ArrayRef")
      .def(py::init<uintptr_t, const std::string&, std::vector<int64_t>, std::vector<int64_t>,
                    const std::string&, py::object>(),
           py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("device"),
           py::arg("owner"))
      .def_property_readonly("strides", [](const ArrayRef& a) { return py::tuple(py::cast(a.strides())); })
      .def_property_readonly("contiguous", &ArrayRef::contiguous)
      .def_property_readonly("element_count", &ArrayRef::element_count);
}

}  // namespace quantloom::python
