// Device decoder of the format "uniform": from packed words, a scale and a zero point to values.
// include/quantloom/formats/uniform.hpp has the layout of the planes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

// The planes of a uniform matrix as a kernel gets them.
struct UniformPlanes {
  const uint32_t* codes = nullptr;  // [n, words_per_row]
  const void* scales = nullptr;     // [n, group_count] of scale_dtype; one value if per_tensor
  const uint32_t* zeros = nullptr;  // [group_count, words_per_zero_row], or null: zero_point holds everywhere
  const int32_t* group_index = nullptr;  // [k], or null: groups of consecutive columns
  int64_t words_per_row = 0;
  int64_t words_per_zero_row = 0;
  int64_t group_count = 0;
  int64_t columns_per_group = 0;
  float zero_point = 0.0F;
  DType scale_dtype = DType::f16;
  bool per_tensor = false;
};

// `kCount` codes of a bit stream from bit `first_bit` on, in registers: word i of the window holds the
// bits [32*i, 32*i + 32) after first_bit. Reads only words below `word_count` of the row.
template <int kBits, int kCount>
struct CodeWindow {
  static constexpr int kWords = (kBits * kCount + 31) / 32;
  // Windows begin at multiples of their own size; if that is whole words, they never straddle one more.
  static constexpr bool kAligned = kBits * kCount % 32 == 0;

  uint32_t words[kWords];

  __device__ __forceinline__ void load(const uint32_t* row, int64_t first_bit, int64_t word_count) {
    const int64_t first_word = first_bit >> 5;
    uint32_t raw[kWords + 1];
#pragma unroll
    for (int i = 0; i <= kWords; ++i) {
      const bool wanted = i < kWords || !kAligned;
      raw[i] = wanted && first_word + i < word_count ? __ldg(row + first_word + i) : 0U;
    }
    const auto offset = static_cast<uint32_t>(first_bit & 31);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = kAligned ? raw[i] : __funnelshift_r(raw[i], raw[i + 1], offset);
    }
  }

  // Code `i`, 0 <= i < kCount; `i` is a constant after unrolling.
  __device__ __forceinline__ uint32_t code(int i) const {
    constexpr uint32_t kMask = (1U << kBits) - 1U;
    const int bit = i * kBits;
    const uint32_t low = words[bit / 32];
    if (bit % 32 + kBits <= 32) return (low >> (bit % 32)) & kMask;
    return __funnelshift_r(low, words[bit / 32 + 1], bit % 32) & kMask;
  }
};

__device__ __forceinline__ float load_scale(const void* scales, DType dtype, int64_t i) {
  if (dtype == DType::f16) return __half2float(static_cast<const __half*>(scales)[i]);
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(scales)[i]);
  return static_cast<const float*>(scales)[i];
}

// float(code) for a code below 2^23, without the slow conversion unit: the bits of 2^23 + code, minus 2^23.
__device__ __forceinline__ float float_from_code(uint32_t code) {
  return __fsub_rn(__uint_as_float(0x4B000000U | code), 8388608.0F);
}

template <int kBits>
struct UniformParameters {
  float scale;
  float zero;

  // The parameters of `group` in `row`. A group outside [0, group_count), which only a corrupt
  // group_index can name, decodes to NaN and reads nothing.
  __device__ __forceinline__ void load(const UniformPlanes& planes, int64_t row, int64_t group) {
    if (group < 0 || group >= planes.group_count) {
      scale = __int_as_float(0x7fffffff);
      zero = 0.0F;
      return;
    }
    const int64_t parameter_row = planes.per_tensor ? 0 : row;
    scale = load_scale(planes.scales, planes.scale_dtype, parameter_row * planes.group_count + group);
    zero = planes.zero_point;
    if (planes.zeros != nullptr) {
      CodeWindow<kBits, 1> window;
      window.load(planes.zeros + group * planes.words_per_zero_row, parameter_row * kBits,
                  planes.words_per_zero_row);
      zero = float_from_code(window.code(0));
    }
  }

  // scale * (code - zero): the difference is exact, the product rounded once, as on the CPU.
  __device__ __forceinline__ float decode(uint32_t code) const {
    return __fmul_rn(scale, __fsub_rn(float_from_code(code), zero));
  }
};

}  // namespace quantloom::cuda
