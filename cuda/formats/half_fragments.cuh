// Decoder of codes in halves of words (src/formats/half_order.hpp): from the words of a unit to tensor-core
// fragments.
#pragma once

#include "common/half_pairs.cuh"
#include "formats/code_fields.cuh"
#include "formats/half_order.hpp"

namespace quantloom::cuda {

template <int kCodeBits>
class HalfFragments {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr bool kQuads = false;  // codes cannot be taken out as bytes
  // What raw fragments lack of codes where there is no raw offset.
  static constexpr float kCenter = 128.0F;

  // Raw fragments are codes plus a raw offset, or codes less kCenter: 8 bits in bfloat16.
  template <class T>
  static constexpr bool kHasOffset = kBits <= HalfPair<T>::kMantissa;

  template <class T, int kStep>
  static __device__ __forceinline__ void raw_fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) {
    a[0] = raw_pair<T, 4 * kStep>(words);
    a[1] = raw_pair<T, 4 * kStep + 1>(words);
    a[2] = raw_pair<T, 4 * kStep + 2>(words);
    a[3] = raw_pair<T, 4 * kStep + 3>(words);
  }

  // Minus the difference between raw fragments and codes.
  template <class T, int kStep>
  static __device__ __forceinline__ void minus_raw_offset(uint32_t (&a)[4]) {
    a[0] = HalfPair<T>::template kBoth<-offset_of<T>(4 * kStep)>;
    a[1] = HalfPair<T>::template kBoth<-offset_of<T>(4 * kStep + 1)>;
    a[2] = HalfPair<T>::template kBoth<-offset_of<T>(4 * kStep + 2)>;
    a[3] = HalfPair<T>::template kBoth<-offset_of<T>(4 * kStep + 3)>;
  }

  // The codes themselves, in float16.
  template <int kStep>
  static __device__ __forceinline__ void codes(const uint32_t (&words)[kBits], uint32_t (&a)[4]) {
    uint32_t minus[4];
    raw_fragment<__half, kStep>(words, a);
    minus_raw_offset<__half, kStep>(minus);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = HalfPair<__half>::add(a[i], minus[i]);
  }

 private:
  using Halves = fragments::Halves<kBits>;
  static constexpr uint32_t kMask = (1U << kBits) - 1U;

  // Where the codes of a pair are in the mantissas, once their word is shifted right. Pairs of one word that
  // need a shift share it, so that it is computed once.
  template <class T>
  static __host__ __device__ constexpr FieldPlace place_of(int pair) {
    if (!Halves::whole(pair)) return {0, 0};
    const int wanted = Halves::position(pair);
    int shift = 0;
    for (int position = 0; position <= wanted; position += kBits) {
      // The first field that does not fit yet moves to bit 0.
      if (position - shift + kBits > HalfPair<T>::kMantissa) shift = position;
    }
    return {shift, wanted - shift};
  }

  // The power of two in whose mantissa the codes' place is worth 1: with a code it makes power + code.
  template <class T>
  static __host__ __device__ constexpr float offset_of(int pair) {
    return static_cast<float>(1 << (HalfPair<T>::kMantissa - place_of<T>(pair).position));
  }

  template <class T, int kPair>
  static __device__ __forceinline__ uint32_t raw_pair(const uint32_t (&words)[kBits]) {
    constexpr int kMantissa = HalfPair<T>::kMantissa;
    if constexpr (!kHasOffset<T>) {
      // The low 7 bits become 128 + low; what is subtracted is 256 where the highest bit is clear and 128
      // where it is set.
      const uint32_t word = words[Halves::word(kPair)] >> Halves::position(kPair);
      return HalfPair<T>::add((word & 0x007F007FU) | 0x43004300U, (word & 0x00800080U) ^ 0xC380C380U);
    } else {
      constexpr FieldPlace kPlace = place_of<T>(kPair);
      // Exponents of halves count from 15, those of bfloat16 from 127.
      constexpr uint32_t kExponent =
          static_cast<uint32_t>((kMantissa == 10 ? 15 : 127) + kMantissa - kPlace.position) << kMantissa;
      constexpr uint32_t kPower = kExponent | kExponent << 16;
      if constexpr (Halves::whole(kPair)) {
        constexpr uint32_t kField = kMask << kPlace.position;
        return and_or(words[Halves::word(kPair)] >> kPlace.shift, kField | kField << 16, kPower);
      } else {
        return gathered<kPair>(words) | kPower;
      }
    }
  }

  // A pair of codes, each at bit 0 of its half, from the bits left over of several words.
  template <int kPair>
  static __device__ __forceinline__ uint32_t gathered(const uint32_t (&words)[kBits]) {
    uint32_t codes = 0;
#pragma unroll
    for (int index = 0; index < kBits; ++index) {
      const fragments::BitRun run = fragments::half_run(kBits, kPair, index);
      if (run.count > 0) {
        const uint32_t half = ((1U << run.count) - 1U) << run.from;
        codes |= words[run.word] >> (run.position - run.from) & (half | half << 16);
      }
    }
    return codes;
  }
};

}  // namespace quantloom::cuda
