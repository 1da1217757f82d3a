// Scratch memory of the current CUDA device, in the order of a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/check.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

// `count` elements, not initialized; usable by work on `stream` from construction to destruction, without a
// wait of the host.
template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(int64_t count, cudaStream_t stream) : count_(count), stream_(stream) {
    const auto bytes = static_cast<size_t>(checked_mul(std::max<int64_t>(count, 1), sizeof(T)));
    cudaError_t status = cudaMallocAsync(&memory_, bytes, stream);
    pooled_ = status == cudaSuccess;
    if (!pooled_ && status != cudaErrorMemoryAllocation) {
      // Some drivers and virtual GPUs have no memory pools; any other trouble repeats here.
      static_cast<void>(cudaGetLastError());
      status = cudaMalloc(&memory_, bytes);
    }
    check_cuda(status, text_of("device memory, ", bytes, " bytes"));
  }
  ~DeviceBuffer() { release(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(count_, other.count_);
    std::swap(stream_, other.stream_);
    std::swap(pooled_, other.pooled_);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() const { return static_cast<T*>(memory_); }
  int64_t count() const { return count_; }
  void release() {
    if (memory_ == nullptr) return;
    // A destructor cannot report; a failure here repeats at the stream's next call.
    static_cast<void>(pooled_ ? cudaFreeAsync(memory_, stream_) : cudaFree(memory_));
    memory_ = nullptr;
  }

  void upload(const T* from, int64_t count) {
    if (count == 0) return;
    check_cuda(cudaMemcpyAsync(memory_, from, static_cast<size_t>(count) * sizeof(T), cudaMemcpyHostToDevice,
                               stream_),
               "copy to the device");
  }
  void fill_bytes(int byte) {
    check_cuda(cudaMemsetAsync(memory_, byte, static_cast<size_t>(count_) * sizeof(T), stream_),
               "fill of device memory");
  }

 private:
  void* memory_ = nullptr;
  int64_t count_ = 0;
  cudaStream_t stream_ = nullptr;
  bool pooled_ = false;
};

// Copies to the host and waits for the stream.
template <class T>
void download(const T* from, T* to, int64_t count, cudaStream_t stream) {
  if (count > 0) {
    check_cuda(
        cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(T), cudaMemcpyDeviceToHost, stream),
        "copy from the device");
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

}  // namespace quantloom::cuda
