// k-means on CUDA devices. Python makes the device of the arrays current, allocates the results and passes
// the stream.
#include <pybind11/stl.h>

#include "arrays.hpp"
#include "fit.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"

namespace quantloom::python {
namespace {

void* to_stream(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

// `count` elements of `dtype` on a CUDA device.
void* device_array(const ArrayRef& array, const std::string& argument, DType dtype, int64_t count) {
  if (array.device() != Device::cuda) {
    throw TypeMismatch(argument, "memory of the CPU", "memory of a CUDA device");
  }
  if (array.dtype() != dtype) throw TypeMismatch(argument, name_of(array.dtype()), name_of(dtype));
  if (!array.contiguous()) throw InvalidArgument(argument, "an array with gaps", "a contiguous array");
  if (array.element_count() != count) {
    throw InvalidArgument(argument, text_of(array.element_count(), " of them"), text_of(count));
  }
  return array.data();
}

void nearest(const ArrayRef& x, const ArrayRef& centroids, const ArrayRef& codes, uintptr_t stream) {
  const CudaMatrix rows = x.cuda_matrix("x");
  const CudaMatrix table = centroids.cuda_matrix("centroids");
  auto* const out = static_cast<int32_t*>(device_array(codes, "codes", DType::i32, rows.rows));
  const py::gil_scoped_release release;
  nearest_neighbour_cuda(rows, table, out, to_stream(stream));
}

py::dict fit_codebook(const ArrayRef& x, int64_t count, const ArrayRef* weights, const std::string& start,
                      const ArrayRef* start_centroids, double threshold, int64_t max_sweeps,
                      bool reseed_empty, uint64_t seed, int64_t threads, const ArrayRef& centroids,
                      const ArrayRef& codes, uintptr_t stream) {
  const CudaMatrix rows = x.cuda_matrix("x");
  const KMeansOptions options =
      to_kmeans_options(start, start_centroids, threshold, max_sweeps, reseed_empty, seed, threads);
  const auto* const weight_data =
      weights == nullptr
          ? nullptr
          : static_cast<const float*>(device_array(*weights, "weights", DType::f32, rows.rows));
  auto* const centroid_data = static_cast<float*>(
      device_array(centroids, "centroids", DType::f32, checked_mul(std::max<int64_t>(count, 0), rows.cols)));
  auto* const code_data = static_cast<int32_t*>(device_array(codes, "codes", DType::i32, rows.rows));
  CudaKMeansReport report;
  {
    const py::gil_scoped_release release;
    report = kmeans_cuda(rows, count, options, weight_data, centroid_data, code_data, to_stream(stream));
  }
  py::dict fields;
  fields["sweeps"] = report.sweeps;
  fields["changed"] = report.changed;
  fields["converged"] = report.converged;
  fields["squared_error"] = report.squared_error;
  return fields;
}

}  // namespace

void bind_cuda_fit(py::module_& module) {
  module.def("nearest_neighbour_cuda", &nearest, py::arg("x"), py::arg("centroids"), py::arg("codes"),
             py::arg("stream"));
  module.def("kmeans_cuda", &fit_codebook, py::arg("x"), py::arg("count"), py::arg("weights").none(true),
             py::arg("start"), py::arg("start_centroids").none(true), py::arg("threshold"),
             py::arg("max_sweeps"), py::arg("reseed_empty"), py::arg("seed"), py::arg("threads"),
             py::arg("centroids"), py::arg("codes"), py::arg("stream"));
}

}  // namespace quantloom::python
