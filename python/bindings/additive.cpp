#include "quantloom/formats/additive.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "cuda_calibration.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "reports.hpp"

namespace quantloom::python {
namespace {

std::shared_ptr<const Additive> additive_from_json(const std::string& json) {
  const auto format = std::dynamic_pointer_cast<const Additive>(format_from_json(json));
  if (format == nullptr) throw InvalidArgument("format", format_from_json(json)->spec(), "additive");
  return format;
}

// steps, scales, adam, learning rate, betas
using Refit = std::tuple<int64_t, bool, bool, double, std::array<double, 2>>;

// Sets what RefitOptions and BeamSearchOptions name differently.
void set_solver(const Refit& refit, RefitSolver& solver, AdamOptions& adam) {
  const auto& [steps, scales, by_adam, learning_rate, betas] = refit;
  solver = by_adam ? RefitSolver::adam : RefitSolver::conjugate_gradients;
  adam.learning_rate = learning_rate;
  adam.beta1 = betas[0];
  adam.beta2 = betas[1];
}

// beam, shuffled, seed, float64, damping
using Search = std::tuple<int64_t, bool, uint64_t, bool, double>;

CodeSearchOptions to_options(const Search& search, int64_t threads) {
  CodeSearchOptions options;
  const auto& [beam, shuffled, seed, float64, damping] = search;
  options.beam = to_int("beam", beam);
  options.shuffled = shuffled;
  options.seed = seed;
  options.float64 = float64;
  options.damping = damping;
  options.threads = to_int("threads", threads);
  return options;
}

BeamSearchOptions to_options(const Search& search, const Refit& refit, bool error_feedback,
                             int64_t max_rounds, double tolerance, int64_t sweeps, int64_t threads) {
  BeamSearchOptions options;
  options.search = to_options(search, threads);
  options.refit_steps = to_int("refit_steps", std::get<0>(refit));
  options.refit_scales = std::get<1>(refit);
  set_solver(refit, options.refit_solver, options.adam);
  options.start = error_feedback ? CodeStart::error_feedback : CodeStart::nearest;
  options.max_rounds = to_int("max_rounds", max_rounds);
  options.tolerance = tolerance;
  options.fit.sweeps = sweeps;
  return options;
}

py::tuple beam_search(const ArrayRef& w, const std::string& format, const SharedHessian& hessian,
                      const Search& search, const Refit& refit, bool error_feedback, int64_t max_rounds,
                      double tolerance, int64_t sweeps, const SharedHessian* held_out, int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  BeamSearched found;
  {
    const py::gil_scoped_release release;
    const HessianLocks hessians(&hessian, held_out);
    BeamSearchOptions options =
        to_options(search, refit, error_feedback, max_rounds, tolerance, sweeps, threads);
    options.held_out = hessians.second();
    found = round_beam_search(weights, additive_from_json(format), *hessians.first(), options);
  }
  py::dict fields = to_python(found.report);
  fields["losses"] = found.losses;
  return py::make_tuple(std::make_shared<PackedTensor>(std::move(found.tensor)), fields);
}

std::shared_ptr<PackedTensor> search(const ArrayRef& w, const PackedTensor& start,
                                     const SharedHessian& hessian, const Search& search,
                                     const std::vector<float>& penalties,
                                     const std::vector<int64_t>& row_groups, int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  const py::gil_scoped_release release;
  const HessianLocks hessians(&hessian, nullptr);
  CodeSearchOptions options = to_options(search, threads);
  options.code_penalties = penalties;
  return std::make_shared<PackedTensor>(search_codes(weights, start, *hessians.first(), options, row_groups));
}

RefitOptions to_options(const Refit& refit, bool tables, double damping, int64_t threads) {
  RefitOptions options;
  options.steps = to_int("steps", std::get<0>(refit));
  options.tables = tables;
  options.scales = std::get<1>(refit);
  options.damping = damping;
  options.threads = to_int("threads", threads);
  set_solver(refit, options.solver, options.adam);
  return options;
}

std::shared_ptr<PackedTensor> refit(const ArrayRef& w, const PackedTensor& start,
                                    const SharedHessian& hessian, const Refit& refit, bool tables,
                                    double damping, int64_t threads) {
  const FloatMatrix weights = w.float_matrix("w");
  const py::gil_scoped_release release;
  const HessianLocks hessians(&hessian, nullptr);
  const RefitOptions options = to_options(refit, tables, damping, threads);
  return std::make_shared<PackedTensor>(refit_tables(weights, start, *hessians.first(), options));
}

// Planes of `packed` are filled. Python makes their device current.
py::dict beam_search_cuda(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian,
                          const Search& search, const Refit& refit, bool error_feedback, int64_t max_rounds,
                          double tolerance, int64_t sweeps, SharedCudaHessian* held_out, int64_t threads,
                          uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  CudaBeamSearched found;
  {
    const py::gil_scoped_release release;
    const CudaHessianLocks hessians(&hessian, held_out);
    const BeamSearchOptions options =
        to_options(search, refit, error_feedback, max_rounds, tolerance, sweeps, threads);
    found = round_beam_search_cuda(weights, packed, *hessians.first(), options, hessians.second(),
                                   to_stream(stream));
  }
  py::dict fields = to_python(found.report);
  fields["losses"] = found.losses;
  return fields;
}

void search_cuda(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian, const Search& search,
                 const std::vector<float>& penalties, const std::vector<int64_t>& row_groups,
                 uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  const py::gil_scoped_release release;
  const CudaHessianLocks hessians(&hessian, nullptr);
  CodeSearchOptions options = to_options(search, 0);
  options.code_penalties = penalties;
  search_codes_cuda(weights, packed, *hessians.first(), options, row_groups, to_stream(stream));
}

void refit_cuda(const ArrayRef& w, PackedTensor& packed, SharedCudaHessian& hessian, const Refit& refit,
                bool tables, double damping, uintptr_t stream) {
  const CudaMatrix weights = w.cuda_matrix("w");
  const py::gil_scoped_release release;
  const CudaHessianLocks hessians(&hessian, nullptr);
  refit_tables_cuda(weights, packed, *hessians.first(), to_options(refit, tables, damping, 0),
                    to_stream(stream));
}

}  // namespace

void bind_additive(py::module_& module) {
  // `scale_group`: columns, or -1 for one scale per channel.
  module.def("additive_json", [](int64_t codebooks, int64_t bits, int64_t in_group, int64_t out_group,
                                 int64_t scale_group, const std::string& scale_dtype, int64_t scale_bits,
                                 int64_t table_bits, int64_t table_groups) {
    const AdditiveLevels levels{to_int("scale_bits", scale_bits), to_int("table_bits", table_bits),
                                table_groups};
    return Additive(to_int("codebooks", codebooks), to_int("bits", bits), in_group, out_group, scale_group,
                    dtype_from_name(scale_dtype), {}, levels)
        .to_json();
  });
  // Stored by the levels of another format of the same codes.
  module.def("additive_with_levels", [](const PackedTensor& packed, const std::string& format) {
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(with_levels(packed, additive_from_json(format)->levels));
  });
  module.def("additive_average_bits", [](const std::string& json, int64_t n, int64_t k) {
    return additive_from_json(json)->average_bits(n, k);
  });
  module.def("round_beam_search", &beam_search);
  module.def("search_codes", &search);
  module.def("refit_tables", &refit);
  module.def("round_beam_search_cuda", &beam_search_cuda);
  module.def("search_codes_cuda", &search_cuda);
  module.def("refit_tables_cuda", &refit_cuda);
}

}  // namespace quantloom::python
