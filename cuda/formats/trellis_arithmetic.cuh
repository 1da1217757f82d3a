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
// (a - the low or the high half of b) in both halves. The broadcast is part of the instruction: the compiler
// does not find it from a permutation of bytes.
__device__ __forceinline__ uint32_t pair_subtract_low(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      ".reg .b32 both;\n"
      "mov.b32 {low, high}, %2;\n"
      "mov.b32 both, {low, low};\n"
      "sub.rn.f16x2 %0, %1, both;\n"
      "}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32_t pair_subtract_high(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      ".reg .b32 both;\n"
      "mov.b32 {low, high}, %2;\n"
      "mov.b32 both, {high, high};\n"
      "sub.rn.f16x2 %0, %1, both;\n"
      "}"
      : "=r"(result)
      : "r"(a), "r"(b));
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
// Bytes of memory, a multiple of 16 at such an address, on their way to the level-2 cache. Nothing before
// sm_90.
__device__ __forceinline__ void prefetch_to_level_2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
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
