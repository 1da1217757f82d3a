// The search for nearest centroids on tensor cores, prepared for a sample.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/device_buffer.hpp"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

class CodebookSearch {
 public:
  // For codebooks of `count` entries. `largest`: of the magnitudes of x and of all centroids to come.
  CodebookSearch(const CudaMatrix& x, int64_t count, float largest, cudaStream_t stream);

  // Enqueues the search. centroids [count, d] and codes [x.rows] on the device.
  void run(const float* centroids, int32_t* codes);

 private:
  CudaMatrix x_;
  int64_t count_;
  float factor_;
  int steps_;
  int64_t tiles_;  // of 8 entries, those of the padding included
  cudaStream_t stream_;
  DeviceBuffer<uint2> table_;     // [tiles][steps][lanes]
  DeviceBuffer<int32_t> open_;    // rows that scores cannot decide
  DeviceBuffer<int32_t> opened_;  // their number
};

}  // namespace quantloom::cuda
