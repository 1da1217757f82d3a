// Scales and zero points of the format "spqr" from their codes and grids (src/formats/bilevel_order.hpp).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "formats/bilevel_order.hpp"
#include "formats/code_fields.cuh"

namespace quantloom::cuda {

// The codes of a lane's eight rows in a group. kWide: fields of 8 bits, else of 4.
template <bool kWide>
class BilevelCodes {
 public:
  static constexpr int kBytes = kWide ? 16 : 8;

  // `at`: (row block * groups + group) * 8 + lane / 4.
  __device__ __forceinline__ void load(const void* parameters, int64_t at) {
    if constexpr (kWide) {
      const uint4 four = __ldg(static_cast<const uint4*>(parameters) + at);
      words_[0] = four.x;
      words_[1] = four.y;
      words_[2] = four.z;
      words_[3] = four.w;
    } else {
      const uint2 two = __ldg(static_cast<const uint2*>(parameters) + at);
      words_[0] = two.x;
      words_[1] = two.y;
    }
  }

  // Of row `i` of the eight: a scale's, or a zero point's.
  __device__ __forceinline__ float code(bool zero, int i) const {
    const fragments::BilevelField field = fragments::bilevel_field(kBytes, zero, i);
    const uint32_t word = words_[field.byte / 4] >> (field.byte % 4 * 8 + field.bit);
    return static_cast<float>(word & (kWide ? 0xFFU : 0xFU));
  }

  // The same as 1 + code / kRaised, with fewer operations.
  static constexpr float kRaised = kWide ? 256.0F : 16.0F;
  __device__ __forceinline__ float raised(bool zero, int i) const {
    constexpr int kPlace = kWide ? 15 : 19;
    const fragments::BilevelField field = fragments::bilevel_field(kBytes, zero, i);
    const int from = field.byte % 4 * 8 + field.bit;
    const uint32_t word = words_[field.byte / 4];
    const uint32_t moved = from <= kPlace ? word << (kPlace - from) : word >> (from - kPlace);
    return __uint_as_float(and_or(moved, (kWide ? 0xFFU : 0xFU) << kPlace, 0x3F800000U));
  }

 private:
  uint32_t words_[kBytes / 4];
};

// A grid of scales and one of zero points: number = step * (code - zero).
struct BilevelGrids {
  float scale_step;
  float scale_zero;
  float zero_step;
  float zero_zero;

  BilevelGrids() = default;
  explicit __device__ __forceinline__ BilevelGrids(uint2 raw)
      : scale_step(half(raw.x & 0xFFFFU)),
        scale_zero(half(raw.x >> 16)),
        zero_step(half(raw.y & 0xFFFFU)),
        zero_zero(half(raw.y >> 16)) {}

 private:
  static __device__ __forceinline__ float half(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

}  // namespace quantloom::cuda
