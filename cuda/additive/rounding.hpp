// Nearest rounding and error feedback for the format "additive" on the device.
#pragma once

#include "additive/additive_problem.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "rounding/rounds.hpp"

namespace quantloom::cuda {

// The format of `packed` if it is additive, else null.
const Additive* additive_of(const PackedTensor& packed);

// Throws InvalidArgument unless columns are whole blocks, as error feedback takes them.
void require_whole_steps(const CudaMatrix& w, const Additive& format);

// The format of a matrix that is rounded: its plane holds the tables, a description is small.
std::shared_ptr<const Additive> without_tables(const Additive& format);

// Of a matrix as `arrays` have it.
Losses additive_losses(const CudaMatrix& w, const Additive& format, const AdditiveArrays& arrays,
                       std::span<const CudaHessian* const> hessians, cudaStream_t stream);

// round_nearest_cuda() and round_error_feedback_cuda() for a format as additive_of() returns it. A format
// without tables has them fitted to w first. Both wait for the stream.
RoundingReport round_additive_nearest(const CudaMatrix& w, PackedTensor& packed, const Additive& format,
                                      const CudaNearestOptions& options, cudaStream_t stream);
RoundingReport round_additive_feedback(const CudaMatrix& w, PackedTensor& packed, const Additive& format,
                                       const CudaHessian& hessian, const CudaErrorFeedbackOptions& options,
                                       cudaStream_t stream);

}  // namespace quantloom::cuda
