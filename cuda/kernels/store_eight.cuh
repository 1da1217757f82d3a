// Eight decoded values to memory, at an address of 16 bytes, rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace quantloom::cuda {

__device__ __forceinline__ void store_eight(const float (&values)[8], float* to) {
  reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}
__device__ __forceinline__ void store_eight(const float (&values)[8], __half* to) {
  __half2 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ void store_eight(const float (&values)[8], __nv_bfloat16* to) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
}

}  // namespace quantloom::cuda
