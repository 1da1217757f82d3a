// Hessians and roundings on CUDA devices. Python makes the device of the arrays current and passes the
// stream.
#include <pybind11/stl.h>

#include <mutex>

#include "arrays.hpp"
#include "calibration.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "reports.hpp"

namespace quantloom::python {
namespace {

bool rounds_trellis_on_cuda(const Format& format) {
  const auto* trellis = dynamic_cast<const Trellis*>(&format);
  return trellis != nullptr && trellis->rotation > 0 && trellis->codebook.window == 16;
}

void* to_stream(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

// A Hessian that threads of Python may share; every use changes it on the device, so they take turns. To be
// locked without the GIL.
class SharedCudaHessian {
 public:
  explicit SharedCudaHessian(CudaHessian hessian) : hessian_(std::move(hessian)) {}

  template <class Body>
  auto use(const Body& body) {
    const py::gil_scoped_release release;
    const std::scoped_lock lock(mutex_);
    return body(hessian_);
  }
  std::mutex& mutex() { return mutex_; }
  const CudaHessian& value() const { return hessian_; }

 private:
  CudaHessian hessian_;
  std::mutex mutex_;
};

// Both locked, without the GIL; either may be null or the same as the other.
class CudaHessianPair {
 public:
  CudaHessianPair(SharedCudaHessian* first, SharedCudaHessian* second) : first_(first), second_(second) {
    if (first == second) second = nullptr;
    if (first != nullptr) first_lock_ = std::unique_lock(first->mutex(), std::defer_lock);
    if (second != nullptr) second_lock_ = std::unique_lock(second->mutex(), std::defer_lock);
    if (first != nullptr && second != nullptr) {
      std::lock(first_lock_, second_lock_);
    } else if (first != nullptr) {
      first_lock_.lock();
    } else if (second != nullptr) {
      second_lock_.lock();
    }
  }
  const CudaHessian* first() const { return first_ == nullptr ? nullptr : &first_->value(); }
  const CudaHessian* second() const { return second_ == nullptr ? nullptr : &second_->value(); }

 private:
  SharedCudaHessian* first_;
  SharedCudaHessian* second_;
  std::unique_lock<std::mutex> first_lock_;
  std::unique_lock<std::mutex> second_lock_;
};

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
    const CudaHessianPair hessians(hessian, held_out);
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
                        const Search& search, SharedCudaHessian* held_out, uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  RoundingReport report;
  {
    const py::gil_scoped_release release;
    const CudaHessianPair hessians(&hessian, held_out);
    CudaErrorFeedbackOptions options;
    options.damping = damping;
    options.damping_ladder = std::move(damping_ladder);
    options.act_order = act_order;
    options.static_groups = static_groups;
    options.block = block;
    options.scale_search = to_search(search);
    options.held_out = hessians.second();
    report = round_error_feedback_cuda(weights, packed, *hessians.first(), options, to_stream(stream));
  }
  return to_python(report);
}

py::dict trellis_feedback(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian,
                          bool consistent_hessian, bool refit, double damping, bool act_order,
                          SharedCudaHessian* held_out, uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  RoundingReport report;
  {
    const py::gil_scoped_release release;
    const CudaHessianPair hessians(&hessian, held_out);
    CudaErrorFeedbackOptions options;
    options.damping = damping;
    options.act_order = act_order;
    options.held_out = hessians.second();
    report = round_trellis_feedback_cuda(weights, packed, *hessians.first(), options,
                                         {consistent_hessian, refit, refit}, to_stream(stream));
  }
  return to_python(report);
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
  module.def("rounds_on_cuda", [](const std::string& format_json) {
    const auto format = format_from_json(format_json);
    return dynamic_cast<const Uniform*>(format.get()) != nullptr ||
           dynamic_cast<const Codebook*>(format.get()) != nullptr || rounds_trellis_on_cuda(*format);
  });
  module.def("walk_needs_group_index",
             [](const std::string& format_json, int64_t k, bool act_order, bool static_groups) {
               return walk_needs_group_index(*format_from_json(format_json), k, act_order, static_groups);
             });
  module.def("round_nearest_cuda", &nearest);
  module.def("round_error_feedback_cuda", &error_feedback);
  module.def("round_trellis_feedback_cuda", &trellis_feedback);
  module.def("packed_plane_names", [](const PackedTensor& packed) {
    std::vector<std::string> names;
    for (const auto& [name, plane] : packed.planes) names.push_back(name);
    return names;
  });
}

}  // namespace quantloom::python
