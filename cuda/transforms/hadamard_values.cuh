// What the Hadamard kernels share: their arguments, elements in vectors of 16 bytes, signs and scales.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quantloom::cuda {

// Unit u is block u % per_row of row u / per_row; units are independent.
struct HadamardArguments {
  const void* x = nullptr;
  void* out = nullptr;  // may be x
  int64_t x_stride = 0;
  int64_t out_stride = 0;
  int64_t units = 0;
  int64_t per_row = 1;
  const uint8_t* signs = nullptr;
  const float* channels = nullptr;
  float factor = 1;
  bool inverse = false;
  bool vectors = false;  // every block of x and of out begins at a multiple of 16 bytes
};

template <class T>
struct HadamardValues;

template <>
struct HadamardValues<float> {
  static constexpr int kLogVector = 2;  // elements in 16 bytes
  static __device__ __forceinline__ float to_float(float value) { return value; }
  static __device__ __forceinline__ float from_float(float value) { return value; }
  static __device__ __forceinline__ void unpack(uint4 words, float (&values)[4]) {
    values[0] = __uint_as_float(words.x);
    values[1] = __uint_as_float(words.y);
    values[2] = __uint_as_float(words.z);
    values[3] = __uint_as_float(words.w);
  }
};

template <>
struct HadamardValues<__half> {
  static constexpr int kLogVector = 3;
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __half2 values = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&values);
  }
  static __device__ __forceinline__ void unpack(uint4 words, float (&values)[8]) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i]));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct HadamardValues<__nv_bfloat16> {
  static constexpr int kLogVector = 3;
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) {
    return __float2bfloat16_rn(value);
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 values = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&values);
  }
  static __device__ __forceinline__ void unpack(uint4 words, float (&values)[8]) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(word[i] << 16);
      values[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000U);
    }
  }
};

// kCount consecutive elements, from an address that is a multiple of their size if `vectors`.
template <class T, int kCount>
__device__ __forceinline__ void store_values(T* to, const float (&values)[kCount], bool vectors) {
  alignas(16) T packed[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) packed[i] = HadamardValues<T>::from_float(values[i]);
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  if (kBytes > static_cast<int>(sizeof(T)) && vectors) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(packed)[i];
      }
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(packed);
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(packed);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = packed[i];
  }
}

// Sixteen bytes of elements that need not be aligned to more than an element.
template <class T>
__device__ __forceinline__ uint4 load_vector(const T* from, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(from);
  alignas(16) T elements[16 / sizeof(T)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) elements[i] = from[i];
  return *reinterpret_cast<const uint4*>(elements);
}

// Negates the elements of a vector whose bits are set; bit 0 belongs to the first.
__device__ __forceinline__ void negate(float (&values)[8], uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = __uint_as_float(__float_as_uint(values[i]) ^ ((bits << (31 - i)) & 0x80000000U));
  }
}
__device__ __forceinline__ void negate(float (&values)[4], uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = __uint_as_float(__float_as_uint(values[i]) ^ ((bits << (31 - i)) & 0x80000000U));
  }
}

// The bits of columns from `column` on, a multiple of 4 or more; of the first 4 or 8 of them.
__device__ __forceinline__ uint32_t sign_bits(const uint8_t* signs, int64_t column) {
  return static_cast<uint32_t>(signs[column >> 3]) >> (column & 7);
}

// Factor, channels and, after an inverse, signs; value i belongs to column + offset(i).
template <int kSize, class Offset>
__device__ __forceinline__ void finish(const HadamardArguments& a, float (&values)[kSize], int64_t column,
                                       const Offset& offset) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] *= a.factor;
  if (a.channels != nullptr) {
    const float* channels = a.channels + column;
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] *= channels[offset(i)];
  }
  if (a.signs != nullptr && a.inverse) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const uint32_t bits = sign_bits(a.signs, column + offset(i));
      values[i] = __uint_as_float(__float_as_uint(values[i]) ^ (bits << 31));
    }
  }
}

struct HadamardPlace {
  int64_t row;
  int64_t column;
};

__device__ __forceinline__ HadamardPlace place_of(const HadamardArguments& a, int64_t unit, int64_t size) {
  if (a.per_row == 1) return {unit, 0};
  int64_t row = 0;
  if (a.units <= 0xffffffffLL) {
    row = static_cast<uint32_t>(unit) / static_cast<uint32_t>(a.per_row);
  } else {
    row = unit / a.per_row;
  }
  return {row, (unit - row * a.per_row) * size};
}

// Butterflies of bits [kFirst, kFirst + kCount) of the index of `values`.
template <int kFirst, int kCount, int kSize>
__device__ __forceinline__ void butterflies(float (&values)[kSize]) {
#pragma unroll
  for (int bit = kFirst; bit < kFirst + kCount; ++bit) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if ((i >> bit & 1) == 0) {
        const float a = values[i];
        const float b = values[i | 1 << bit];
        values[i] = a + b;
        values[i | 1 << bit] = a - b;
      }
    }
  }
}

// Butterflies between lanes whose numbers differ in bit `bit`.
template <int kSize>
__device__ __forceinline__ void lane_butterflies(float (&values)[kSize], int lane, int bit) {
  const float sign = (lane >> bit & 1) != 0 ? -1.0F : 1.0F;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float other = __shfl_xor_sync(0xffffffffU, values[i], 1 << bit);
    values[i] = __fmaf_rn(values[i], sign, other);
  }
}

}  // namespace quantloom::cuda
