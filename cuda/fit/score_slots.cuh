// Scores |c|^2 - 2 x.c as products of float16 for tensor cores.
//
// Values are multiplied by a power of two and split into float16 parts: x = xh + xl, -2 c = ch + cl,
// |c|^2 / kNormUnit = n0 + n1 + n2. A score is then one sum over slots,
//   row:   xh  xh  xl  ... (for each dimension)  unit unit unit  0 ...
//   entry: ch  cl  ch  ...                       n0   n1   n2    0 ...
// whose products are exact. With d <= 4 dimensions, all slots fit one product of depth 16.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace quantloom::cuda {

constexpr int kSlotsPerStep = 16;
constexpr float kNormUnit = 16384;    // a row's share of the norm's products
constexpr float kPadding = 65504;     // norm parts of an entry that no row may choose
constexpr int kLargestExponent = 12;  // scaled values are below 2^12

// Products of depth 16 that a score takes.
__host__ __device__ constexpr int steps_of(int64_t d) {
  return static_cast<int>((3 * d + 3 + kSlotsPerStep - 1) / kSlotsPerStep);
}

// The slot of a row; value(j) gives its scaled values.
template <class Value>
__host__ __device__ __forceinline__ float row_slot(int d, int slot, const Value& value) {
  if (slot >= 3 * d) return slot < 3 * d + 3 ? kNormUnit : 0.0F;
  const float whole = value(slot / 3);
  const float high = __half2float(__float2half_rn(whole));
  return slot % 3 == 2 ? whole - high : high;
}

// The slot of a centroid; value(j) gives its scaled values.
template <class Value>
__host__ __device__ __forceinline__ float entry_slot(int d, int slot, const Value& value) {
  if (slot >= 3 * d + 3) return 0.0F;
  if (slot >= 3 * d) {
    double norm = 0;
    for (int j = 0; j < d; ++j) norm += static_cast<double>(value(j)) * static_cast<double>(value(j));
    norm /= static_cast<double>(kNormUnit);
    float part = 0;
    for (int i = 0; i <= slot - 3 * d; ++i) {
      part = __half2float(__float2half_rn(static_cast<float>(norm)));
      norm -= static_cast<double>(part);
    }
    return part;
  }
  const float whole = -2 * value(slot / 3);
  const float high = __half2float(__float2half_rn(whole));
  return slot % 3 == 1 ? whole - high : high;
}

// How far above the least score those of nearest centroids can lie, for a row of square |x|^2, both scaled.
//
// The parts leave out 3 * 2^-22 of |x||2c|. Tensor cores add 16 products and a sum, each cut off 2^-23 below
// the largest. Together a score is off by less than k (|c|^2 + 2 |x||c|), k = steps * 2^-18, that is by less
// than k (5 |x|^2 + 3 D) with D the squared distance. The other terms cover parts below float16's normal
// numbers.
__host__ __device__ __forceinline__ float score_slack(int steps, float square, float least) {
  const float rounding = static_cast<float>(steps) * 0x1p-18F;
  const float distance = fmaxf(0.0F, least + square);
  return rounding * (16 * square + 12 * distance) + 0x1p-9F + 0x1p-20F * (sqrtf(square) + sqrtf(distance));
}

}  // namespace quantloom::cuda
