// Eight values of a token in registers, as float16, bfloat16 or float32: reading them, their range as
// integers, and their floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantloom/cuda_matrix.hpp"
#include "quantloom/error.hpp"

namespace quantloom::cuda {

inline constexpr int kVectorValues = 8;

// What bits mean in a dtype. Magnitudes without their sign compare as integers, and those that are not finite
// are above all others.
template <class T>
struct ValueBits;
template <>
struct ValueBits<__half> {
  static constexpr uint32_t kRefused = 0x7C00U;  // Inf: all finite values are below 2^127
  static __device__ __forceinline__ float to_float(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  static __device__ __forceinline__ uint32_t from_float(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
};
template <>
struct ValueBits<__nv_bfloat16> {
  static constexpr uint32_t kRefused = 0x7F00U;
  static __device__ __forceinline__ float to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
  static __device__ __forceinline__ uint32_t from_float(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};
template <>
struct ValueBits<float> {
  static constexpr uint32_t kRefused = 0x7F000000U;
  static __device__ __forceinline__ float to_float(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t from_float(float value) { return __float_as_uint(value); }
};

template <class T>
__device__ __forceinline__ uint32_t get_bits(const T* from) {
  if constexpr (sizeof(T) == 2) {
    return *reinterpret_cast<const unsigned short*>(from);
  } else {
    return *reinterpret_cast<const uint32_t*>(from);
  }
}
template <class T>
__device__ __forceinline__ void put_value(T* to, uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(bits);
  } else {
    *reinterpret_cast<uint32_t*>(to) = bits;
  }
}

// Four bytes, each of the sign of the byte that 4 bits of kBytes name (8 more than its number), which
// __byte_perm() does not do.
template <uint32_t kBytes>
__device__ __forceinline__ uint32_t fill_with_signs(uint32_t value) {
  uint32_t filled;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(filled) : "r"(value), "n"(kBytes));
  return filled;
}

template <class T>
struct TokenVector {
  static constexpr bool kPairs = sizeof(T) == 2;  // two values in a word
  static constexpr int kWords = kVectorValues / (kPairs ? 2 : 1);
  uint32_t words[kWords];

  __device__ __forceinline__ uint32_t bits(int i) const {
    return kPairs ? words[i / 2] >> i % 2 * 16 & 0xFFFFU : words[i];
  }
  __device__ __forceinline__ float value(int i) const { return ValueBits<T>::to_float(bits(i)); }
  // The bits of value i, which the compiler need not know.
  __device__ __forceinline__ uint32_t pick(int i) const {
    uint32_t found = bits(0);
#pragma unroll
    for (int j = 1; j < kVectorValues; ++j) found = i == j ? bits(j) : found;
    return found;
  }
  __device__ __forceinline__ void put(int i, uint32_t value) {
    if constexpr (kPairs) {
      words[i / 2] =
          i % 2 == 0 ? (words[i / 2] & 0xFFFF0000U) | value : (words[i / 2] & 0xFFFFU) | value << 16;
    } else {
      words[i] = value;
    }
  }
  // Zeros where `mask` has bits.
  __device__ __forceinline__ void clear(uint32_t mask) {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        // Bit j of four to the top of byte j, whose sign then fills half a word.
        const uint32_t signs = (mask >> 2 * i & 0xFU) * 0x10204080U & 0x80808080U;
        words[i] &= ~fill_with_signs<0x9988>(signs);
        words[i + 1] &= ~fill_with_signs<0xBBAA>(signs);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = (mask >> i & 1U) != 0 ? 0 : words[i];
    }
  }
  // The first `count`, but for those of which `skipped` has a bit. wide: `to` is at a multiple of 16 bytes.
  __device__ __forceinline__ void store(T* to, int count, bool wide, uint32_t skipped) const {
    if (wide && count == kVectorValues && skipped == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if (i < count && (skipped >> i & 1U) == 0) put_value(to + i, bits(i));
    }
  }
  static __device__ __forceinline__ TokenVector zeros() {
    TokenVector v;
#pragma unroll
    for (uint32_t& word : v.words) word = 0;
    return v;
  }
};

// The first `count` of eight values, zeros for the others. Not inline: rows that are not at multiples of 16
// bytes, and the ends of others, must not cost the rest registers and instructions.
template <class T>
__device__ __noinline__ TokenVector<T> load_narrow(const T* from, int64_t count) {
  TokenVector<T> found = TokenVector<T>::zeros();
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i) {
    if (i < count) found.put(i, get_bits(from + i));
  }
  return found;
}

// A row-major matrix of tokens.
template <class T>
struct TokenMatrix {
  const T* data;
  int64_t stride;  // elements
  int64_t cols;
  bool wide;  // rows begin at multiples of 16 bytes

