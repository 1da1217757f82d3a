// The grid of a range of values, as activation_format.hpp defines it.
#pragma once

#include <algorithm>
#include <cmath>

#include "quantloom/activations/activation_format.hpp"

namespace quantloom {

// Values at or beyond this are refused: grids and sums then stay finite.
inline constexpr float kLargestActivation = 0x1p127F;

// The range of some values, 0 included.
struct ActivationRange {
  float low = 0.0F;
  float high = 0.0F;
};

// The largest |integer| of the symmetric grid that x is rounded to first.
inline int symmetric_levels(const ActivationFormat& format) {
  return (1 << ((format.has_shifts() ? format.base_bits : format.bits) - 1)) - 1;
}

inline FixedGrid grid_of(const ActivationFormat& format, ActivationRange range) {
  constexpr float kSmallest = 0x1p-126F;
  const float largest = std::max(-range.low, range.high);
  if (format.symmetric) {
    if (largest == 0.0F) return {};
    return {std::max(largest / static_cast<float>(symmetric_levels(format)), kSmallest), 0};
  }
  const int half = 1 << (format.bits - 1);
  if (largest == 0.0F) return {1.0F, -half};
  const auto levels = static_cast<float>(2 * half - 1);
  const float scale = std::max((range.high - range.low) / levels, kSmallest);
  const float zero = std::nearbyint(std::clamp(-range.low / scale, 0.0F, levels));
  return {scale, static_cast<int>(zero) - half};
}

}  // namespace quantloom
