// Scales and zero points of the eight rows of a lane while it walks along the columns, in the type in which
// the tensor core multiplies.
//
// A fragment becomes scale * (fragment + offset); the sum is exact, the product rounds. Scales of the same
// type are used as they are. Scales with the range of float32 may not fit float16: then each row's are
// divided by a power of two that brings the largest into [0.25, 0.5), and factor() gives it back.
#pragma once

#include <type_traits>

#include "common/half_pairs.cuh"
#include "kernels/fragment_parameters.cuh"

namespace quantloom::cuda {

// kZeros: the grid has a plane of zero points.
template <class Decoder, class T, bool kZeros>
class GroupScales {
 public:
  // For blocks of columns [begin, end) of a block of rows.
  __device__ __forceinline__ void begin(const FragmentMatrix& w, int row_block, int begin, int end,
                                        int lane) {
    const int64_t row = static_cast<int64_t>(row_block) * w.group_count * 64 + lane / 4 * 8;
    const int step = 4 * begin;
    const int group = step / w.group_steps;
    left_ = w.group_steps - step % w.group_steps;
    if constexpr (kIsHalf) {
      exponents_[0] = exponents_[1] = 0x7F7F7F7FU;
      if (w.scale_dtype != DType::f16) find_exponents(w, row, group, (4 * end - 1) / w.group_steps);
    }
    // Columns past the last group are padding: activations are 0 there.
    groups_left_ = w.group_count - 1 - group;
    const int64_t at = row + static_cast<int64_t>(min(group, w.group_count - 1)) * 64;
    scales_at_ = static_cast<const uint4*>(w.scales) + at / (w.scale_dtype == DType::f32 ? 4 : 8);
    if constexpr (kZeros) zeros_at_ = reinterpret_cast<const uint2*>(w.zeros + at);
    load_next(w);
    take_next(w);
  }

  // Scales fragment a of unit `unit`, a constant after unrolling.
  __device__ __forceinline__ void apply(int unit, uint32_t (&a)[4]) const {
    using Pair = HalfPair<T>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kZeros) a[i] = Pair::add(a[i], offset_[2 * unit + i % 2]);
      a[i] = Pair::multiply(a[i], scale_[2 * unit + i % 2]);
    }
  }

  // After each step of 16 columns.
  __device__ __forceinline__ void advance(const FragmentMatrix& w) {
    if (--left_ > 0) return;
    left_ = w.group_steps;
    take_next(w);
  }

  // What a sum of row `i` of the eight is to be multiplied by.
  __device__ __forceinline__ float factor(int i) const {
    if constexpr (kIsHalf) return __uint_as_float(exponent(i) << 23);
    return 1.0F;
  }

 private:
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr DType kDType = kIsHalf ? DType::f16 : DType::bf16;

  // Of the group at hand, and moves on to the one after.
  __device__ __forceinline__ void load_next(const FragmentMatrix& w) {
    const bool wide = w.scale_dtype == DType::f32;
    next_.scales[0] = __ldg(scales_at_);
    if (wide) next_.scales[1] = __ldg(scales_at_ + 1);
    if constexpr (kZeros) next_.zeros = __ldg(zeros_at_);
    if (--groups_left_ < 0) return;
    scales_at_ += wide ? 16 : 8;
    if constexpr (kZeros) zeros_at_ += 8;
  }

  __device__ __forceinline__ uint32_t exponent(int i) const {
    return (exponents_[i / 4] >> (i % 4 * 8)) & 0xFFU;
  }

  // Turns the parameters loaded last into those in use, and loads those of the group after.
  __device__ __forceinline__ void take_next(const FragmentMatrix& w) {
    using Pair = HalfPair<T>;
    if (w.scale_dtype == kDType && Decoder::kUnit == 1.0F) {
      const uint4& packed = next_.scales[0];
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) scale_[i] = __byte_perm(words[i / 2], 0, i % 2 == 0 ? 0x1010 : 0x3232);
    } else if (w.scale_dtype == DType::f16) {
      convert_scales(DType::f16);
    } else if (w.scale_dtype == DType::bf16) {
      convert_scales(DType::bf16);
    } else {
      convert_scales(DType::f32);
    }
    if constexpr (kZeros) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        offset_[i] = Pair::both((Decoder::kCenter - next_.zero(i)) * (1.0F / Decoder::kUnit));
      }
    }
    load_next(w);
  }

  __device__ __forceinline__ void convert_scales(DType dtype) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float scale = next_.scale(dtype, i) * Decoder::kUnit;
      if constexpr (kIsHalf) scale *= __uint_as_float((254 - exponent(i)) << 23);
      scale_[i] = HalfPair<T>::both(scale);
    }
  }

  __device__ __forceinline__ void find_exponents(const FragmentMatrix& w, int64_t row, int first, int last) {
    uint32_t largest[8] = {};
    for (int group = first; group <= min(last, w.group_count - 1); ++group) {
      RawParameters raw;
      raw.load(w, row + static_cast<int64_t>(group) * 64);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        largest[i] = max(largest[i], (__float_as_uint(raw.scale(w.scale_dtype, i)) >> 23) & 0xFFU);
      }
    }
    exponents_[0] = exponents_[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) exponents_[i / 4] |= min(largest[i] + 2, 253U) << (i % 4 * 8);
  }

  const uint4* scales_at_;
  const uint2* zeros_at_;
  int groups_left_;  // behind the one at hand
  int left_;         // steps of the group in use
  RawParameters next_;
  uint32_t scale_[8];
  uint32_t offset_[8];
  uint32_t exponents_[2];  // of the factors, a byte each, as in float32
};

}  // namespace quantloom::cuda
