// What the search of a trellis computes: two float16 costs in a register.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace quantloom::cuda {

// (a - b), rounded, in both halves.
__device__ __forceinline__ uint32_t pair_subtract(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32_t pair_add(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
// d d + c, rounded once.
__device__ __forceinline__ uint32_t pair_square_add(uint32_t d, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %1, %2;" : "=r"(result) : "r"(d), "r"(c));
  return result;
}
// Costs are not negative, so their bits order as they do.
__device__ __forceinline__ uint32_t pair_min(uint32_t a, uint32_t b) {
  return __vminu2(a, b);
}
__device__ __forceinline__ uint32_t pair_min(uint32_t a, uint32_t b, uint32_t c) {
  return __vimin3_u16x2(a, b, c);
}
// The low halves of a and b in one register, and the high halves.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

}  // namespace quantloom::cuda
