// The arithmetic of the trellis codebooks, state -> weights, as exact float16 arithmetic on integers, and the
// order of a ring's weights in a tile: the same functions on the host and on the device.
//
// A ring's stream of bits is kept in 32-bit words: word w has bits 32 w ... 32 w + 31, the earliest in its
// most significant bit.
#pragma once

#include <cstdint>

#include "quantloom/formats/trellis_shape.hpp"

namespace quantloom::trellis {

constexpr int kTileSide = 16;  // a tile holds 16 x 16 weights
constexpr int kRingLength = kTileSide * kTileSide;

// ---- The order of a ring in its tile ----
//
// Position 8 t + j is what lane t holds as the j-th of its 8 weights in the pair of B fragments of
// mma.m16n8k16, so that each lane's weights are neighbours in the ring.

// The input (0 ... 15, column of the weight matrix within the tile) of a position.
inline QUANTLOOM_TRELLIS int input_of(int position) {
  const int lane = position >> 3;
  const int j = position & 7;
  return 2 * (lane & 3) + (j & 1) + 8 * ((j >> 1) & 1);
}

// The output (0 ... 15, row of the weight matrix within the tile) of a position.
inline QUANTLOOM_TRELLIS int output_of(int position) {
  return (position >> 5) + 8 * ((position >> 2) & 1);
}

inline QUANTLOOM_TRELLIS int position_of(int input, int output) {
  const int lane = ((output & 7) << 2) | ((input & 7) >> 1);
  return (lane << 3) | ((output >> 3) << 2) | ((input >> 3) << 1) | (input & 1);
}

// ---- The ring of bits ----

// The state whose last bit is the one before `end` (1 ... ring_bits), of a ring of ring_bits >= 1 bits.
inline QUANTLOOM_TRELLIS uint32_t state_at(const uint32_t* words, int ring_bits, int end, int window) {
  uint32_t state = 0;
  for (int i = 0; i < window; ++i) {
    int bit = (end - window + i) % ring_bits;
    if (bit < 0) bit += ring_bits;
    state = state << 1 | (words[bit >> 5] >> (31 - (bit & 31)) & 1U);
  }
  return state;
}

// Writes the `count` low bits of `fresh` from stream bit `first` on, most significant first. The words must
// have been zero there.
inline QUANTLOOM_TRELLIS void put_bits(uint32_t* words, int first, int count, uint32_t fresh) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bit = fresh >> (count - 1 - i) & 1U;
    words[(first + i) >> 5] |= bit << (31 - ((first + i) & 31));
  }
}

// ---- float16 on integers ----

// The float16 nearest to value * 2^exponent, ties to even; |value| < 2^52, exponent <= -24, the result
// finite.
inline QUANTLOOM_TRELLIS uint16_t half_of(int64_t value, int exponent) {
  const uint32_t sign = value < 0 ? 0x8000U : 0U;
  uint64_t magnitude = static_cast<uint64_t>(value < 0 ? -value : value);
  // In units of 2^-24 the fraction has 11 bits above the subnormals: drop what does not fit.
  int drop = -24 - exponent;
  int top = 0;
  while (magnitude >> top > 1) ++top;
  if (top - 10 > drop) drop = top - 10;
  uint64_t fraction = magnitude;
  if (drop > 0) {
    fraction = drop < 64 ? magnitude >> drop : 0;
    const uint64_t rest = magnitude - (fraction << drop);
    const uint64_t half = uint64_t{1} << (drop - 1);
    if (rest > half || (rest == half && (fraction & 1) != 0)) ++fraction;
  }
  // fraction * 2^(exponent + drop): an exponent field of 1 + (exponent + drop + 24) counts from 2^-14; a
  // carry into bit 11 moves it by one, and subnormals (no bit 10) have field 0, by the same addition.
  const int field = exponent + drop + 24;
  return static_cast<uint16_t>(sign | (static_cast<uint32_t>(field << 10) + static_cast<uint32_t>(fraction)));
}

