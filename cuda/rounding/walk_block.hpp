// One block of columns of error feedback on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "rounding/rounders.cuh"

namespace quantloom::cuda {

inline constexpr int kWalkBlock = 128;  // the most columns in a block

struct WalkTask {
  float* working = nullptr;  // [n, stride]: weights, columns in the order of the walk
  int64_t stride = 0;
  int64_t n = 0;
  const float* upper = nullptr;  // [k, upper_stride]
  int64_t upper_stride = 0;
  const int32_t* group_at = nullptr;  // [k]: the group of each position
  uint8_t* codes = nullptr;           // [n, k], columns in the order of the walk
  int64_t k = 0;
  float* errors = nullptr;  // [n, kWalkBlock]: takes those of the block

  // With a search for outliers, weights whose error is above `largest` are kept as such, if their column is
  // not dead: missing [n, k], columns in the order of the walk, takes what they are beyond the dense value in
  // float16, outlier_count [1] grows, and overflow [1] takes the least row * k + position whose difference
  // float16 does not hold.
  uint16_t* missing = nullptr;
  float largest = 0;
  const uint8_t* dead_at = nullptr;  // [k]: by position
  unsigned long long* outlier_count = nullptr;
  unsigned long long* overflow = nullptr;
};

// Chooses the codes of positions [begin, begin + width), width <= kWalkBlock, pushing each column's error
// onto the rest of the block; what the errors do to later columns is left to the caller.
void walk_block(const WalkTask& task, const Rounder& rounder, int64_t begin, int width, cudaStream_t stream);

// out [n, stride]: column p is column order[p] of w, or zero where it is dead; zero beyond column k.
void gather_columns(const CudaMatrix& w, const int32_t* order, const uint8_t* dead, float* out,
                    int64_t stride, cudaStream_t stream);

}  // namespace quantloom::cuda
