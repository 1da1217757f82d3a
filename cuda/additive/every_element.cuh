// Launches whose threads take every so many-th element of an array.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

inline constexpr int kThreads = 256;  // of a block

inline unsigned blocks_for(int64_t threads) {
  constexpr int64_t kMostBlocks = 8192;
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMostBlocks));
}
__device__ __forceinline__ int64_t first_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * kThreads;
}

}  // namespace quantloom::cuda