// A finite float16 in units of 2^-24.
inline QUANTLOOM_TRELLIS int64_t half_units(uint16_t bits) {
  const int field = bits >> 10 & 31;
  const int64_t fraction = bits & 0x3FF;
  const int64_t magnitude = field == 0 ? fraction : (fraction | 0x400) << (field - 1);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// ---- The codebooks ----

constexpr uint32_t kLcgMultiplier = 89226354U;
constexpr uint32_t kLcgAddend = 64248484U;
constexpr uint32_t kExl3Mcg = 0xCBAC1FEDU;
constexpr uint32_t kExl3Mul1 = 0x83DCD12DU;
constexpr uint32_t kOneMadMultiplier = 34038481U;
constexpr uint32_t kOneMadAddend = 76625530U;
constexpr uint32_t kHalvesMask = 0x8FFF8FFFU;  // sign, two low exponent bits, fraction
constexpr uint32_t kHalvesFlip = 0x3B603B60U;
constexpr uint16_t kMul1Slope = 0x1EEE;   // 1774 * 2^-18
constexpr uint16_t kMul1Offset = 0xC931;  // -10.3828125
constexpr int kHybEntries = 512;
// octagon: bytes of the hash, the lowest first, are steps along axes at 0, 90, 45 and 135 degrees. In units
// of 1 / 99, which fit 8 bits, 70 is sqrt(1/2) but for 5e-5.
constexpr uint32_t kOctagonMultiplier = 0xF3C14DB7U;
constexpr int kOctagonAxis = 99;
constexpr int kOctagonDiagonal = 70;
constexpr int kOctagonSlope = 203;  // times 2^-22: root mean squares near 1

inline QUANTLOOM_TRELLIS int weights_per_step(TrellisCode code) {
  return code == TrellisCode::hyb || code == TrellisCode::octagon ? 2 : 1;  // `table` has one or two
}

// Whether values come from a table: of kHybEntries * 2 or 2^window * weights_per_step float16 numbers.
inline QUANTLOOM_TRELLIS bool has_table(TrellisCode code) {
  return code == TrellisCode::hyb || code == TrellisCode::table;
}

// The hash of a state, for the codes without a table. `multiplier` counts for mcg, mul1 and octagon.
inline QUANTLOOM_TRELLIS uint32_t hash_of(TrellisCode code, uint32_t multiplier, uint32_t state) {
  switch (code) {
    case TrellisCode::lcg:
      return kLcgMultiplier * state + kLcgAddend;
    case TrellisCode::one_mad:
      return kOneMadMultiplier * state + kOneMadAddend;
    default:
      return multiplier * state;
  }
}

// lcg and mcg: the hash as two float16 numbers whose sum is the weight.
inline QUANTLOOM_TRELLIS uint32_t halves_of(uint32_t hash) {
  return (hash & kHalvesMask) ^ kHalvesFlip;
}

inline QUANTLOOM_TRELLIS uint32_t byte_sum(uint32_t hash) {
  return (hash & 255U) + (hash >> 8 & 255U) + (hash >> 16 & 255U) + (hash >> 24);
}

// The float16 bits of the weight of a hash, for the codes of one weight.
inline QUANTLOOM_TRELLIS uint16_t weight_of(TrellisCode code, uint32_t hash) {
  switch (code) {
    case TrellisCode::mul1:
      // fma(1024 + sum, slope, offset), exact in units of 2^-18 before its one rounding: in units of 2^-24.
      return half_of((int64_t{1024} + byte_sum(hash)) * half_units(kMul1Slope) + half_units(kMul1Offset),
                     -24);
    case TrellisCode::one_mad: {
      // (sum - 510) / 147.800537109375, rounded once: 36 bits of the quotient, the last one sticky.
      const int64_t numerator = (static_cast<int64_t>(byte_sum(hash)) - 510) * (int64_t{1} << 52);
      constexpr int64_t kDenominator = 9686256;  // 147.800537109375 * 2^16
      const int64_t magnitude = numerator < 0 ? -numerator : numerator;
      const int64_t quotient = (magnitude / kDenominator) | (magnitude % kDenominator != 0 ? 1 : 0);
      return half_of(numerator < 0 ? -quotient : quotient, -36);
    }
    default: {
      const uint32_t halves = halves_of(hash);
      return half_of(half_units(static_cast<uint16_t>(halves & 0xFFFFU)) +
                         half_units(static_cast<uint16_t>(halves >> 16)),
                     -24);
    }
  }
}

inline QUANTLOOM_TRELLIS uint32_t hyb_hash(uint32_t state) {
  return state * state + state;
}

// hyb: the entry of a state, and the bit that turns the sign of its first weight.
inline QUANTLOOM_TRELLIS uint32_t hyb_entry(uint32_t hash) {
  return hash >> 6 & 511U;
}
inline QUANTLOOM_TRELLIS uint16_t hyb_sign(uint32_t hash) {
  return static_cast<uint16_t>(hash & 0x8000U);
}

// octagon: weight `which` of a hash in units of 203 * 2^-22, an odd number within +-60945.
inline QUANTLOOM_TRELLIS int octagon_units(uint32_t hash, int which) {
  const int axis = static_cast<int>((which == 0 ? hash : hash >> 8) & 255U);
  const int rising = static_cast<int>(hash >> 16 & 255U);
  const int falling = static_cast<int>(hash >> 24);
  // Twice the steps less 127.5.
  return kOctagonAxis * (2 * axis - 255) +
         kOctagonDiagonal * 2 * (which == 0 ? rising + falling - 255 : rising - falling);
}
inline QUANTLOOM_TRELLIS uint16_t octagon_weight(uint32_t hash, int which) {
  return half_of(int64_t{octagon_units(hash, which)} * kOctagonSlope * 4, -24);
}

// The float16 bits of weight `which` (0 ... per_step - 1) of a state, for any code. `table` may be null for
// the codes without one.
inline QUANTLOOM_TRELLIS uint16_t weight_at(TrellisCode code, uint32_t multiplier, const uint16_t* table,
                                            int per_step, uint32_t state, int which) {
  if (code == TrellisCode::table) return table[static_cast<int64_t>(state) * per_step + which];
  if (code == TrellisCode::hyb) {
    const uint32_t hash = hyb_hash(state);
    const uint16_t entry = table[hyb_entry(hash) * 2 + static_cast<uint32_t>(which)];
    return which == 0 ? static_cast<uint16_t>(entry ^ hyb_sign(hash)) : entry;
  }
  const uint32_t hash = hash_of(code, multiplier, state);
  return code == TrellisCode::octagon ? octagon_weight(hash, which) : weight_of(code, hash);
}

}  // namespace quantloom::trellis
