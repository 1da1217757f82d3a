// Checks of arguments that point to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <string_view>

#include "common/check.cuh"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/error.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom::cuda {

// Without this check a host pointer, or one of another GPU, would surface later as an illegal access that
// ends the process's CUDA context.
inline void require_device_memory(const void* pointer, const std::string& argument) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "current CUDA device");
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, pointer), "place of " + argument);
  const bool managed = attributes.type == cudaMemoryTypeManaged;
  if (!managed && attributes.type != cudaMemoryTypeDevice) {
    throw TypeMismatch(argument, "memory of the host", "memory of a CUDA device");
  }
  if (!managed && attributes.device != current) {
    throw TypeMismatch(argument, text_of("memory of CUDA device ", attributes.device),
                       text_of("memory of the current device, ", current));
  }
}

inline void require_matrix(const CudaMatrix& matrix, const std::string& argument) {
  // For its checks of dtype, sizes and stride; nothing is read.
  static_cast<void>(FloatMatrix(matrix.data, matrix.dtype, matrix.rows, matrix.cols, matrix.stride));
  if (matrix.rows == 0 || matrix.cols == 0) return;
  if (reinterpret_cast<uintptr_t>(matrix.data) % static_cast<uintptr_t>(size_of(matrix.dtype)) != 0) {
    throw InvalidArgument(argument, "an address that is not a multiple of the element size",
                          "an aligned address");
  }
  require_device_memory(matrix.data, argument);
}

// Checks names, dtypes and shapes too.
inline void require_planes(const PackedTensor& packed) {
  validate(packed);
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cuda) {
      throw TypeMismatch("packed." + name, "a plane on the CPU", "a plane on the current CUDA device");
    }
    if (plane.element_count() > 0) require_device_memory(plane.bytes(), "packed." + name);
  }
}

}  // namespace quantloom::cuda
