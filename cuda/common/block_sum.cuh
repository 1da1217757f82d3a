// Sums over the threads of a block, always in the same order.
#pragma once

namespace quantloom::cuda {

// The sum of `value` over a block of kThreads threads, a power of two; for every thread.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = parts[0];
  __syncthreads();
  return sum;
}

}  // namespace quantloom::cuda
