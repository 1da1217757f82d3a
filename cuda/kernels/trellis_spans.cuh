// Spans of 128 activations and bands of 128 sums, as a warp holds them.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

__device__ __forceinline__ float trellis_element(const TrellisProduct& p, const void* row, int64_t at) {
  return p.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(row)[at])
                    : __half2float(static_cast<const __half*>(row)[at]);
}

// The orthonormal Hadamard matrix of order 128, natural order, of kSpans rows side by side: a lane has four
// values of each, of the numbers 4 * lane + i or of any others whose bits are those, changed in place.
template <int kSpans>
__device__ __forceinline__ void rotate_spans(float (&v)[kSpans][4]) {
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
    const float a = v[s][0] + v[s][1];
    const float b = v[s][0] - v[s][1];
    const float c = v[s][2] + v[s][3];
    const float d = v[s][2] - v[s][3];
    v[s][0] = a + c;
    v[s][1] = b + d;
    v[s][2] = a - c;
    v[s][3] = b - d;
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float sign = (threadIdx.x & distance) != 0 ? -1.0F : 1.0F;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[s][i] = fmaf(sign, v[s][i], __shfl_xor_sync(~0U, v[s][i], distance));
    }
  }
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[s][i] *= 0.08838834764831845F;
  }
}

__device__ __forceinline__ void rotate_128(float (&v)[4]) {
  float one[1][4] = {{v[0], v[1], v[2], v[3]}};
  rotate_spans(one);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = one[0][i];
}

// A lane's four activations of a span, and their scales, on their way.
struct SpanLoad {
  uint2 x = make_uint2(0, 0);
  uint2 scales = make_uint2(0, 0);
};

// Four elements of a row, one by one: those past its end are zero. Not inlined: it is rare, and long code
// takes long to fetch.
static __device__ __noinline__ uint2 ask_four(const uint16_t* row, int64_t first, int64_t end) {
  uint32_t four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = first + i < end ? row[first + i] : 0U;
  return make_uint2(four[0] | four[1] << 16, four[2] | four[3] << 16);
}

__device__ __forceinline__ SpanLoad ask_span(const TrellisProduct& p, int token, int span) {
  const int column = span * kTrellisBand + static_cast<int>(threadIdx.x % 32) * 4;
  const auto* const row = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
  SpanLoad load;
  if (p.x_in_fours && column + 4 <= p.k) {
    // Not through the read-only path, which may be read before the previous kernel has ended.
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(load.x.x), "=r"(load.x.y) : "l"(row + column));
    load.scales = __ldg(reinterpret_cast<const uint2*>(p.input_scales + column));
  } else {
    load.x = ask_four(row, column, p.k);
    load.scales = ask_four(reinterpret_cast<const uint16_t*>(p.input_scales), column, p.k);
  }
  return load;
}

__device__ __forceinline__ void scale_span(const TrellisProduct& p, const SpanLoad& load, float (&v)[4]) {
  using Half = HalfPair<__half>;
  using Brain = HalfPair<__nv_bfloat16>;
  v[0] = (p.bfloat16 ? Brain::low(load.x.x) : Half::low(load.x.x)) * Half::low(load.scales.x);
  v[1] = (p.bfloat16 ? Brain::high(load.x.x) : Half::high(load.x.x)) * Half::high(load.scales.x);
  v[2] = (p.bfloat16 ? Brain::low(load.x.y) : Half::low(load.x.y)) * Half::low(load.scales.y);
  v[3] = (p.bfloat16 ? Brain::high(load.x.y) : Half::high(load.x.y)) * Half::high(load.scales.y);
}

// Four neighbours, rounded to bfloat16 or float16.
__device__ __forceinline__ uint2 round_four(bool bfloat16, float a, float b, float c, float d) {
  if (bfloat16) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(a, b);
    const __nv_bfloat162 high = __floats2bfloat162_rn(c, d);
    return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
  const __half2 low = __floats2half2_rn(a, b);
  const __half2 high = __floats2half2_rn(c, d);
  return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
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

// A lane's rows of a band: number i is that at place 4 * lane + i as walks leave sums; place 8 g + 2 u + r of
// each 64 rows is row 16 u + 8 r + g.
__device__ __forceinline__ int row_of_lane(int band, int i) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return band * kTrellisBand + 64 * (lane / 16) + 32 * (lane & 1) + lane % 16 / 2 + 16 * (i / 2) +
         8 * (i % 2);
}

// The output scales of a lane's rows, on their way.
struct BandScales {
  __half four[4];

  __device__ __forceinline__ void ask(const TrellisProduct& p, int band) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = p.output_scales[min(row_of_lane(band, i), p.n - 1)];
  }
};

// A band's sums as walks leave them, rotated, scaled, and out: by one warp.
__device__ __forceinline__ void finish_rows(const TrellisProduct& p, float (&v)[4], const BandScales& scales,
                                            int band, int token) {
  if (p.rotated) rotate_128(v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row_of_lane(band, i);
    if (row < p.n) store_row(p, token, row, v[i] * __half2float(scales.four[i]));
  }
}

// Sums of a band that the blocks of a team have sent: rotated, scaled, and out. By one warp.
__device__ __forceinline__ void finish_band(const TrellisProduct& p, const TrellisDeal& deal,
                                            const BandScales& scales, const float* received, int tokens,
                                            int band, int token) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float v[4] = {};
#pragma unroll 4
  for (int rank = 0; rank < deal.blocks; ++rank) {
    const float4 four = *reinterpret_cast<const float4*>(received + (rank * tokens + token) * 128 + lane * 4);
    v[0] += four.x;
    v[1] += four.y;
    v[2] += four.z;
    v[3] += four.w;
  }
  finish_rows(p, v, scales, band, token);
}

}  // namespace quantloom::cuda
