// Questions about the current CUDA device and about memory.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "common/check.cuh"
#include "quantloom/error.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom {

struct DeviceFacts {
  int index = 0;
  int processors = 0;    // streaming multiprocessors
  int architecture = 0;  // 90 for compute capability 9.0
  int code = 0;          // that of this build's code which the device runs: instructions up to it exist
  bool clusters = false;
  int shared_memory = 0;     // bytes that a block may have
  int processor_memory = 0;  // shared memory of a processor, of which each block takes 1 KiB besides its own
};

// The highest architecture of a list such as "80,86,90a" whose code runs on a device; 0 if none is known.
inline int code_architecture(std::string_view list, int device) {
  int highest = 0;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find_first_of(",;", begin), list.size());
    int number = 0;
    size_t i = begin;
    for (; i < end && list[i] >= '0' && list[i] <= '9'; ++i) number = 10 * number + (list[i] - '0');
    // Code for "90a" runs on 90 alone.
    const bool exact = i < end && list[i] == 'a';
    if (exact ? number == device : number <= device) highest = std::max(highest, number);
    begin = end + 1;
  }
  return highest;
}

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
  facts.code = code_architecture(cuda_architectures(), facts.architecture);
  facts.clusters = facts.code >= 90 && device_attribute(cudaDevAttrClusterLaunch, facts.index) != 0;
  facts.shared_memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, facts.index);
  facts.processor_memory = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, facts.index);
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
