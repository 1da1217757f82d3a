// The extension quantloom._core: the C++ library for the Python package, which checks arguments and
// writes the documentation. Nothing here is public.
#include <pybind11/pybind11.h>

#include "arrays.hpp"
#include "quantloom/error.hpp"

namespace quantloom::python {
namespace {

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const TypeMismatch& error) {
    py::set_error(PyExc_TypeError, error.what());
  } catch (const IoError& error) {
    py::set_error(PyExc_OSError, error.what());
  } catch (const Unsupported& error) {
    py::set_error(PyExc_RuntimeError, error.what());
  } catch (const Error& error) {  // InvalidArgument, NumericError, FileFormatError
    py::set_error(PyExc_ValueError, error.what());
  }
}

}  // namespace
}  // namespace quantloom::python

PYBIND11_MODULE(_core, module) {
  using namespace quantloom::python;
  module.attr("__version__") = QUANTLOOM_VERSION;
  py::register_local_exception_translator(&translate);
  bind_arrays(module);
  bind_formats(module);
  bind_entropy(module);
  bind_calibration(module);
  bind_rounding(module);
  bind_additive(module);
  bind_channel_scales(module);
  bind_cuda_rounding(module);
  bind_fit(module);
  bind_trellis(module);
  bind_elements(module);
  bind_cuda_fit(module);
  bind_cuda_trellis(module);
  bind_activations(module);
  bind_kv_cache(module);
  bind_cuda_kv_cache(module);
  bind_kernels(module);
  bind_cuda(module);
  bind_cuda_integers(module);
  bind_coded(module);
  bind_transforms(module);
  bind_io(module);
}
