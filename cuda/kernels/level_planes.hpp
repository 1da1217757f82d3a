// Prepared planes of additive formats whose scales or tables are codes into levels.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/additive_layout.hpp"

namespace quantloom::cuda {

// Expands what is a code on the stream and prepares the matrix without levels; codes and levels are copied.
void prepare_levels(const PackedTensor& packed, PreparedPlanes& prepared, cudaStream_t stream);
void unprepare_levels(const PreparedPlanes& prepared, PackedTensor& packed, cudaStream_t stream);

}  // namespace quantloom::cuda
