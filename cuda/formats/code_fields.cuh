// Takes codes out of the words of a unit in fragment order (src/formats/fragment_order.hpp): two at a time,
// one in each half of a register.
#pragma once

#include <cstdint>

#include "formats/fragment_order.hpp"

namespace quantloom::cuda {

// (a & b) | c as one operation: of two constants the compiler would make two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return (a & b) | c;
#endif
}

// Where a pair's codes are once its word is shifted right by `shift`: at bit `position` of each half.
struct FieldPlace {
  int shift;
  int position;
};

// The place of a pair of whole codes such that it ends below bit `room` of its half. Pairs of one word that
// need a shift share it, so that it is computed once.
template <int kBits, int kRoom>
__host__ __device__ constexpr FieldPlace field_place(int pair) {
  using Bytes = fragments::Bytes<kBits>;
  const int wanted = 8 * fragments::byte_of(pair, 0) + Bytes::position(fragments::quad_of(pair));
  int shift = 0;
  for (int byte = 0; byte < 2; ++byte) {
    for (int code = 0; code < Bytes::kWhole; ++code) {
      const int position = 8 * byte + code * kBits;
      // The first field that does not fit yet moves to bit 0.
      if (position - shift + kBits > kRoom) shift = position;
      if (position == wanted) return {shift, position - shift};
    }
  }
  return {};
}

// A pair of codes, each at bit 0 of its half, gathered from the bits left over of several words.
template <int kBits, int kPair>
__device__ __forceinline__ uint32_t gathered_pair(const uint32_t (&words)[kBits]) {
  uint32_t codes = 0;
#pragma unroll
  for (int index = 0; index < kBits; ++index) {
    const fragments::BitRun run = fragments::bit_run(fragments::CodeOrder::bytes, kBits, kPair, 0, index);
    if (run.count > 0) {
      const uint32_t half = ((1U << run.count) - 1U) << run.from;
      const uint32_t word = words[run.word];
      const uint32_t moved =
          run.position >= run.from ? word >> (run.position - run.from) : word << (run.from - run.position);
      codes |= moved & (half | half << 16);
    }
  }
  return codes;
}

// A quad of codes, each at bit kPosition of its byte, gathered from the bits left over of several words.
template <int kBits, int kQuad, int kPosition>
__device__ __forceinline__ uint32_t gathered_quad(const uint32_t (&words)[kBits]) {
  constexpr int kPair = kQuad / 2 * 4 + kQuad % 2;
  uint32_t codes = 0;
#pragma unroll
  for (int index = 0; index < kBits; ++index) {
    const fragments::BitRun run = fragments::bit_run(fragments::CodeOrder::bytes, kBits, kPair, 0, index);
    if (run.count > 0) {
      const int to = run.from + kPosition;
      const uint32_t word = words[run.word];
      const uint32_t moved = run.position >= to ? word >> (run.position - to) : word << (to - run.position);
      codes |= moved & ((1U << run.count) - 1U) * (0x01010101U << to);
    }
  }
  return codes;
}

}  // namespace quantloom::cuda
