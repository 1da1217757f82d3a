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
// For nearly all values products decide, with a little less and a little more than rn(1 / scale): the
// quotient, rounded to float32, is between them (that inverse is within 2^-24 of its place, the product with
// 1 - 2^-22 or 1 + 2^-22 rounds by 2^-24, and the quotient's own rounding is 2^-24), so that all three round
// to the same integer unless the two differ. Those values are divided. The division needs no instruction
// sequence of its own: one step of correction by the remainder makes the product faithful, and a second one
// the correctly rounded quotient (Markstein, 1990), where neither the inverse nor a remainder that matters is
// subnormal; other scales divide all their values.
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

  // The integer itself, from -2^21 to 2^21.
  __device__ __forceinline__ int integer(float value) const {
    return static_cast<int>(divided(value) << 10) >> 10;
  }

  // Eight bytes.
  template <class Vector>
  __device__ __forceinline__ uint2 codes(const Vector& v) const {
    if (!quick_) return divided_codes(*this, v);
    return quick_codes<true>(v);
  }
  // The same for values that the grid was made for, if it is symmetric: none is beyond its bounds.
  template <class Vector>
  __device__ __forceinline__ uint2 codes_within(const Vector& v) const {
    if (!quick_) return divided_codes(*this, v);
    return quick_codes<false>(v);
  }

  // For many vectors at once: the codes of codes_within() unless `doubtful`; those are divided().
  template <class Vector>
  __device__ __forceinline__ uint2 likely_codes(const Vector& v, bool& doubtful) const {
    const uint2 found = product_codes<false>(v, doubtful);
    doubtful |= !quick_;
    return found;
  }
  template <class Vector>
  __device__ __forceinline__ uint2 divided_within(const Vector& v) const {
    return divided_codes(*this, v);
  }

 private:
  // A float whose low bits are the nearest integer, ties to even, from -2^22 to 2^22.
  static constexpr float kMagic = 0x1.8p23F;
  static constexpr float kDoubt = 0x1p-22F;

  // Only the lowest 22 bits count.
  __device__ __forceinline__ uint32_t divided(float value) const {
    float steps;
    if (quick_) {
      const float v = fminf(fmaxf(value, low_), high_);
      steps = __fmul_rn(v, inverse_);
      steps = __fmaf_rn(__fmaf_rn(-scale_, steps, v), inverse_, steps);
      steps = __fmaf_rn(__fmaf_rn(-scale_, steps, v), inverse_, steps);
    } else {
      steps = fminf(fmaxf(__fdiv_rn(value, scale_), low_), high_);
    }
    return __float_as_uint(__fadd_rn(steps, kMagic)) + static_cast<uint32_t>(zero_);
  }

  template <class Vector>
  static __device__ __noinline__ uint2 divided_codes(const Coder coder, const Vector v) {
    uint2 found = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      (i < 4 ? found.x : found.y) |= (coder.divided(v.value(i)) & 0xFFU) << i % 4 * 8;
    }
    return found;
  }

  template <bool kBounded, class Vector>
  __device__ __forceinline__ uint2 quick_codes(const Vector& v) const {
    bool doubtful;
    const uint2 found = product_codes<kBounded>(v, doubtful);
    return doubtful ? divided_codes(*this, v) : found;
  }
  template <bool kBounded, class Vector>
  __device__ __forceinline__ uint2 product_codes(const Vector& v, bool& doubtful) const {
    const float less = __fmul_rn(inverse_, 1.0F - kDoubt);
    const float more = __fmul_rn(inverse_, 1.0F + kDoubt);
    uint32_t bits[8];
    uint32_t differences = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = v.value(i);
      if constexpr (kBounded) value = fminf(fmaxf(value, low_), high_);
      bits[i] = __float_as_uint(__fmaf_rn(value, less, kMagic));
      differences |= bits[i] ^ __float_as_uint(__fmaf_rn(value, more, kMagic));
      if constexpr (kBounded) bits[i] += static_cast<uint32_t>(zero_);
    }
    doubtful = differences != 0;
    return {
        __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410),
        __byte_perm(__byte_perm(bits[4], bits[5], 0x0040), __byte_perm(bits[6], bits[7], 0x0040), 0x5410)};
  }

  float scale_;
  float inverse_;
  float low_;
  float high_;
  int zero_;
  bool quick_;
};

// Eight codes, of which only the first `count` are not 0.
__device__ __forceinline__ uint2 first_codes(uint2 codes, int count) {
  const uint64_t keep = count >= 8 ? ~uint64_t{0} : count <= 0 ? 0 : ~uint64_t{0} >> (8 - count) * 8;
  return {codes.x & static_cast<uint32_t>(keep), codes.y & static_cast<uint32_t>(keep >> 32)};
}

// Integers of a run cut to `bits` bits behind a shift; `any` has the bit length of the largest magnitude.
struct CutRule {
  int shift;
  int half;
  int odd;
  int most;

  __device__ __forceinline__ CutRule(uint32_t any, int bits) {
    shift = max(0, 32 - __clz(static_cast<int>(any)) - (bits - 1));
    half = shift > 0 ? (1 << (shift - 1)) - 1 : 0;
    odd = shift > 0 ? 1 : 0;
    most = (1 << (bits - 1)) - 1;
  }
  __device__ __forceinline__ int code(int q) const {
    return min((q + half + (q >> shift & odd)) >> shift, most);
  }
};

}  // namespace quantloom::cuda
