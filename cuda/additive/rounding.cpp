#include "additive/rounding.hpp"

#include <algorithm>
#include <limits>

#include "additive/feedback_codes.hpp"
#include "additive/first_codes.hpp"
#include "common/device_pointer.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/additive_checks.hpp"
#include "rounding/outlier_search.hpp"
#include "rounding/scale_search.hpp"
#include "rounding/upper_factor.hpp"
#include "rounding/walk.hpp"

namespace quantloom::cuda {
namespace {

void require_planes_of(const CudaMatrix& w, const PackedTensor& packed, const Additive& format) {
  require_without_levels(format);
  require_matrix(w, "w");
  require_same_shape(w, packed);
  require_planes(packed);
  if (std::max(w.rows, w.cols) > std::numeric_limits<int>::max() - Additive::kMostWeights) {
    throw InvalidArgument("w", text_of("[", w.rows, ", ", w.cols, "]"), "fewer than 2^31 rows and columns");
  }
  static_cast<void>(format.planes(w.rows, w.cols));
}

void require_no_search(const std::optional<ScaleSearch>& search, const Additive& format) {
  if (!search) return;
  throw Unsupported(text_of("scale_search: one for ", format.spec(), " runs on the CPU only"));
}

// The format with tables: its own, or fitted to w.
std::shared_ptr<const Additive> with_tables(const Additive& format, const CudaMatrix& w,
                                            cudaStream_t stream) {
  if (format.tables.empty()) return fit_additive_cuda(format, w, {}, stream);
  return std::make_shared<const Additive>(format);
}

AdditiveArrays nearest_arrays(const CudaMatrix& w, const Additive& format, cudaStream_t stream) {
  return nearest_codes(w, format, mean_magnitudes(w, format, stream), stream);
}

// Writes planes and format; waits for the stream.
void store(const Additive& format, const AdditiveArrays& arrays, PackedTensor& packed, cudaStream_t stream) {
  pack_additive(format, arrays, packed, stream);
  packed.format = without_tables(format);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

// Of a matrix without weights: planes and losses.
void store_nothing(const CudaMatrix& w, PackedTensor& packed, bool measured, bool held_out,
                   RoundingReport& report, cudaStream_t stream) {
  const FloatMatrix empty(nullptr, w.dtype, w.rows, w.cols, w.stride);
  const PackedTensor result = round_nearest(empty, packed.format).tensor;
  copy_planes(result, packed, stream);
  packed.format = result.format;
  if (measured) report.proxy_loss = report.proxy_loss_nearest = 0;
  if (measured && held_out) report.held_out_loss = report.held_out_loss_nearest = 0;
}

}  // namespace

const Additive* additive_of(const PackedTensor& packed) {
  return dynamic_cast<const Additive*>(packed.format.get());
}

void require_whole_steps(const CudaMatrix& w, const Additive& format) {
  if (w.cols % format.in_group == 0) return;
  throw InvalidArgument("w", text_of(w.cols, " columns"),
                        text_of("a multiple of ", format.in_group, ", the format's step"));
}

std::shared_ptr<const Additive> without_tables(const Additive& format) {
  return std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                          format.scale_group, format.scale_dtype);
}

Losses additive_losses(const CudaMatrix& w, const Additive& format, const AdditiveArrays& arrays,
                       std::span<const CudaHessian* const> hessians, cudaStream_t stream) {
  if (w.rows == 0 || w.cols == 0) return {0, std::vector<double>(hessians.size(), 0.0)};
  const auto errors_of = [&](int64_t first_row, int64_t rows, double* errors, double* partial) {
    additive_errors(w, format, arrays, first_row, rows, errors, partial, stream);
  };
  return measure_losses(w.rows, w.cols, errors_of, hessians, stream);
}

RoundingReport round_additive_nearest(const CudaMatrix& w, PackedTensor& packed, const Additive& format,
                                      const CudaNearestOptions& options, cudaStream_t stream) {
  if (options.scale_search) require_valid(*options.scale_search);
  require_no_search(options.scale_search, format);
  if (options.hessian != nullptr) require_hessian(*options.hessian, w.cols, "hessian");
  if (options.held_out != nullptr) require_hessian(*options.held_out, w.cols, "held_out");
  require_planes_of(w, packed, format);
  RoundingReport report;
  report.method = "nearest";
  if (options.hessian != nullptr) report.tokens = options.hessian->tokens();
  if (w.rows == 0 || w.cols == 0) {
    store_nothing(w, packed, options.hessian != nullptr, false, report, stream);
    if (options.held_out != nullptr) report.held_out_loss = report.held_out_loss_nearest = 0;
    return report;
  }
  require_finite_cuda(w, "w", stream);
  std::vector<const CudaHessian*> hessians;
  if (options.hessian != nullptr) hessians.push_back(options.hessian);
  if (options.held_out != nullptr) hessians.push_back(options.held_out);
  // Before any plane is written: a Hessian whose tokens held a NaN throws here.
  for (const CudaHessian* hessian : hessians) static_cast<void>(hessian->sum(stream));
  const std::shared_ptr<const Additive> fitted = with_tables(format, w, stream);
  const AdditiveArrays arrays = nearest_arrays(w, *fitted, stream);
  const Losses losses = additive_losses(w, *fitted, arrays, hessians, stream);
  store(*fitted, arrays, packed, stream);
  report.mean_squared_error = losses.mean_squared_error;
  if (options.hessian != nullptr) report.proxy_loss = losses.proxy_losses.front();
  if (options.held_out != nullptr) report.held_out_loss = losses.proxy_losses.back();
  report.proxy_loss_nearest = report.proxy_loss;
  report.held_out_loss_nearest = report.held_out_loss;
  return report;
}

RoundingReport round_additive_feedback(const CudaMatrix& w, PackedTensor& packed, const Additive& format,
                                       const CudaHessian& hessian, const CudaErrorFeedbackOptions& options,
                                       cudaStream_t stream) {
  if (options.outliers) static_cast<void>(scalar_bits(format));
  if (options.output_hessian != nullptr) {
    throw InvalidArgument("output_hessian", text_of("one for ", format.spec()),
                          "none: feedback along rows is for a trellis with its rotation");
  }
  ErrorFeedbackOptions checked;
  checked.damping = options.damping;
  checked.damping_ladder = options.damping_ladder;
  checked.block = options.block;
  checked.scale_search = options.scale_search;
  require_valid(checked);
  require_no_search(options.scale_search, format);
  require_planes_of(w, packed, format);
  require_hessian(hessian, w.cols, "hessian");
  if (options.held_out != nullptr) require_hessian(*options.held_out, w.cols, "held_out");
  require_whole_steps(w, format);
  if (!options.static_groups && w.cols > 0 && format.scale_count(w.cols) > 1) {
    throw Unsupported(text_of("static_groups: scales of ", format.spec(),
                              " that are fitted on the walk run on the CPU only"));
  }
  const std::vector<double> diagonal = hessian.diagonal(stream);
  require_usable(hessian, diagonal, stream);
  if (options.held_out != nullptr) static_cast<void>(options.held_out->sum(stream));
  require_finite_cuda(w, "w", stream);
  RoundingReport report;
  report.method = "gptq";
  report.act_order = options.act_order;
  report.static_groups = true;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  if (w.rows == 0 || w.cols == 0) {
    report.damping = options.damping;
    report.damping_tried = {options.damping};
    store_nothing(w, packed, options.measure_losses, options.held_out != nullptr, report, stream);
    return report;
  }
  const std::shared_ptr<const Additive> fitted = with_tables(format, w, stream);
  const AdditiveArrays arrays =
      feedback_codes(w, *fitted, hessian, diagonal, options, report.damping_tried, stream);
  report.damping = report.damping_tried.back();
  std::vector<const CudaHessian*> hessians;
  if (options.measure_losses) {
    hessians.push_back(&hessian);
    if (options.held_out != nullptr) hessians.push_back(options.held_out);
  }
  const Losses losses = additive_losses(w, *fitted, arrays, hessians, stream);
  report.mean_squared_error = losses.mean_squared_error;
  if (options.measure_losses) {
    const Losses nearest = additive_losses(w, *fitted, nearest_arrays(w, *fitted, stream), hessians, stream);
    report.proxy_loss = losses.proxy_losses[0];
    report.proxy_loss_nearest = nearest.proxy_losses[0];
    if (options.held_out != nullptr) {
      report.held_out_loss = losses.proxy_losses[1];
      report.held_out_loss_nearest = nearest.proxy_losses[1];
    }
  }
  store(*fitted, arrays, packed, stream);
  return report;
}

}  // namespace quantloom::cuda