  static __device__ __forceinline__ TokenVector<T> load_wide(const T* from) {
    TokenVector<T> found;
#pragma unroll
    for (int i = 0; i < TokenVector<T>::kWords; i += 4) {
      const uint4 piece = reinterpret_cast<const uint4*>(from)[i / 4];
      found.words[i] = piece.x;
      found.words[i + 1] = piece.y;
      found.words[i + 2] = piece.z;
      found.words[i + 3] = piece.w;
    }
    return found;
  }
  // Values 8 v to 8 v + 7 of a row, zeros beyond its end.
  __device__ __forceinline__ TokenVector<T> load(int64_t row, int v) const {
    const int64_t first = int64_t{v} * kVectorValues;
    const T* const from = data + row * stride + first;
    if (wide && first + kVectorValues <= cols) return load_wide(from);
    return load_narrow(from, cols - first);
  }
  // Vectors thread, thread + threads, ... of a row.
  template <int kVectors>
  __device__ __forceinline__ void load_all(int64_t row, int thread, int threads,
                                           TokenVector<T> (&found)[kVectors]) const {
    const T* const from = data + row * stride + thread * kVectorValues;
    const auto whole = static_cast<int>(cols / kVectorValues);
    if (wide) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        found[i] = TokenVector<T>::zeros();
        if (thread + i * threads < whole) found[i] = load_wide(from + i * threads * kVectorValues);
      }
      if (cols % kVectorValues == 0) return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = thread + i * threads;
      if (wide && v != whole) continue;
      found[i] = load_narrow(from + i * threads * kVectorValues, cols - int64_t{v} * kVectorValues);
    }
  }
};

template <class T>
TokenMatrix<T> token_matrix(const CudaMatrix& x) {
  const bool wide =
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return {static_cast<const T*>(x.data), x.stride, x.cols, wide};
}

// Calls run(TokenMatrix<T>) for the dtype of x.
template <class Run>
void with_token_matrix(const CudaMatrix& x, const Run& run) {
  switch (x.dtype) {
    case DType::f16:
      return run(token_matrix<__half>(x));
    case DType::bf16:
      return run(token_matrix<__nv_bfloat16>(x));
    case DType::f32:
      return run(token_matrix<float>(x));
    default:
      throw TypeMismatch("x", name_of(x.dtype), "float16, bfloat16 or float32");
  }
}

// The largest magnitudes below and above 0, as bits; 0 where there is none.
template <class T>
struct TokenRange {
  uint32_t low = 0;
  uint32_t high = 0;

  __device__ __forceinline__ void take(const TokenVector<T>& v) {
#pragma unroll
    for (const uint32_t word : v.words) {
      if constexpr (TokenVector<T>::kPairs) {
        high = __vmaxs2(high, word);
        low = __vmaxs2(low, word ^ 0x80008000U);
      } else {
        high = static_cast<uint32_t>(max(static_cast<int>(high), static_cast<int>(word)));
        low = static_cast<uint32_t>(max(static_cast<int>(low), static_cast<int>(word ^ 0x80000000U)));
      }
    }
  }
  // One of each, where words held two.
  __device__ __forceinline__ void fold() {
    if constexpr (TokenVector<T>::kPairs) {
      low = max(low & 0xFFFFU, low >> 16);
      high = max(high & 0xFFFFU, high >> 16);
    }
  }
};

}  // namespace quantloom::cuda
