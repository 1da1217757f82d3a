// How a group of the formats "uniform" and "codebook" is fitted and a code is chosen: the arithmetic of the
// CPU's encoders, operation by operation, for the host and the device. Files that include this are compiled
// with -fmad=false, because a fused multiply-add rounds once where the encoder rounds twice.
#pragma once

#include <cmath>
#include <cstdint>

#include "quantloom/dtype.hpp"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define QUANTLOOM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUANTLOOM_HOST_DEVICE inline
#endif

namespace quantloom::cuda {

// A uniform grid, or a table of values.
struct ScalarGrid {
  int bits = 4;
  bool symmetric = true;  // also for tables, which have no zero points
  DType scale_dtype = DType::f16;
  const float* table = nullptr;      // rising; null for a uniform grid
  const float* midpoints = nullptr;  // 2^bits - 1: between neighbours of the table, then infinite
  float largest_magnitude = 0;       // of the table
  bool has_zero = false;             // the table

  // One bit, symmetric: the sign decides.
  QUANTLOOM_HOST_DEVICE bool is_sign() const { return table == nullptr && symmetric && bits == 1; }
  QUANTLOOM_HOST_DEVICE float largest_code() const { return static_cast<float>((1 << bits) - 1); }
  QUANTLOOM_HOST_DEVICE float symmetric_zero_point() const {
    return bits == 1 ? 0.5F : static_cast<float>(1 << (bits - 1));
  }
};

struct ValueRange {
  double low = 0;             // min(0, smallest value)
  double high = 0;            // max(0, largest value)
  double mean_magnitude = 0;  // only if the grid is_sign()
};

struct GroupFit {
  float scale = 1;
  float zero = 0;
  bool finite = true;  // false: the ends of the grid overflow
};

struct EncodedValue {
  float decoded;
  uint32_t code;
};

QUANTLOOM_HOST_DEVICE float round_to_dtype(DType dtype, float value) {
#ifdef __CUDA_ARCH__
  if (dtype == DType::f16) return __half2float(__float2half_rn(value));
  if (dtype == DType::bf16) return __bfloat162float(__float2bfloat16_rn(value));
#else
  if (dtype == DType::f16) return float_from_f16(f16_from_float(value));
  if (dtype == DType::bf16) return float_from_bf16(bf16_from_float(value));
#endif
  return value;
}

QUANTLOOM_HOST_DEVICE float smallest_stored_scale(DType dtype) {
  return dtype == DType::f16 ? 0x1p-24F : 0x1p-126F;
}

// As it is stored: rounded, at least the smallest scale.
QUANTLOOM_HOST_DEVICE float stored_scale(DType dtype, double wanted) {
  const float rounded = round_to_dtype(dtype, static_cast<float>(wanted < 0x1p127 ? wanted : 0x1p127));
  const float smallest = smallest_stored_scale(dtype);
  return rounded > smallest ? rounded : smallest;
}

QUANTLOOM_HOST_DEVICE GroupFit fit_grid(const ScalarGrid& grid, const ValueRange& range, double shrink) {
  const double levels = (1 << grid.bits) - 1;
  const double largest = -range.low > range.high ? -range.low : range.high;
  if (grid.table != nullptr) {
    if (largest == 0) return {grid.has_zero ? 1.0F : smallest_stored_scale(grid.scale_dtype), 0.0F, true};
    const float scale =
        stored_scale(grid.scale_dtype, shrink * largest / static_cast<double>(grid.largest_magnitude));
    return {scale, 0.0F, scale * grid.largest_magnitude <= 0x1.fffffep127F};
  }
  if (largest == 0) {
    if (grid.is_sign()) return {smallest_stored_scale(grid.scale_dtype), 0.5F, true};
    return {1.0F, grid.symmetric ? grid.symmetric_zero_point() : 0.0F, true};
  }
  double span = shrink * (range.high - range.low);
  if (grid.symmetric) span = shrink * 2 * (grid.bits == 1 ? range.mean_magnitude : largest);
  const double wanted = span / levels;
  GroupFit fit{stored_scale(grid.scale_dtype, wanted), grid.symmetric_zero_point(), true};
  if (!grid.symmetric) {
    double zero = rint(-shrink * range.low / static_cast<double>(fit.scale));
    zero = zero < 0 ? 0 : zero;
    fit.zero = static_cast<float>(zero < levels ? zero : levels);
  }
  const float above = static_cast<float>(levels) - fit.zero;
  const float end = fit.scale * (fit.zero > above ? fit.zero : above);
  fit.finite = end <= 0x1.fffffep127F;
  return fit;
}

QUANTLOOM_HOST_DEVICE EncodedValue encode_value(const ScalarGrid& grid, float value, float scale,
                                                float zero) {
  if (grid.table != nullptr) {
    const float steps = value / scale;
    int found = 0;  // midpoints below
    for (int half = 1 << (grid.bits - 1); half > 0; half /= 2) {
      found += steps > grid.midpoints[found + half - 1] ? half : 0;
    }
    return {scale * grid.table[found], static_cast<uint32_t>(found)};
  }
  if (grid.is_sign()) {
    const bool positive = value >= 0;
    return {scale * (positive ? 0.5F : -0.5F), positive ? 1U : 0U};
  }
  constexpr float kRoundingShift = 0x1.8p23F;  // rounds |x| < 2^22 to an integer, ties to even
  const float low = -zero;
  const float high = grid.largest_code() - zero;
  float steps = value / scale;
  steps = steps > low ? steps : low;
  steps = steps < high ? steps : high;
  const float level = (steps + kRoundingShift) - kRoundingShift;
  return {scale * level, static_cast<uint32_t>(static_cast<int32_t>(level + zero))};
}

}  // namespace quantloom::cuda
