// The checks of the arguments of products, and of what brings matrices into their order, before anything is
// launched.
#pragma once

#include <string>

#include "common/device.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}
// Throws InvalidArgument naming `argument`.
void require_aligned(const void* pointer, const char* argument, int64_t bytes);
// Sizes and strides. Throws InvalidArgument, or Unsupported for more tokens than kernels count.
void require_arguments(const PreparedPlanes& w, const CudaMatmulArguments& a);
// The planes lie on the device, as kernels read them.
void require_planes(const PreparedPlanes& w, int device);
// So do they, x, y, bias and `workspace` bytes.
void require_memory(const PreparedPlanes& w, const CudaMatmulArguments& a, int64_t workspace, int device);

// Both are of one matrix, with or without a plane group_index, on the current device; each was validated.
void require_same_matrix(const PackedTensor& packed, const PreparedPlanes& prepared);

}  // namespace quantloom
