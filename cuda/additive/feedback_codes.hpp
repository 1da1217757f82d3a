// The first codes of a matrix with feedback of errors, on the device.
#pragma once

#include "additive/additive_problem.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom::cuda {

// Scales and codes as round_error_feedback() has them, scales fitted before the walk, with the tables of
// `format` and the damping, order and block of `options`. `diagonal`: diag(H), of a Hessian that is usable.
// k must be a multiple of in_group. `damping_tried` takes what was tried. Throws NumericError for scales that
// their type does not hold, and for a Hessian without factor. Waits for the stream.
AdditiveArrays feedback_codes(const CudaMatrix& w, const Additive& format, const CudaHessian& hessian,
                              const std::vector<double>& diagonal, const CudaErrorFeedbackOptions& options,
                              std::vector<double>& damping_tried, cudaStream_t stream);

}  // namespace quantloom::cuda
