// Spans of 128 activations and bands of 128 sums, as a warp holds them.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

__device__ __forceinline__ float trellis_element(const TrellisProduct& p, const void* row, int64_t at) {
  return p.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(row)[at])
                    : __half2float(static_cast<const __half*>(row)[at]);
}

// The orthonormal Hadamard matrix of order 128, natural order: a lane has four values, of the numbers
// 4 * lane + i or of any others whose bits are those, changed in place.
__device__ __forceinline__ void rotate_128(float (&v)[4]) {
  const float a = v[0] + v[1];
  const float b = v[0] - v[1];
  const float c = v[2] + v[3];
  const float d = v[2] - v[3];
  v[0] = a + c;
  v[1] = b + d;
  v[2] = a - c;
  v[3] = b - d;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float sign = (threadIdx.x & distance) != 0 ? -1.0F : 1.0F;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = fmaf(sign, v[i], __shfl_xor_sync(~0U, v[i], distance));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] *= 0.08838834764831845F;
}

// A lane's four activations of a span, scaled and rotated.
__device__ __forceinline__ void load_span(const TrellisProduct& p, int token, int span, float (&v)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int column = span * kTrellisBand + lane * 4;
  const auto* const row = static_cast<const unsigned char*>(p.x) + token * p.x_stride * 2;
  if (p.x_in_fours && column + 4 <= p.k) {
    uint2 x;  // not through the read-only path, which may be read before the previous kernel has ended
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(row + static_cast<int64_t>(column) * 2));
    const uint2 scales = __ldg(reinterpret_cast<const uint2*>(p.input_scales + column));
    using Half = HalfPair<__half>;
    using Brain = HalfPair<__nv_bfloat16>;
    v[0] = (p.bfloat16 ? Brain::low(x.x) : Half::low(x.x)) * Half::low(scales.x);
    v[1] = (p.bfloat16 ? Brain::high(x.x) : Half::high(x.x)) * Half::high(scales.x);
    v[2] = (p.bfloat16 ? Brain::low(x.y) : Half::low(x.y)) * Half::low(scales.y);
    v[3] = (p.bfloat16 ? Brain::high(x.y) : Half::high(x.y)) * Half::high(scales.y);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = column + i < p.k ? trellis_element(p, row, column + i) * __half2float(p.input_scales[column + i])
                              : 0.0F;
    }
  }
  if (p.rotated) rotate_128(v);
}

// y of one row: the sum and the bias.
__device__ __forceinline__ void store_row(const TrellisProduct& p, int token, int64_t row, float sum) {
  if (p.bias != nullptr) sum += trellis_element(p, p.bias, row);
  const int64_t to = token * p.y_stride + row;
  if (p.bfloat16) {
    static_cast<__nv_bfloat16*>(p.y)[to] = __float2bfloat16_rn(sum);
  } else {
    static_cast<__half*>(p.y)[to] = __float2half_rn(sum);
  }
}

// A band's sums as walks leave them, rotated, scaled, and out: by one warp. A lane has those at places
// 4 * lane + i of the band; place 8 g + 2 u + r of each 64 rows is row 16 u + 8 r + g.
__device__ __forceinline__ void finish_rows(const TrellisProduct& p, float (&v)[4], int band, int token) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (p.rotated) rotate_128(v);
  const int row = band * kTrellisBand + 64 * (lane / 16) + 32 * (lane & 1) + lane % 16 / 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = row + 16 * (i / 2) + 8 * (i % 2);
    if (at < p.n) store_row(p, token, at, v[i] * __half2float(p.output_scales[at]));
  }
}

}  // namespace quantloom::cuda
