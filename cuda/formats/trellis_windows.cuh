// The states of a trellis from the words of a lane, in the order that the product kernels read.
//
// A lane of a warp holds 32 consecutive positions of a ring: kBits words, those of ring words lane / 4 *
// kBits and on, of the tile of inputs number lane % 4. Its first states begin in the last word of the lane
// four before, around the ring's end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quantloom::cuda {

// States of 16 bits, each step of kStepBits fresh bits: kBits for one weight a step, 2 * kBits for two.
template <int kBits, int kStepBits>
class TrellisWindows {
 public:
  // By all lanes of a warp. `words`: the lane's.
  explicit __device__ __forceinline__ TrellisWindows(const uint32_t (&words)[kBits]) {
    stream_[0] = __shfl_sync(~0U, words[kBits - 1], (threadIdx.x + 28) % 32);
#pragma unroll
    for (int i = 0; i < kBits; ++i) stream_[i + 1] = words[i];
  }

  // The state of step `kStep` (0 ... 32 * kBits / kStepBits - 1) of the lane.
  template <int kStep>
  __device__ __forceinline__ uint32_t state() const {
    constexpr int kStart = start_of(kStep);
    constexpr int kAnchor = anchor_of(kStep);
    const uint32_t four = bits_from<kAnchor>();
    if constexpr (kStart == kAnchor) {
      return four >> 16;
    } else if constexpr (kStart == kAnchor + 8) {
      return __byte_perm(four, 0, 0x4421);
    } else {
      static_assert(kStart == kAnchor + 16);
      return four & 0xFFFFU;
    }
  }

 private:
  // The first bit of a state, from the beginning of the word before the lane's.
  static __host__ __device__ constexpr int start_of(int step) {
    return 32 + (step + 1) * kStepBits - 16;
  }

  // Where the 32 bits begin that a state is taken from by one operation, whole bytes before it. Those of a
  // word cost nothing; others are shared by the states that they hold.
  static __host__ __device__ constexpr int anchor_of(int step) {
    const int start = start_of(step);
    if (start % 8 == 0 && start % 32 <= 16) return start - start % 32;
    int anchor = -32;
    for (int before = 0; before <= step; ++before) {
      const int other = start_of(before);
      if (other % 8 != start % 8 || (other % 8 == 0 && other % 32 <= 16)) continue;
      if (other - anchor > 16) anchor = other;
    }
    return anchor;
  }

  template <int kAnchor>
  __device__ __forceinline__ uint32_t bits_from() const {
    if constexpr (kAnchor % 32 == 0) {
      return stream_[kAnchor / 32];
    } else if constexpr (kStepBits % 2 == 1 && kAnchor % 32 <= 16) {
      // Of an odd number of bits, hardly any two states share these: the multiplier shifts, as the other pipe
      // is busy with the rest. asm, lest the compiler shifts and masks.
      uint32_t shifted;
      asm("mul.lo.u32 %0, %1, %2;" : "=r"(shifted) : "r"(stream_[kAnchor / 32]), "n"(1 << (kAnchor % 32)));
      return shifted;
    } else {
      constexpr int kNext = kAnchor / 32 + 1;
      const uint32_t next = kNext <= kBits ? stream_[kNext <= kBits ? kNext : 0] : 0U;
      return __funnelshift_l(next, stream_[kAnchor / 32], kAnchor % 32);
    }
  }

  uint32_t stream_[kBits + 1];
};

}  // namespace quantloom::cuda
