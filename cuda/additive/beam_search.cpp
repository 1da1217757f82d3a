#include <algorithm>
#include <limits>

#include "additive/code_sweep.hpp"
#include "additive/feedback_codes.hpp"
#include "additive/first_codes.hpp"
#include "additive/refit.hpp"
#include "additive/rounding.hpp"
#include "common/device_pointer.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "rounding/additive_checks.hpp"
#include "rounding/rounds.hpp"
#include "rounding/upper_factor.hpp"

namespace quantloom {
namespace {

using cuda::AdditiveArrays;

// Everything but the values of planes.
const Additive& require_arguments(const CudaMatrix& w, const PackedTensor& packed, const CudaHessian& hessian,
                                  double damping, cudaStream_t stream) {
  const auto* const format = dynamic_cast<const Additive*>(packed.format.get());
  if (format == nullptr) {
    throw InvalidArgument("packed", packed.format == nullptr ? "no format" : packed.format->spec(),
                          "planes of the format additive");
  }
  require_without_levels(*format);
  require_damping(damping);
  cuda::require_matrix(w, "w");
  cuda::require_same_shape(w, packed);
  cuda::require_planes(packed);
  require_whole_row_groups(*format, w.rows);
  cuda::require_hessian(hessian, w.cols, "hessian");
  cuda::require_usable(hessian, hessian.diagonal(stream), stream);
  if (std::max(w.rows, w.cols) > std::numeric_limits<int>::max() - Additive::kMostWeights) {
    throw InvalidArgument("w", text_of("[", w.rows, ", ", w.cols, "]"), "fewer than 2^31 rows and columns");
  }
  return *format;
}

void require_finite_values(const PackedTensor& packed, cudaStream_t stream) {
  for (const char* const name : {"codebook", "scales"}) {
    const Tensor& plane = packed.plane(name);
    const int64_t count = plane.element_count();
    if (count == 0) continue;
    cuda::require_finite_cuda({plane.bytes(), plane.dtype(), 1, count, count}, text_of("plane ", name),
                              stream);
  }
}

AdditiveArrays copy_of(const AdditiveArrays& arrays, cudaStream_t stream) {
  const auto copied = [&](const auto& from) {
    auto to = std::decay_t<decltype(from)>(from.count(), stream);
    if (from.count() > 0) {
      check_cuda(
          cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(from.count()) * sizeof(*from.data()),
                          cudaMemcpyDeviceToDevice, stream),
          "copy of codes and tables");
    }
    return to;
  };
  return {copied(arrays.tables), copied(arrays.scales), copied(arrays.codes)};
}

}  // namespace

