// Codes of two rows as pairs of float16, for tensor cores.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/half_pairs.cuh"

namespace quantloom::kv_cache {

using Halves = cuda::HalfPair<__half>;

// The low halves of two words, or their high halves.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// Two numbers as float16, the first in the low half.
__device__ __forceinline__ uint32_t halves_of(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// kCount consecutive codes of a row of codes in shared memory.
template <int kBits, int kCount>
struct CodeRun {
  static constexpr int kWords = (kCount * kBits + 31) / 32;
  uint32_t words[kWords];

  // Those from code index * kCount on. The row is aligned to 4 bytes; of runs that are not whole words, up to
  // four bytes beyond are read.
  __device__ __forceinline__ void load(const std::byte* row, int index) {
    constexpr int kRunBits = kCount * kBits;
    if constexpr (kRunBits % 128 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const auto four = *reinterpret_cast<const uint4*>(row + index * (kRunBits / 8) + i * 4);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    } else if constexpr (kRunBits % 64 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const auto two = *reinterpret_cast<const uint2*>(row + index * (kRunBits / 8) + i * 4);
        words[i] = two.x, words[i + 1] = two.y;
      }
    } else if constexpr (kRunBits % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        words[i] = *reinterpret_cast<const uint32_t*>(row + index * (kRunBits / 8) + i * 4);
    } else {
      const int bit = index * kRunBits;
      const auto* from = reinterpret_cast<const uint32_t*>(row) + bit / 32;
      uint32_t word = from[0];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t next = from[i + 1];
        words[i] = __funnelshift_r(word, next, bit % 32);
        word = next;
      }
    }
  }
};

// Code i of run `a` as a number in the low half, of `b` in the high one: besides one permutation of bytes for
// each 16 bits of a row, two instructions for each pair. `mark` is Halves::kInteger in a register: as a
// constant it would take an instruction of its own beside the mask.
template <int kBits, int kCount>
__device__ __forceinline__ uint32_t code_pair(const CodeRun<kBits, kCount>& a,
                                              const CodeRun<kBits, kCount>& b, int i, uint32_t mark) {
  constexpr int kWindow = 16 / kBits;   // codes of a window of up to 16 bits
  constexpr int kInPlace = 10 / kBits;  // of them, those that fit the mantissa where they are
  const int first_bit = i / kWindow * kWindow * kBits;
  const int word = first_bit / 32;
  const int offset = first_bit % 32;
  uint32_t window = 0;
  if (offset == 0) {
    window = low_halves(a.words[word], b.words[word]);
  } else if (offset == 16) {
    window = high_halves(a.words[word], b.words[word]);
  } else {
    constexpr int kLast = CodeRun<kBits, kCount>::kWords - 1;
    const int next = word < kLast ? word + 1 : kLast;
    window = low_halves(__funnelshift_r(a.words[word], a.words[next], offset),
                        __funnelshift_r(b.words[word], b.words[next], offset));
  }
  const int in_window = i % kWindow;
  window >>= in_window / kInPlace * kInPlace * kBits;
  const int place = in_window % kInPlace * kBits;
  // 1024 + code * 2^place, and back.
  uint32_t marked = 0;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"  // (a & b) | c
      : "=r"(marked)
      : "r"(window), "r"((((1U << kBits) - 1) << place) * 0x10001U), "r"(mark));
  const float step = 1.0F / static_cast<float>(1 << place);
  const uint32_t steps = cuda::float16_bits(step) * 0x10001U;
  const uint32_t offsets = cuda::float16_bits(-1024.0F * step) * 0x10001U;
  return Halves::multiply_add(marked, steps, offsets);
}

}  // namespace quantloom::kv_cache
