// Arrays of Python as views, and tensors of the library as NumPy arrays. No memory is copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "quantloom/cuda_matrix.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom::python {

namespace py = pybind11;

// An array that Python owns: NumPy, torch, or any other that has an address. Strides are in elements.
// Made and destroyed with the GIL held; its views may be read without it.
class ArrayRef {
 public:
  ArrayRef(uintptr_t address, const std::string& dtype, std::vector<int64_t> shape,
           std::vector<int64_t> strides, const std::string& device, py::object owner);

  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  void* data() const { return data_; }
  int64_t element_count() const { return element_count_; }
  // Row-major without gaps; strides of dimensions of size 1 do not count.
  bool contiguous() const;

  // Each throws TypeMismatch or InvalidArgument, naming `argument`, unless the array is on the CPU and has
  // the rank and dtype.
  FloatMatrix float_matrix(std::string_view argument) const;
  template <class T>
  MatrixView<T> matrix(std::string_view argument, DType expected) const {
    require_matrix(argument);
    require_dtype(argument, expected);
    return {static_cast<T*>(data_), shape_[0], shape_[1], row_stride()};
  }
  // The array is on a CUDA device, which the functions that take the view check further.
  CudaMatrix cuda_matrix(std::string_view argument) const;
  // Keeps the array alive. Needs the GIL. Throws InvalidArgument unless contiguous.
  Tensor tensor(std::string_view argument) const;
  // The distance between rows, of a size that views accept where there is at most one row.
  int64_t row_stride() const;
  void require_rank_2(std::string_view argument) const;

 private:
  void require_matrix(std::string_view argument) const;
  void require_dtype(std::string_view argument, DType expected) const;

  void* data_ = nullptr;
  DType dtype_ = DType::f32;
  Device device_ = Device::cpu;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  int64_t element_count_ = 0;
  py::object owner_;
};

// (dtype name, array over the tensor's memory); bfloat16 comes as its 16 bits in uint16.
py::tuple to_numpy(const Tensor& tensor, bool writeable);
py::dict to_numpy(const std::map<std::string, Tensor>& tensors, bool writeable);
std::map<std::string, Tensor> to_tensors(const std::map<std::string, ArrayRef>& arrays,
                                         const std::string& argument);

void bind_activations(py::module_& module);
void bind_arrays(py::module_& module);
void bind_formats(py::module_& module);
void bind_entropy(py::module_& module);
void bind_calibration(py::module_& module);
void bind_additive(py::module_& module);
void bind_rounding(py::module_& module);
void bind_channel_scales(py::module_& module);
void bind_cuda_rounding(py::module_& module);
void bind_fit(py::module_& module);
void bind_trellis(py::module_& module);
void bind_elements(py::module_& module);
void bind_cuda_fit(py::module_& module);
void bind_cuda_trellis(py::module_& module);
void bind_kernels(py::module_& module);
void bind_cuda(py::module_& module);
void bind_cuda_integers(py::module_& module);
void bind_coded(py::module_& module);
void bind_kv_cache(py::module_& module);
void bind_cuda_kv_cache(py::module_& module);
void bind_transforms(py::module_& module);
void bind_io(py::module_& module);

// An int of Python (checked there to fit 64 bits) as int; throws InvalidArgument out of range.
int to_int(const std::string& argument, int64_t value);

}  // namespace quantloom::python
