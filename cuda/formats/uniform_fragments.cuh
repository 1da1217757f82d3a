// Decoder of the format "uniform" in fragment order: from the words of a unit to tensor-core fragments.
//
// What every decoder offers the product loops:
//   kBits      bits of a code; a lane's unit of 32 codes comes in kBits words
//   kUnit      what 1.0 in a fragment is worth: weight = scale * (kUnit * fragment + offset), where the
//   kCenter    offset is 0, or kCenter - zero_point on grids with a plane of zero points
//   prepare    run by all threads of a block before the first fragment: fills shared memory, if any
//   fragment   the A fragment (m16n8k16) of one step of 16 columns
#pragma once

#include "common/half_pairs.cuh"
#include "formats/code_fields.cuh"

namespace quantloom::cuda {

template <int kCodeBits>
class UniformFragments {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr float kUnit = kBits == 1 ? 0.5F : 1.0F;
  static constexpr float kCenter = kBits == 1 ? 0.5F : static_cast<float>(1 << (kBits - 1));
  static constexpr int kSharedBytes = 0;

  template <class T>
  __device__ __forceinline__ void prepare(const void* /*table*/, int /*entries*/, void* /*shared*/) {}

  // Registers a[0..3] of step kStep, exact in T: fragment = (code - kCenter) / kUnit.
  template <class T, int kStep>
  __device__ __forceinline__ void fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    a[0] = pair<T, 4 * kStep>(words);
    a[1] = pair<T, 4 * kStep + 1>(words);
    a[2] = pair<T, 4 * kStep + 2>(words);
    a[3] = pair<T, 4 * kStep + 3>(words);
  }

 private:
  static constexpr uint32_t kMask = (1U << kBits) - 1U;

  template <class T, int kPair>
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&words)[kBits]) {
    using Pair = HalfPair<T>;
    constexpr int kMantissa = Pair::kMantissa;
    if constexpr (kBits == 1) {
      // The code as a sign: 0 -> -1, 1 -> 1.
      constexpr int kBit = kPair % 16;
      return (~(words[0] << (15 - kBit)) & 0x80008000U) | Pair::kOne;
    } else if constexpr (kBits > kMantissa) {
      // 8 bits in bfloat16, whose mantissa takes 7: the low ones become 128 + low; what is subtracted is
      // 256 where the highest bit is clear and 128 where it is set.
      const uint32_t word = kPair % 2 == 0 ? words[kPair / 2] : words[kPair / 2] >> 8;
      const uint32_t low = (word & 0x007F007FU) | 0x43004300U;
      const uint32_t minus = (word & 0x00800080U) ^ 0xC380C380U;
      return Pair::add(low, minus);
    } else if constexpr (kPair < fragments::Halves<kBits>::kWholePairs) {
      // The code in the mantissa of 2^kMantissa, `position` bits up: 2^kMantissa + code * 2^position.
      constexpr int kWhole = fragments::Halves<kBits>::kWhole;
      constexpr FieldPlace kPlace = field_place<kBits, kMantissa>(kPair);
      const uint32_t word = words[kPair / kWhole] >> kPlace.shift;
      constexpr uint32_t kField = kMask << kPlace.position;
      return centered<T, kPlace.position>(and_or(word, kField | kField << 16, Pair::kInteger));
    } else {
      return centered<T, 0>(gathered_pair<kBits, kPair>(words) | Pair::kInteger);
    }
  }

  // (2^kMantissa + code * 2^kPosition) -> code - kCenter; no step rounds.
  template <class T, int kPosition>
  static __device__ __forceinline__ uint32_t centered(uint32_t integer) {
    using Pair = HalfPair<T>;
    constexpr float kScale = 1.0F / (1 << kPosition);
    const uint32_t offset = Pair::both(-(static_cast<float>(1 << Pair::kMantissa) * kScale + kCenter));
    if constexpr (kPosition == 0) return Pair::add(integer, offset);
    return Pair::multiply_add(integer, Pair::both(kScale), offset);
  }
};

}  // namespace quantloom::cuda
