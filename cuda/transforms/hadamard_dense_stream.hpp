// Launches of the kernels of hadamard_dense_stream.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "common/device.hpp"
#include "quantloom/transforms/hadamard.hpp"
#include "transforms/hadamard_values.cuh"

namespace quantloom::cuda {

// Whether there is a kernel for blocks of this size on the device; it has been launched then. T: float,
// __half or __nv_bfloat16.
template <class T>
bool launch_dense_stream(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                         cudaStream_t stream);

}  // namespace quantloom::cuda
