// Hessians and roundings on CUDA devices. Python makes the device of the arrays current and passes the
// stream.
#include <pybind11/stl.h>

#include <vector>

#include "arrays.hpp"
#include "cuda_calibration.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "reports.hpp"

namespace quantloom::python {
namespace {

py::object sum_of(SharedCudaHessian& shared, uintptr_t stream) {
  const Tensor copy = shared.use([&](const CudaHessian& hessian) {
    const Hessian on_cpu = hessian.to_cpu(to_stream(stream));
    const int64_t k = on_cpu.k();
    Tensor result(DType::f64, {k, k});
    const auto out = result.values<double>();
    for (int64_t r = 0; r < k; ++r) std::copy_n(on_cpu.sum().row(r), k, out.data() + r * k);
    return result;
  });
  return to_numpy(copy, true)[1];
}

py::object diagonal_of(SharedCudaHessian& shared, uintptr_t stream) {
  const Tensor copy = shared.use([&](const CudaHessian& hessian) {
    const std::vector<double> diagonal = hessian.diagonal(to_stream(stream));
    Tensor result(DType::f64, {hessian.k()});
    std::copy(diagonal.begin(), diagonal.end(), result.values<double>().begin());
    return result;
  });
  return to_numpy(copy, true)[1];
}

py::dict nearest(const ArrayRef& w, PackedTensor& packed, const Search& search, SharedCudaHessian* hessian,
                 SharedCudaHessian* held_out, uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  RoundingReport report;
  {
    const py::gil_scoped_release release;
    const CudaHessianLocks hessians(hessian, held_out);
    CudaNearestOptions options;
    options.scale_search = to_search(search);
    options.hessian = hessians.first();
    options.held_out = hessians.second();
    report = round_nearest_cuda(weights, packed, options, to_stream(stream));
  }
  return to_python(report);
}

py::dict error_feedback(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian, double damping,
                        std::vector<double> damping_ladder, bool act_order, bool static_groups, int64_t block,
                        const Search& search, const Budget& outliers, SharedCudaHessian* held_out,
                        uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  RoundingReport report;
  {
    const py::gil_scoped_release release;
    const CudaHessianLocks hessians(&hessian, held_out);
    CudaErrorFeedbackOptions options;
    options.damping = damping;
    options.damping_ladder = std::move(damping_ladder);
    options.act_order = act_order;
    options.static_groups = static_groups;
    options.block = block;
    options.scale_search = to_search(search);
    options.outliers = to_outlier_search(outliers);
    options.held_out = hessians.second();
    report = round_error_feedback_cuda(weights, packed, *hessians.first(), options, to_stream(stream));
  }
  return to_python(report);
}

py::dict trellis_feedback(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian,
                          bool consistent_hessian, bool refit, std::vector<double> ratio_factors,
                          double damping, std::vector<double> damping_ladder, bool act_order, int64_t block,
                          SharedCudaHessian* held_out, SharedCudaHessian* output_hessian, uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  RoundingReport report;
  {
    const py::gil_scoped_release release;
    const CudaHessianLocks hessians(&hessian, held_out, output_hessian);
    CudaErrorFeedbackOptions options;
    options.output_hessian = hessians.third();
    options.damping = damping;
    options.damping_ladder = std::move(damping_ladder);
    options.act_order = act_order;
    options.block = block;
    options.held_out = hessians.second();
    report = round_trellis_feedback_cuda(weights, packed, *hessians.first(), options,
                                         {consistent_hessian, refit, refit, std::move(ratio_factors)},
                                         to_stream(stream));
  }
  return to_python(report);
}

py::dict search_scales(const std::vector<ArrayRef>& weights, const std::vector<std::string>& formats,
                       SharedCudaHessian& hessian, const std::vector<double>& magnitudes, int64_t steps,
                       int64_t code_step, uintptr_t stream) {
  if (weights.size() != formats.size()) {
    throw InvalidArgument("formats", text_of(formats.size()), text_of(weights.size(), ", as many as layers"));
  }
  std::vector<CudaScaledLayer> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.push_back({weights[i].cuda_matrix("w"), format_from_json(formats[i])});
  }
  ChannelScaleOptions options;
  options.steps = to_int("steps", steps);
  options.code_step = to_int("code_step", code_step);
  ChannelScales found;
  {
    const py::gil_scoped_release release;
    const CudaHessianLocks hessians(&hessian, nullptr);
    found = search_channel_scales_cuda(layers, *hessians.first(), magnitudes, options, to_stream(stream));
  }
  return to_python(found);
}

}  // namespace

void bind_cuda_rounding(py::module_& module) {
  py::class_<SharedCudaHessian, std::shared_ptr<SharedCudaHessian>>(module, "CudaHessian")
      .def(py::init([](int64_t k) {
             const py::gil_scoped_release release;
             return std::make_shared<SharedCudaHessian>(CudaHessian(k));
           }),
           py::arg("k"))
      .def_static("from_cpu",
                  [](const SharedHessian& hessian) {
                    const py::gil_scoped_release release;
                    const auto lock = hessian.lock();
                    return std::make_shared<SharedCudaHessian>(CudaHessian(hessian.value()));
                  })
      .def("to_cpu",
           [](SharedCudaHessian& shared, uintptr_t stream) {
             return shared.use([&](const CudaHessian& hessian) {
               return std::make_shared<SharedHessian>(hessian.to_cpu(to_stream(stream)));
             });
           })
      .def("add",
           [](SharedCudaHessian& shared, const ArrayRef& x, uintptr_t stream) {
             const CudaMatrix view = x.cuda_matrix("x");
             shared.use([&](CudaHessian& hessian) { hessian.add(view, to_stream(stream)); });
           })
      .def_property_readonly("k", [](const SharedCudaHessian& shared) { return shared.value().k(); })
      .def_property_readonly("tokens",
                             [](SharedCudaHessian& shared) {
                               return shared.use([](const CudaHessian& hessian) { return hessian.tokens(); });
                             })
      .def("sum", &sum_of)
      .def("diagonal", &diagonal_of);
  module.def("rounds_on_cuda",
             [](const std::string& format_json) { return rounds_on_cuda(*format_from_json(format_json)); });
  module.def("walk_needs_group_index",
             [](const std::string& format_json, int64_t k, bool act_order, bool static_groups) {
               return walk_needs_group_index(*format_from_json(format_json), k, act_order, static_groups);
             });
  module.def("round_nearest_cuda", &nearest);
  module.def("round_error_feedback_cuda", &error_feedback);
  module.def("round_trellis_feedback_cuda", &trellis_feedback);
  module.def("rounds_columns_on_cuda", [](const std::string& format_json) {
    return rounds_columns_on_cuda(*format_from_json(format_json));
  });
  // Of a plane on a CUDA device: address, shape, dtype. The memory lives as long as `packed`.
  module.def("plane_memory", [](const PackedTensor& packed, const std::string& name) {
    const Tensor& plane = packed.plane(name);
    return py::make_tuple(reinterpret_cast<uintptr_t>(plane.bytes()), plane.shape(),
                          std::string(name_of(plane.dtype())));
  });
  module.def("search_channel_scales_cuda", &search_scales);
  module.def("packed_plane_names", [](const PackedTensor& packed) {
    std::vector<std::string> names;
    for (const auto& [name, plane] : packed.planes) names.push_back(name);
    return names;
  });
}

}  // namespace quantloom::python
