// Questions about the current CUDA device and about memory.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "common/check.cuh"
#include "quantloom/error.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom {

struct DeviceFacts {
  int index = 0;
  int processors = 0;    // streaming multiprocessors
  int architecture = 0;  // 90 for compute capability 9.0
  bool clusters = false;
  int shared_memory = 0;  // bytes that a block may have
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "attribute of the CUDA device");
  return value;
}

inline DeviceFacts current_device() {
  DeviceFacts facts;
  check_cuda(cudaGetDevice(&facts.index), "current CUDA device");
  facts.processors = device_attribute(cudaDevAttrMultiProcessorCount, facts.index);
  facts.architecture = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, facts.index) +
                       device_attribute(cudaDevAttrComputeCapabilityMinor, facts.index);
  facts.clusters = device_attribute(cudaDevAttrClusterLaunch, facts.index) != 0;
  facts.shared_memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, facts.index);
  return facts;
}

// Without this check a host pointer, or one of another GPU, would surface later as an illegal access that
// ends the process's CUDA context.
inline void require_on_device(const void* pointer, const std::string& argument, int device) {
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, pointer), "place of " + argument);
  if (attributes.type == cudaMemoryTypeManaged) return;
  if (attributes.type != cudaMemoryTypeDevice) {
    throw InvalidArgument(argument, "memory of the host", "memory of a CUDA device");
  }
  if (attributes.device != device) {
    throw InvalidArgument(argument, text_of("memory of CUDA device ", attributes.device),
                          text_of("memory of the current device, ", device));
  }
}

// The bytes of a plane on device `device`.
inline const std::byte* device_plane(const Tensor& plane, const std::string& argument, int device) {
  if (plane.device() != Device::cuda) {
    throw InvalidArgument(argument, "a plane on the CPU", "a plane on the current CUDA device");
  }
  if (plane.element_count() > 0) require_on_device(plane.bytes(), argument, device);
  return plane.bytes();
}

}  // namespace quantloom
