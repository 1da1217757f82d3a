// Scales of a matrix that was rounded to a trellis on the device, fitted again as the CPU's functions of
// these names do. They change result.scales alone: decoded values follow when they are decoded again.
// diagonal: diag(H).
#pragma once

#include "quantloom/calibration/cuda_hessian.hpp"
#include "rounding/trellis_task.hpp"

namespace quantloom::cuda {

void refit_output_scales(const TrellisTask& task, const CudaHessian& hessian,
                         const std::vector<double>& diagonal, TrellisResult& result);
void refit_input_scales(const TrellisTask& task, const CudaHessian& hessian,
                        const std::vector<double>& diagonal, TrellisResult& result);

// Under tr(H_out E H E^T).
struct BothHessians {
  const CudaHessian& input;
  const CudaHessian& output;
  const std::vector<double>& input_diagonal;
  const std::vector<double>& output_diagonal;
};
void refit_output_scales(const TrellisTask& task, const BothHessians& hessians, TrellisResult& result);
void refit_input_scales(const TrellisTask& task, const BothHessians& hessians, TrellisResult& result);
// tr(H_out E H E^T) of E = w - decoded.
double two_sided_loss(const TrellisTask& task, const BothHessians& hessians, const float* decoded);

}  // namespace quantloom::cuda
