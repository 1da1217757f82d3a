// The first scales, tables and codes of a matrix, on the device.
#pragma once

#include "additive/additive_problem.hpp"

namespace quantloom::cuda {

// [N, S]: root mean squares of what scales scale, on the host; 0 for zeros.
std::vector<double> mean_magnitudes(const CudaMatrix& w, const Additive& format, cudaStream_t stream);

// Scales of these magnitudes, the tables of `format`, and room for codes. Throws NumericError for scales that
// their type does not hold. Waits for the stream.
AdditiveArrays scaled_arrays(const CudaMatrix& w, const Additive& format,
                             const std::vector<double>& magnitudes, cudaStream_t stream);

// Scales and codes by the nearest entries, as round_nearest() has them, with the tables of `format`. Throws
// NumericError for scales that their type does not hold. Waits for the stream.
AdditiveArrays nearest_codes(const CudaMatrix& w, const Additive& format,
                             const std::vector<double>& magnitudes, cudaStream_t stream);

}  // namespace quantloom::cuda
