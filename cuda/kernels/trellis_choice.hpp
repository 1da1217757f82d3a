// What a trellis asks of the kernels: which of their templates, and the numbers of its code.
#pragma once

#include <optional>

#include "formats/trellis_codes.hpp"
#include "kernels/trellis_launch.hpp"
#include "kernels/trellis_layout.hpp"

namespace quantloom::cuda {

// How the weights of a code are made, if by a hash that the kernels take.
inline std::optional<TrellisHash> trellis_hash(const TrellisLayout& layout) {
  if (layout.ring.window != 16 || !layout.fragments) return std::nullopt;
  switch (layout.code) {
    case TrellisCode::lcg:
    case TrellisCode::mcg:
      return TrellisHash::halves;
    case TrellisCode::mul1:
    case TrellisCode::one_mad:
      return TrellisHash::bytes;
    case TrellisCode::octagon:
      return TrellisHash::octagon;
    default:
      return std::nullopt;
  }
}

inline TrellisMap trellis_map(const TrellisLayout& layout, bool exact) {
  TrellisMap map;
  switch (layout.code) {
    case TrellisCode::lcg:
      map.multiplier = trellis::kLcgMultiplier;
      map.addend = trellis::kLcgAddend;
      break;
    case TrellisCode::one_mad:
      map.multiplier = trellis::kOneMadMultiplier;
      map.addend = trellis::kOneMadAddend;
      if (!exact) {
        map.slope = 1.0F / 147.800537109375F;
        map.offset = -510.0F / 147.800537109375F;
      }
      break;
    case TrellisCode::mul1:
      map.multiplier = layout.multiplier;
      if (!exact) {
        // 1024 times the slope, less 10.3828125.
        map.slope = 0.00676727294921875F;
        map.offset = -3.453125F;
      }
      break;
    case TrellisCode::octagon:
      map.multiplier = layout.multiplier;
      if (!exact) {
        // Of the sum of the bytes less 127.5, each along its axis.
        map.slope = 2.0F * static_cast<float>(trellis::kOctagonAxis * trellis::kOctagonSlope) * 0x1p-22F;
        map.offset = -127.5F * map.slope;
      }
      break;
    default:
      map.multiplier = layout.multiplier;
  }
  return map;
}

// Whether TrellisExact makes its weights.
inline bool has_exact_words(const TrellisLayout& layout) {
  return trellis_hash(layout) && layout.code != TrellisCode::one_mad;
}

// Calls run<bits, hash>() with those of a matrix of kFirst ... kLast bits.
template <int kFirst, int kLast, class Run>
void with_trellis_code(const TrellisLayout& layout, const Run& run) {
  if constexpr (kFirst < kLast) {
    if (layout.bits() != kFirst) return with_trellis_code<kFirst + 1, kLast>(layout, run);
  }
  switch (*trellis_hash(layout)) {
    case TrellisHash::bytes:
      return run.template operator()<kFirst, TrellisHash::bytes>();
    case TrellisHash::halves:
      return run.template operator()<kFirst, TrellisHash::halves>();
    default:
      if constexpr (kFirst <= 4) return run.template operator()<kFirst, TrellisHash::octagon>();
  }
}

}  // namespace quantloom::cuda