void search_codes_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                       const CodeSearchOptions& options, std::span<const int64_t> row_groups,
                       void* stream_given) {
  const auto stream = static_cast<cudaStream_t>(stream_given);
  const Additive& format = require_arguments(w, packed, hessian, options.damping, stream);
  require_valid(options, format);
  require_row_groups(row_groups, format.row_groups(w.rows));
  require_finite_values(packed, stream);
  const cuda::AdditiveProblem problem(w, format, hessian, options.damping, stream);
  AdditiveArrays arrays = cuda::unpack_additive(format, packed, stream);
  cuda::sweep_codes(problem, arrays, options, row_groups);
  cuda::pack_additive(format, arrays, packed, stream);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

void refit_tables_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                       const RefitOptions& options, void* stream_given) {
  const auto stream = static_cast<cudaStream_t>(stream_given);
  require_valid(options);
  require_conjugate_gradients(options.solver);
  const Additive& format = require_arguments(w, packed, hessian, options.damping, stream);
  require_finite_values(packed, stream);
  const cuda::AdditiveProblem problem(w, format, hessian, options.damping, stream);
  AdditiveArrays arrays = cuda::unpack_additive(format, packed, stream);
  cuda::refit_arrays(problem, arrays, options);
  cuda::pack_additive(format, arrays, packed, stream);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

CudaBeamSearched round_beam_search_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                                        const BeamSearchOptions& options, const CudaHessian* held_out,
                                        void* stream_given) {
  const auto stream = static_cast<cudaStream_t>(stream_given);
  require_valid(options);
  require_conjugate_gradients(options.refit_solver);
  if (options.held_out != nullptr) {
    throw InvalidArgument("options.held_out", "a Hessian of the CPU", "none: held_out is one of the device");
  }
  const Additive& wanted = require_arguments(w, packed, hessian, options.search.damping, stream);
  require_valid(options.search, wanted);
  if (options.start == CodeStart::error_feedback) cuda::require_whole_steps(w, wanted);
  if (held_out != nullptr) {
    cuda::require_hessian(*held_out, w.cols, "held_out");
    static_cast<void>(held_out->sum(stream));
  }
  const cuda::AdditiveProblem problem(w, wanted, hessian, options.search.damping, stream);

  const std::vector<double> diagonal = hessian.diagonal(stream);
  const std::shared_ptr<const Format> given = packed.format;  // keeps `wanted` alive
  auto format = std::static_pointer_cast<const Additive>(given);
  if (format->tables.empty()) {
    AdditiveFitOptions fit = options.fit;
    if (fit.column_weights.empty()) fit.column_weights = diagonal;
    fit.threads = options.search.threads;
    format = fit_additive_cuda(wanted, w, fit, stream_given);
  }
  CudaBeamSearched result;
  std::vector<const CudaHessian*> hessians = {&hessian};
  if (options.measure_losses && held_out != nullptr) hessians.push_back(held_out);
  const double weights = static_cast<double>(w.rows) * static_cast<double>(w.cols);
  const auto damped = [&](const cuda::Losses& losses) {
    return losses.proxy_losses[0] + problem.shift() * losses.mean_squared_error * weights;
  };
  const auto losses_of = [&](const AdditiveArrays& arrays) {
    return cuda::additive_losses(w, *format, arrays, hessians, stream);
  };
  AdditiveArrays best = cuda::nearest_codes(w, *format, cuda::mean_magnitudes(w, *format, stream), stream);
  const cuda::Losses nearest = losses_of(best);
  cuda::Losses own = nearest;
  if (options.start == CodeStart::error_feedback && w.rows > 0 && w.cols > 0) {
    CudaErrorFeedbackOptions feedback;
    feedback.damping = std::max(feedback.damping, options.search.damping);
    std::vector<double> damping_tried;
    best = cuda::feedback_codes(w, *format, hessian, diagonal, feedback, damping_tried, stream);
    own = losses_of(best);
  }
  // Keeps `arrays` if they err less.
  const auto keep = [&](AdditiveArrays& arrays) {
    cuda::Losses losses = losses_of(arrays);
    if (!(damped(losses) < result.losses.back())) return false;
    result.losses.push_back(damped(losses));
    own = std::move(losses);
    best = std::move(arrays);
    return true;
  };
  result.losses.push_back(damped(own));
  const RefitOptions refit = {.steps = options.refit_steps,
                              .tables = true,
                              .scales = options.refit_scales,
                              .damping = options.search.damping,
                              .threads = options.search.threads};
  CodeSearchOptions search = options.search;
  bool improves = result.losses.back() > 0;
  for (int round = 0; round < options.max_rounds && improves; ++round, ++search.seed) {
    const double before = result.losses.back();
    AdditiveArrays arrays = copy_of(best, stream);
    cuda::refit_arrays(problem, arrays, refit);
    cuda::sweep_codes(problem, arrays, search, {});
    improves = keep(arrays) && result.losses.back() < (1 - options.tolerance) * before;
  }
  if (options.refit_steps > 0 && result.losses.back() > 0) {
    AdditiveArrays arrays = copy_of(best, stream);
    cuda::refit_arrays(problem, arrays, refit);
    static_cast<void>(keep(arrays));
  }
  cuda::pack_additive(*format, best, packed, stream);
  packed.format = cuda::without_tables(wanted);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");

  RoundingReport& report = result.report;
  report.method = "beam_search";
  report.damping = options.search.damping;
  report.damping_tried = {options.search.damping};
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  report.mean_squared_error = own.mean_squared_error;
  if (!options.measure_losses) return result;
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.proxy_losses[0];
  if (held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.proxy_losses[1];
  }
  return result;
}

}  // namespace quantloom
