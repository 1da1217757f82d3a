// Dequantization on a CUDA device: planes on the device in, float16, bfloat16 or float32 out.
#pragma once

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// True if this build holds CUDA kernels; false in a CPU-only build.
bool built_with_cuda();
// "13.0" and "80,90a"; both "" in a CPU-only build.
std::string cuda_toolkit_version();
std::string cuda_architectures();

// Decodes `packed`, whose planes are on the current CUDA device, to `out` [n, k] on the same device with
// `stride` elements between rows. `stream` is a cudaStream_t. Asynchronous: allocates nothing, does not
// synchronize, can be captured in a CUDA graph. Throws Unsupported in a CPU-only build.
void dequantize_cuda(const PackedTensor& packed, void* out, DType out_dtype, int64_t stride, void* stream);

}  // namespace quantloom
