// The grid of a range and the codes of values on it, by the arithmetic of activation_format.hpp: the CPU's
// scales and codes, bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "quantloom/activations/activation_format.hpp"

namespace quantloom::cuda {

// What of an ActivationFormat a grid takes.
struct GridRule {
  int bits = 8;  // of a code, or base_bits
  bool symmetric = true;
  bool fixed = false;  // scale and zero as they are here
  float scale = 1.0F;
  int zero = 0;

  static GridRule of(const ActivationFormat& format) {
    GridRule rule{format.has_shifts() ? format.base_bits : format.bits, format.symmetric, false, 1.0F, 0};
    if (format.grid) {
      rule.fixed = true;
      rule.scale = format.grid->scale;
      rule.zero = format.grid->zero;
    }
    return rule;
  }
};

// NaN, the scale of values that cannot be rounded.
inline constexpr uint32_t kRefusedScale = 0x7FC00000U;

struct DeviceGrid {
  float scale;
  int zero;
};

// For the values from -low to high, both finite and not negative.
__device__ __forceinline__ DeviceGrid grid_between(const GridRule& rule, float low, float high) {
  if (rule.fixed) return {rule.scale, rule.zero};
  const int half = 1 << (rule.bits - 1);
  const float largest = fmaxf(low, high);
  if (largest == 0.0F) return {1.0F, rule.symmetric ? 0 : -half};
  constexpr float kSmallest = 0x1p-126F;
  if (rule.symmetric) {
    return {fmaxf(__fdiv_rn(largest, static_cast<float>(half - 1)), kSmallest), 0};
  }
  const auto levels = static_cast<float>(2 * half - 1);
  const float scale = fmaxf(__fdiv_rn(__fadd_rn(high, low), levels), kSmallest);
  const float zero = rintf(fminf(__fdiv_rn(low, scale), levels));
  return {scale, static_cast<int>(zero) - half};
}

// rne(value / scale) between bounds, plus the zero.
//
// The quotient is rounded correctly without a division for each value: y = rn(1 / scale) serves a token, one
// step of correction by the remainder makes the quotient faithful, and a second one exact (Markstein, 1990).
// That holds where neither y nor a remainder that matters is subnormal; other scales divide.
class Coder {
 public:
  __device__ __forceinline__ Coder(const GridRule& rule, DeviceGrid grid) : scale_(grid.scale) {
    const int half = 1 << (rule.bits - 1);
    const auto least = static_cast<float>(rule.symmetric ? 1 - half : -half - grid.zero);
    const auto most = static_cast<float>(rule.symmetric ? half - 1 : half - 1 - grid.zero);
    quick_ = grid.scale >= 0x1p-100F && grid.scale <= 0x1p100F;
    // At these values and beyond, a quotient rounds to the bound or beyond it.
    low_ = quick_ ? __fmul_rn(least, grid.scale) : least;
    high_ = quick_ ? __fmul_rn(most, grid.scale) : most;
    inverse_ = quick_ ? __frcp_rn(grid.scale) : 0.0F;
    zero_ = grid.zero;
  }

  __device__ __forceinline__ bool quick() const { return quick_; }

  // An integer, of which only the lowest 22 bits count. kQuick: as quick() says.
  template <bool kQuick>
  __device__ __forceinline__ uint32_t code(float value) const {
    float steps;
    if constexpr (kQuick) {
      const float v = fminf(fmaxf(value, low_), high_);
      steps = __fmul_rn(v, inverse_);
      steps = __fmaf_rn(__fmaf_rn(-scale_, steps, v), inverse_, steps);
      steps = __fmaf_rn(__fmaf_rn(-scale_, steps, v), inverse_, steps);
    } else {
      steps = fminf(fmaxf(__fdiv_rn(value, scale_), low_), high_);
    }
    // Its low bits are the nearest integer, ties to even, from -2^22 to 2^22.
    constexpr float kMagic = 0x1.8p23F;
    return __float_as_uint(__fadd_rn(steps, kMagic)) + static_cast<uint32_t>(zero_);
  }
  // The whole integer, from -2^21 to 2^21.
  __device__ __forceinline__ int integer(float value) const {
    return static_cast<int>((quick_ ? code<true>(value) : code<false>(value)) << 10) >> 10;
  }

  // Eight bytes; those from `count` on are 0.
  template <class Vector>
  __device__ __forceinline__ uint2 codes(const Vector& v, int64_t count) const {
    uint2 found = quick_ ? both<true>(v) : both<false>(v);
    if (count < 8) {
      const uint64_t keep = count <= 0 ? 0 : ~uint64_t{0} >> (8 - count) * 8;
      found.x &= static_cast<uint32_t>(keep);
      found.y &= static_cast<uint32_t>(keep >> 32);
    }
    return found;
  }

 private:
  template <bool kQuick, class Vector>
  __device__ __forceinline__ uint2 both(const Vector& v) const {
    return {four<kQuick>(v, 0), four<kQuick>(v, 4)};
  }
  template <bool kQuick, class Vector>
  __device__ __forceinline__ uint32_t four(const Vector& v, int first) const {
    const uint32_t low = __byte_perm(code<kQuick>(v.value(first)), code<kQuick>(v.value(first + 1)), 0x0040);
    const uint32_t high =
        __byte_perm(code<kQuick>(v.value(first + 2)), code<kQuick>(v.value(first + 3)), 0x0040);
    return __byte_perm(low, high, 0x5410);
  }

  float scale_;
  float inverse_;
  float low_;
  float high_;
  int zero_;
  bool quick_;
};

}  // namespace quantloom::cuda
