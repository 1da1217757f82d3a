// Both ends of the products of many tokens with trellis codes.
#include "common/check.cuh"
#include "kernels/overlap.cuh"
#include "kernels/trellis_spans.cuh"
#include "kernels/trellis_tiles.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBandThreads = 128;

constexpr int kAtOnce = 4;  // spans of a warp

// Scaled and rotated spans [first, first + kAtOnce) of a token; zeros past the last.
__device__ __forceinline__ void load_spans(const TrellisProduct& p, int token, int first, int spans,
                                           float (&v)[kAtOnce][4]) {
  SpanLoad load[kAtOnce];
#pragma unroll
  for (int s = 0; s < kAtOnce; ++s) {
    if (first + s < spans) load[s] = ask_span(p, token, first + s);
  }
#pragma unroll
  for (int s = 0; s < kAtOnce; ++s) scale_span(p, load[s], v[s]);
  if (p.rotated) rotate_spans(v);
}

// A block of threads for each token. Activations are multiplied by a power of two that brings the largest
// into [1/8, 1/4): sums over 65536 columns then stay within float16, whatever the weights. In the order of
// trellis_column().
__global__ void __launch_bounds__(kThreads) rotate_in(const __grid_constant__ TrellisProduct p, int rows,
                                                      __half* activations, __half* ones, float* factors) {
  __shared__ uint32_t largest_of[kThreads / 32];
  const int token = static_cast<int>(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int spans = p.column_pieces / 2;
  uint32_t largest = 0;  // numbers without sign order as their bits do; NaN is the largest
  for (int span = kAtOnce * warp; span < spans; span += kAtOnce * (kThreads / 32)) {
    float v[kAtOnce][4];
    load_spans(p, token, span, spans, v);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(v[s][i]) & 0x7FFFFFFFU);
    }
  }
  largest = __reduce_max_sync(~0U, largest);
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  for (const uint32_t other : largest_of) largest = max(largest, other);
  // Not finite: as it is, which makes NaN or infinity of the sums.
  const int exponent = largest >= 0x7F800000U ? 0 : max(static_cast<int>(largest >> 23) - 127 + 3, -120);
  const float scale = __int_as_float((127 - exponent) << 23);
  if (threadIdx.x == 0) factors[token] = __int_as_float((127 + exponent) << 23);
  for (int span = kAtOnce * warp; span < spans; span += kAtOnce * (kThreads / 32)) {
    float v[kAtOnce][4];
    load_spans(p, token, span, spans, v);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (span + s >= spans) break;
      __half* const to = activations + (static_cast<int64_t>(token) * spans + span + s) * kTrellisBand;
      const __half2 low = __floats2half2_rn(v[s][0] * scale, v[s][1] * scale);
      const __half2 high = __floats2half2_rn(v[s][2] * scale, v[s][3] * scale);
      // Activations 4 * (lane % 16) + i of a block of 64: of tile lane % 16 / 4, which trellis_column() puts
      // at number j = i % 2 + 2 * (lane / 2 % 2) of step 2 * (lane % 2) + i / 2.
      __half* const place =
          to + lane / 16 * kTrellisPiece + 32 * (lane & 1) + lane % 16 / 4 * 4 + (lane >> 1 & 1) * 2;
      *reinterpret_cast<__half2*>(place) = low;
      *reinterpret_cast<__half2*>(place + 16) = high;
    }
  }
  if (token == 0) {
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += kThreads)
      ones[row] = __float2half_rn(1.0F);
  }
}

// A warp for each band of a token.
__global__ void __launch_bounds__(kBandThreads)
    rotate_out(const __grid_constant__ TrellisProduct p, int bands, int blocks, const __half* sums,
               const float* factors) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int band =
      static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks) * (kBandThreads / 32) + threadIdx.x / 32);
  const int token = static_cast<int>(blockIdx.x / static_cast<unsigned>(blocks));
  if (band >= bands) return;
  const uint2 four = *reinterpret_cast<const uint2*>(
      sums + (static_cast<int64_t>(token) * bands + band) * kTrellisBand + lane * 4);
  using Half = HalfPair<__half>;
  float v[4] = {Half::low(four.x), Half::high(four.x), Half::low(four.y), Half::high(four.y)};
  if (p.rotated) rotate_128(v);
  const float factor = factors[token];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = band * kTrellisBand + lane * 4 + i;
    if (row < p.n) store_row(p, token, row, v[i] * factor * __half2float(p.output_scales[row]));
  }
}

// A warp for each band of a token.
__global__ void __launch_bounds__(kBandThreads)
    add_bands(const __grid_constant__ TrellisProduct p, const __grid_constant__ TrellisDeal deal, int tokens,
              int bands) {
  const int band = static_cast<int>(blockIdx.x * (kBandThreads / 32) + threadIdx.x / 32);
  BandScales scales;
  scales.ask(p, min(band, bands - 1));
  wait_for_previous();
  if (band >= bands) return;
  finish_band(p, deal, scales, p.partial + static_cast<int64_t>(band) * deal.blocks * tokens * kTrellisBand,
              tokens, band, static_cast<int>(blockIdx.y));
}

}  // namespace

void launch_trellis_sums(const TrellisLaunch& launch) {
  const TrellisDeal& deal = launch.deal;
  const int bands = deal.teams * deal.bands + deal.extra;
  const int tokens = launch.product.m == 1 ? 1 : kMostTrellisTokens;
  LaunchSettings settings(dim3(static_cast<unsigned>((bands + kBandThreads / 32 - 1) / (kBandThreads / 32)),
                               static_cast<unsigned>(launch.product.m)),
                          dim3(kBandThreads), launch.stream, true, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, add_bands, launch.product, deal, tokens, bands),
             "matmul_cuda: launch of add_bands");
}

void launch_trellis_rotate_in(const TrellisProduct& p, int row_blocks, const TrellisTileWork& work,
                              unsigned char* workspace, cudaStream_t stream) {
  rotate_in<<<static_cast<unsigned>(p.m), kThreads, 0, stream>>>(
      p, 64 * row_blocks, reinterpret_cast<__half*>(workspace + work.activations),
      reinterpret_cast<__half*>(workspace + work.ones), reinterpret_cast<float*>(workspace + work.factors));
  check_cuda(cudaGetLastError(), "matmul_cuda: launch of rotate_in");
}

void launch_trellis_rotate_out(const TrellisProduct& p, int row_blocks, const TrellisTileWork& work,
                               const unsigned char* workspace, cudaStream_t stream) {
  const int bands = row_blocks / 2;
  const int blocks = (bands + kBandThreads / 32 - 1) / (kBandThreads / 32);
  const int64_t grid = int64_t{blocks} * p.m;
  if (grid > 2147483647) throw Unsupported(text_of("matmul_cuda: no kernel for ", grid, " bands of sums"));
  rotate_out<<<static_cast<unsigned>(grid), kBandThreads, 0, stream>>>(
      p, bands, blocks, reinterpret_cast<const __half*>(workspace + work.sums),
      reinterpret_cast<const float*>(workspace + work.factors));
  check_cuda(cudaGetLastError(), "matmul_cuda: launch of rotate_out");
}

}  // namespace quantloom::cuda
