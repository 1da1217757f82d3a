// Arithmetic on two float16 or bfloat16 in one register, and the tensor-core product on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quantloom::cuda {

template <class T>
struct HalfPair;

// The bits of a float16 that equals `value`: normal, and exact.
__host__ __device__ constexpr uint32_t float16_bits(float value) {
  const auto bits = __builtin_bit_cast(uint32_t, value);
  return (bits >> 16 & 0x8000U) | (((bits >> 23 & 0xFFU) - 112U) << 10 | (bits >> 13 & 0x3FFU));
}

template <>
struct HalfPair<__half> {
  static constexpr uint32_t kOne = 0x3C003C00U;
  // 2^kMantissa as a value: its low mantissa bits take an integer in place.
  static constexpr int kMantissa = 10;
  static constexpr uint32_t kInteger = 0x64006400U;
  // A constant that float16 holds exactly, in both halves.
  template <float kValue>
  static constexpr uint32_t kBoth = float16_bits(kValue) * 0x10001U;

  static __device__ __forceinline__ uint32_t both(float value) { return bits(__float2half2_rn(value)); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return bits(__hadd2_rn(pair(a), pair(b)));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return bits(__hmul2_rn(pair(a), pair(b)));
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return bits(__hfma2(pair(a), pair(b), pair(c)));
  }
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float low(uint32_t value) { return __half2float(half(value & 0xFFFFU)); }
  static __device__ __forceinline__ float high(uint32_t value) { return __half2float(half(value >> 16)); }

 private:
  static __device__ __forceinline__ __half half(uint32_t bits) {
    return __builtin_bit_cast(__half, static_cast<unsigned short>(bits));
  }
  static __device__ __forceinline__ __half2 pair(uint32_t value) {
    return *reinterpret_cast<const __half2*>(&value);
  }
  static __device__ __forceinline__ uint32_t bits(__half2 value) {
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

template <>
struct HalfPair<__nv_bfloat16> {
  static constexpr uint32_t kOne = 0x3F803F80U;
  static constexpr int kMantissa = 7;
  static constexpr uint32_t kInteger = 0x43004300U;
  template <float kValue>
  static constexpr uint32_t kBoth = (__builtin_bit_cast(uint32_t, kValue) >> 16) * 0x10001U;

  static __device__ __forceinline__ uint32_t both(float value) { return bits(__float2bfloat162_rn(value)); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return bits(__hadd2_rn(pair(a), pair(b)));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return bits(__hmul2_rn(pair(a), pair(b)));
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return bits(__hfma2(pair(a), pair(b), pair(c)));
  }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) {
    return __float2bfloat16_rn(value);
  }
  static __device__ __forceinline__ float low(uint32_t value) {
    return __builtin_bit_cast(float, value << 16);
  }
  static __device__ __forceinline__ float high(uint32_t value) {
    return __builtin_bit_cast(float, value & 0xFFFF0000U);
  }

 private:
  static __device__ __forceinline__ __nv_bfloat162 pair(uint32_t value) {
    return *reinterpret_cast<const __nv_bfloat162*>(&value);
  }
  static __device__ __forceinline__ uint32_t bits(__nv_bfloat162 value) {
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

// a[16 x 16] b[16 x 8] + c, float32 sums (mma.m16n8k16).
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4]) {
  if constexpr (sizeof(T) == 2 && HalfPair<T>::kMantissa == 10) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
}

// a[16 x 32] b[32 x 8] + c: bytes without sign in a, with sign in b, 32-bit sums (mma.m16n8k32).
__device__ __forceinline__ void multiply_add_bytes(uint32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1, const uint32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}

// sum += a b.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                    uint32_t b1) {
  multiply_add<T>(sum, a, b0, b1, sum);
}

}  // namespace quantloom::cuda
