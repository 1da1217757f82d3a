#include "calibration.hpp"

#include <algorithm>

#include "arrays.hpp"

namespace quantloom::python {
namespace {

template <class Body>
auto read(const SharedHessian& hessian, const Body& body) {
  const py::gil_scoped_release release;
  const auto lock = hessian.lock();
  return body(hessian.value());
}

py::object sum_of(const SharedHessian& hessian) {
  const Tensor copy = read(hessian, [](const Hessian& h) {
    Tensor result(DType::f64, {h.k(), h.k()});
    const auto out = result.values<double>();
    for (int64_t r = 0; r < h.k(); ++r) std::copy_n(h.sum().row(r), h.k(), out.data() + r * h.k());
    return result;
  });
  return to_numpy(copy, true)[1];
}

py::object diagonal_of(const SharedHessian& hessian) {
  const Tensor copy = read(hessian, [](const Hessian& h) {
    const std::vector<double> diagonal = h.diagonal();
    Tensor result(DType::f64, {h.k()});
    std::copy(diagonal.begin(), diagonal.end(), result.values<double>().begin());
    return result;
  });
  return to_numpy(copy, true)[1];
}

std::shared_ptr<SharedHessian> from_sum(const ArrayRef& sum, int64_t tokens) {
  const auto view = sum.matrix<const double>("sum", DType::f64);
  const py::gil_scoped_release release;
  return std::make_shared<SharedHessian>(Hessian(view, tokens));
}

}  // namespace

void bind_calibration(py::module_& module) {
  py::class_<SharedHessian, std::shared_ptr<SharedHessian>>(module, "Hessian")
      .def(py::init([](int64_t k) { return std::make_shared<SharedHessian>(Hessian(k)); }), py::arg("k"))
      .def_static("from_sum", &from_sum, py::arg("sum"), py::arg("tokens"))
      .def("add",
           [](SharedHessian& hessian, const ArrayRef& x, int64_t threads) {
             const FloatMatrix view = x.float_matrix("x");
             const py::gil_scoped_release release;
             hessian.add(view, to_int("threads", threads));
           })
      .def_property_readonly(
          "k", [](const SharedHessian& hessian) { return hessian.value().k(); })  // never changes
      .def_property_readonly("tokens",
                             [](const SharedHessian& hessian) {
                               return read(hessian, [](const Hessian& h) { return h.tokens(); });
                             })
      .def("sum", &sum_of)
      .def("diagonal", &diagonal_of);
  module.def("proxy_loss", [](const ArrayRef& w, const ArrayRef& decoded, const SharedHessian& hessian,
                              const SharedHessian* output_hessian, int64_t threads) {
    const FloatMatrix weights = w.float_matrix("w");
    const auto other = decoded.matrix<const float>("decoded", DType::f32);
    const int team = to_int("threads", threads);
    const py::gil_scoped_release release;
    const HessianLocks hessians(&hessian, output_hessian);
    return hessians.second() == nullptr
               ? proxy_loss(weights, other, *hessians.first(), team)
               : proxy_loss(weights, other, *hessians.first(), *hessians.second(), team);
  });
}

}  // namespace quantloom::python
