// Both ends of the products of many tokens with trellis codes.
#include "common/check.cuh"
#include "kernels/overlap.cuh"
#include "kernels/token_order.hpp"
#include "kernels/trellis_spans.cuh"
#include "kernels/trellis_tiles.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBandThreads = 128;
constexpr int kOctetThreads = 256;

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

// As numbers without sign order; NaN is the largest.
__device__ __forceinline__ uint32_t largest_of(const float (&v)[kAtOnce][4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int s = 0; s < kAtOnce; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(v[s][i]) & 0x7FFFFFFFU);
  }
  return largest;
}

// To token order (token_order.hpp). Activations 4 l + i (l = lane % 16) of a block of 64 are inputs 16 t +
// 8 h + 2 s + c with t = l / 4, h = l / 2 % 2, s = 2 (l % 2) + i / 2, c = i % 2: position 16 s + 8 h + 2 t +
// c.
__device__ __forceinline__ void store_spans(const TileWork& work, int token, int first, int spans,
                                            float scale, const float (&v)[kAtOnce][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t tokens = work.plan.padded_tokens();
  const int low_piece = fragments::place_of_piece(token, 4 * (lane & 1) + (lane >> 1 & 1));
  const int high_piece = fragments::place_of_piece(token, 4 * (lane & 1) + (lane >> 1 & 1) + 2);
#pragma unroll
  for (int s = 0; s < kAtOnce; ++s) {
    if (first + s >= spans) break;
    auto* const to = reinterpret_cast<__half2*>(
        work.tokens + ((2 * (first + s) + lane / 16) * tokens + token) * fragments::kTokenPieces);
    to[low_piece * 4 + lane % 16 / 4] = __floats2half2_rn(v[s][0] * scale, v[s][1] * scale);
    to[high_piece * 4 + lane % 16 / 4] = __floats2half2_rn(v[s][2] * scale, v[s][3] * scale);
  }
}

// A block of threads for each token, also those of padding. Activations are multiplied by a power of two that
// brings the largest into [1/8, 1/4): sums over 65536 columns then stay within float16, whatever the weights.
__global__ void __launch_bounds__(kThreads) rotate_in(const __grid_constant__ TrellisProduct p,
                                                      const __grid_constant__ TileWork work, float* factors) {
  constexpr int kRound = kAtOnce * (kThreads / 32);
  __shared__ uint32_t largest_of_warp[kThreads / 32];
  let_next_begin();
  wait_for_previous();
  const int token = static_cast<int>(blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int spans = p.column_pieces / 2;
  float kept[kAtOnce][4] = {};  // of the first round
  if (token >= p.m) {
    for (int span = kAtOnce * warp; span < spans; span += kRound) {
      store_spans(work, token, span, spans, 0.0F, kept);
    }
    return;
  }
  load_spans(p, token, kAtOnce * warp, spans, kept);
  uint32_t largest = largest_of(kept);
  for (int span = kAtOnce * warp + kRound; span < spans; span += kRound) {
    float v[kAtOnce][4];
    load_spans(p, token, span, spans, v);
    largest = max(largest, largest_of(v));
  }
  largest = __reduce_max_sync(~0U, largest);
  if (lane == 0) largest_of_warp[warp] = largest;
  __syncthreads();
  for (const uint32_t other : largest_of_warp) largest = max(largest, other);
  // Not finite: as it is, which makes NaN or infinity of the sums.
  const int exponent = largest >= 0x7F800000U ? 0 : max(static_cast<int>(largest >> 23) - 127 + 3, -120);
  const float scale = __int_as_float((127 - exponent) << 23);
  if (threadIdx.x == 0) factors[token] = __int_as_float((127 + exponent) << 23);
  store_spans(work, token, kAtOnce * warp, spans, scale, kept);
  for (int span = kAtOnce * warp + kRound; span < spans; span += kRound) {
    float v[kAtOnce][4];
    load_spans(p, token, span, spans, v);
    store_spans(work, token, span, spans, scale, v);
  }
}

// y of four rows in a row.
__device__ __forceinline__ void store_rows(const TrellisProduct& p, int token, int row, const float (&v)[4]) {
  auto* const to = static_cast<uint16_t*>(p.y) + token * p.y_stride + row;
  if (row + 4 > p.n || reinterpret_cast<uintptr_t>(to) % 8 != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < p.n) store_row(p, token, row + i, v[i]);
    }
    return;
  }
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = p.bias == nullptr ? v[i] : v[i] + trellis_element(p, p.bias, row + i);
  *reinterpret_cast<uint2*>(to) = round_four(p.bfloat16, sum[0], sum[1], sum[2], sum[3]);
}

