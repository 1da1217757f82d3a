// Rounding to a trellis in its rotated basis on the device, for rounding/cuda.hpp.
#pragma once

#include <cuda_runtime_api.h>

#include "quantloom/formats/trellis.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom::cuda {

// The trellis of `packed`, null for another format. Throws Unsupported for one without rotation, or whose
// window is not 16.
const Trellis* trellis_of(const PackedTensor& packed);

RoundingReport round_trellis_nearest(const CudaMatrix& w, PackedTensor& packed, const Trellis& format,
                                     const CudaNearestOptions& options, cudaStream_t stream);

}  // namespace quantloom::cuda
