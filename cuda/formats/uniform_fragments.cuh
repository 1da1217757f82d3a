// Decoder of the format "uniform" in fragment order: from the words of a unit to tensor-core fragments.
//
// What every decoder offers the product loops:
//   kBits      bits of a code; a lane's unit of 32 codes comes in kBits words
//   kUnit      what 1.0 in a fragment is worth: weight = scale * (kUnit * fragment + offset), where the
//   kCenter    offset is 0, or kCenter - zero_point on grids with a plane of zero points
//   kHasZeros  whether there may be a plane of zero points
//   prepare    run by all threads of a block before the first fragment: fills shared memory, if any
//   fragment   the A fragment (m16n8k16) of one step of 16 columns
//   kQuads     whether codes can be taken out as bytes:
//   quad       the four codes of a row and a step, `row_position` bits of its row and `step_position` bits
//              of its step up in their bytes
//   raw_fragment, minus_raw_offset
//              the same with fewer operations: fragment = raw_fragment + minus_raw_offset, which is the same
//              for all codes; products with it are added apart. kHasOffset<T>: false if there is no offset
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
  static constexpr bool kHasZeros = true;
  static constexpr bool kQuads = kBits <= 3;

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

  template <class T>
  static constexpr bool kHasOffset = kBits > 1 && kBits <= HalfPair<T>::kMantissa;

  template <class T, int kStep>
  __device__ __forceinline__ void raw_fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    if constexpr (kHasOffset<T>) {
      a[0] = raw_pair<T, 4 * kStep>(words);
      a[1] = raw_pair<T, 4 * kStep + 1>(words);
      a[2] = raw_pair<T, 4 * kStep + 2>(words);
      a[3] = raw_pair<T, 4 * kStep + 3>(words);
    } else {
      fragment<T, kStep>(words, a);
    }
  }

  // Minus the difference between raw_fragment and the codes (kCentered: the codes less kCenter).
  template <class T, int kStep, bool kCentered>
  __device__ __forceinline__ void minus_raw_offset(uint32_t (&a)[4]) const {
    constexpr float kSubtracted = kCentered ? kCenter : 0.0F;
    a[0] = HalfPair<T>::template kBoth<-(raw_integer<T>(4 * kStep) + kSubtracted)>;
    a[1] = HalfPair<T>::template kBoth<-(raw_integer<T>(4 * kStep + 1) + kSubtracted)>;
    a[2] = HalfPair<T>::template kBoth<-(raw_integer<T>(4 * kStep + 2) + kSubtracted)>;
    a[3] = HalfPair<T>::template kBoth<-(raw_integer<T>(4 * kStep + 3) + kSubtracted)>;
  }

  // half: of the rows of a unit, 0 or 1.
  static __host__ __device__ constexpr int row_position(int half) { return Bytes::position(half); }
  static __host__ __device__ constexpr int step_position(int step) {
    return Bytes::whole(2 * step) ? Bytes::position(2 * step) : 0;
  }

  template <int kStep, int kHalf>
  static __device__ __forceinline__ uint32_t quad(const uint32_t (&words)[kBits]) {
    constexpr int kQuad = 2 * kStep + kHalf;
    constexpr int kPosition = row_position(kHalf) + step_position(kStep);
    if constexpr (Bytes::whole(kQuad)) {
      static_assert(Bytes::position(kQuad) == kPosition);
      return words[Bytes::word(kQuad)] & (kMask << kPosition) * 0x01010101U;
    } else {
      return gathered_quad<kBits, kQuad, kPosition>(words);
    }
  }

 private:
  using Bytes = fragments::Bytes<kBits>;
  static constexpr uint32_t kMask = (1U << kBits) - 1U;

  template <class T, int kPair>
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&words)[kBits]) {
    using Pair = HalfPair<T>;
    constexpr int kMantissa = Pair::kMantissa;
    constexpr int kQuad = fragments::quad_of(kPair);
    if constexpr (kBits == 1) {
      // The code as a sign: 0 -> -1, 1 -> 1.
      constexpr int kBit = 8 * fragments::byte_of(kPair, 0) + Bytes::position(kQuad);
      return (~(words[0] << (15 - kBit)) & 0x80008000U) | Pair::kOne;
    } else if constexpr (kBits > kMantissa) {
      // 8 bits in bfloat16, whose mantissa takes 7: the low ones become 128 + low; what is subtracted is
      // 256 where the highest bit is clear and 128 where it is set.
      const uint32_t word = words[kQuad] >> (8 * fragments::byte_of(kPair, 0));
      const uint32_t low = (word & 0x007F007FU) | 0x43004300U;
      const uint32_t minus = (word & 0x00800080U) ^ 0xC380C380U;
      return Pair::add(low, minus);
    } else if constexpr (Bytes::whole(kQuad)) {
      // The code in the mantissa of 2^kMantissa, `position` bits up: 2^kMantissa + code * 2^position.
      constexpr FieldPlace kPlace = field_place<kBits, kMantissa>(kPair);
      const uint32_t word = words[Bytes::word(kQuad)] >> kPlace.shift;
      constexpr uint32_t kField = kMask << kPlace.position;
      return centered<T, kPlace.position>(and_or(word, kField | kField << 16, Pair::kInteger));
    } else {
      return centered<T, 0>(gathered_pair<kBits, kPair>(words) | Pair::kInteger);
    }
  }

  // Where the code of a pair lies in the mantissa.
  template <class T>
  static __host__ __device__ constexpr int raw_position(int pair) {
    return Bytes::whole(fragments::quad_of(pair)) ? field_place<kBits, HalfPair<T>::kMantissa>(pair).position
                                                  : 0;
  }
  // The power of two in whose mantissa that place is worth 1: with the code it makes power + code.
  template <class T>
  static __host__ __device__ constexpr float raw_integer(int pair) {
    return static_cast<float>(1 << (HalfPair<T>::kMantissa - raw_position<T>(pair)));
  }

  template <class T, int kPair>
  static __device__ __forceinline__ uint32_t raw_pair(const uint32_t (&words)[kBits]) {
    constexpr int kMantissa = HalfPair<T>::kMantissa;
    constexpr int kPosition = raw_position<T>(kPair);
    // Exponents of halves count from 15, those of bfloat16 from 127.
    constexpr uint32_t kExponent = static_cast<uint32_t>((kMantissa == 10 ? 15 : 127) + kMantissa - kPosition)
                                   << kMantissa;
    constexpr uint32_t kPower = kExponent | kExponent << 16;
    constexpr int kQuad = fragments::quad_of(kPair);
    if constexpr (Bytes::whole(kQuad)) {
      constexpr FieldPlace kPlace = field_place<kBits, kMantissa>(kPair);
      constexpr uint32_t kField = kMask << kPosition;
      return and_or(words[Bytes::word(kQuad)] >> kPlace.shift, kField | kField << 16, kPower);
    } else {
      return gathered_pair<kBits, kPair>(words) | kPower;
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
