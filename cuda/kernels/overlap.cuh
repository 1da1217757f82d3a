// Programmatic dependent launch: kernels of a stream that begin before the previous one has ended.
#pragma once

#include <cuda_runtime.h>

namespace quantloom::cuda {

// Lets the next kernel of the stream begin. Nothing where launches do not overlap.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits for the previous kernel of the stream to end. Every kernel that may overlap calls it, so that a
// kernel that has ended implies that all before it have.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launch settings with the attributes that are wanted.
struct LaunchSettings {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  LaunchSettings(dim3 grid, dim3 block, cudaStream_t stream, bool overlap, int cluster) {
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = attributes;
    if (overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
  }
  LaunchSettings(const LaunchSettings&) = delete;
  LaunchSettings& operator=(const LaunchSettings&) = delete;
};

}  // namespace quantloom::cuda
