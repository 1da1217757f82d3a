// Memory that outlives streams: of the device that was current when it was taken, and words of the host that
// the device writes.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/check.cuh"
#include "quantloom/error.hpp"

namespace quantloom::kv_cache {

// Not initialized. Taken and given back outside of captures; giving back waits for the device's work.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes) : bytes_(bytes) {
    check_cuda(cudaMalloc(&memory_, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
               text_of("device memory, ", bytes, " bytes"));
  }
  ~DeviceMemory() {
    if (memory_ != nullptr) static_cast<void>(cudaFree(memory_));
  }
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  int64_t bytes() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

class HostWord {
 public:
  HostWord() {
    check_cuda(cudaHostAlloc(&memory_, sizeof(uint32_t), cudaHostAllocMapped),
               "memory that the device writes");
    store(0);
    const cudaError_t status = cudaHostGetDevicePointer(&device_, memory_, 0);
    if (status != cudaSuccess) static_cast<void>(cudaFreeHost(memory_));
    check_cuda(status, "memory that the device writes");
  }
  ~HostWord() { static_cast<void>(cudaFreeHost(memory_)); }
  HostWord(const HostWord&) = delete;
  HostWord& operator=(const HostWord&) = delete;

  uint32_t load() const { return *static_cast<volatile uint32_t*>(memory_); }
  void store(uint32_t value) { *static_cast<volatile uint32_t*>(memory_) = value; }
  uint32_t* on_device() const { return static_cast<uint32_t*>(device_); }

 private:
  void* memory_ = nullptr;
  void* device_ = nullptr;
};

}  // namespace quantloom::kv_cache