// A block of threads for a band of 128 rows and eight tokens: the parts of its sums are added, a thread for
// the sums of a lane of the tile loop, and each warp rotates those of one token.
__global__ void __launch_bounds__(kOctetThreads)
    rotate_out(const __grid_constant__ TrellisProduct p, const __grid_constant__ TileWork work, int bands,
               const __half* sums, const float* factors) {
  constexpr int kStride = kTrellisBand + 4;  // keeps the lanes of a tile in different banks
  __shared__ __align__(16) float exchanged[8][kStride];
  let_next_begin();
  wait_for_previous();
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int band = static_cast<int>(blockIdx.x % static_cast<unsigned>(bands));
  const int octet = static_cast<int>(blockIdx.x / static_cast<unsigned>(bands));
  const int token = 8 * octet + warp;
  const int tiles = work.plan.tokens / 8;
  // A tile has two bands.
  const int64_t tile = static_cast<int64_t>(band / 2) * work.plan.token_tiles + octet / tiles;
  const int first = work.plan.first_part(tile);
  const int last = work.plan.last_part(tile);
  float v[4];
  if (first == last) {
    if (token >= p.m) return;
    using Half = HalfPair<__half>;
    const uint2 four = *reinterpret_cast<const uint2*>(
        sums + (static_cast<int64_t>(token) * bands + band) * kTrellisBand + lane * 4);
    v[0] = Half::low(four.x);
    v[1] = Half::high(four.x);
    v[2] = Half::low(four.y);
    v[3] = Half::high(four.y);
  } else {
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 4
    for (int part = first; part <= last; ++part) {
      const float4 more = work.partials[partial_place(work.plan.slot(part, tile), band % 2 * 2 + warp / 4,
                                                      warp % 4, octet % tiles, tiles, lane)];
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    // Rows row and row + 8 of tokens 2 * (lane % 4) and the next.
    const int row = 16 * warp + lane / 4;
    exchanged[lane % 4 * 2][row] = sum.x;
    exchanged[lane % 4 * 2 + 1][row] = sum.y;
    exchanged[lane % 4 * 2][row + 8] = sum.z;
    exchanged[lane % 4 * 2 + 1][row + 8] = sum.w;
    __syncthreads();
    if (token >= p.m) return;
    const float4 four = *reinterpret_cast<const float4*>(&exchanged[warp][4 * lane]);
    v[0] = four.x;
    v[1] = four.y;
    v[2] = four.z;
    v[3] = four.w;
  }
  if (p.rotated) rotate_128(v);
  const float factor = factors[token];
  const int row = band * kTrellisBand + lane * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] *= factor * (row + i < p.n ? __half2float(p.output_scales[row + i]) : 0.0F);
  }
  store_rows(p, token, row, v);
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

void launch_trellis_rotate_in(const TrellisProduct& p, const TrellisTileWork& work, bool overlap,
                              cudaStream_t stream) {
  LaunchSettings settings(dim3(static_cast<unsigned>(work.tiles.plan.padded_tokens())), dim3(kThreads),
                          stream, overlap, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, rotate_in, p, work.tiles, work.factors),
             "matmul_cuda: launch of rotate_in");
}

void launch_trellis_rotate_out(const TrellisProduct& p, const TrellisTileWork& work, cudaStream_t stream) {
  const int bands = work.row_blocks / 2;
  const int64_t grid = work.tiles.plan.padded_tokens() / 8 * bands;
  if (grid > 2147483647) throw Unsupported(text_of("matmul_cuda: no kernel for ", grid, " bands of sums"));
  LaunchSettings settings(dim3(static_cast<unsigned>(grid)), dim3(kOctetThreads), stream, true, 1);
  check_cuda(
      cudaLaunchKernelEx(&settings.config, rotate_out, p, work.tiles, bands,
                         static_cast<const __half*>(work.sums), static_cast<const float*>(work.factors)),
      "matmul_cuda: launch of rotate_out");
}

}  // namespace quantloom::cuda
