// Both ends of the products of up to 16 tokens with trellis codes.
#include "common/check.cuh"
#include "kernels/overlap.cuh"
#include "kernels/trellis_panel_launch.hpp"
#include "kernels/trellis_spans.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostSpans = 4;  // of a chunk

// A warp for each chunk of each token; tokens past the last are zero.
template <int kGroups>
__global__ void __launch_bounds__(kThreads)
    make_panels(const __grid_constant__ TrellisProduct p, const __grid_constant__ TrellisDeal deal,
                const __grid_constant__ TrellisPanelWork work) {
  constexpr int kTokens = 8 * kGroups;
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int token = static_cast<int>(blockIdx.y);
  const int chunks = deal.most_chunks();
  const int i = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  const int rank = i / chunks;
  if (rank >= deal.blocks) return;
  const int chunk = i - rank * chunks;
  const int begin = deal.first_span(rank) + chunk * deal.chunk;
  const int count = min(deal.chunk, deal.spans_of(rank) - chunk * deal.chunk);
  SpanLoad load[kMostSpans];
#pragma unroll
  for (int s = 0; s < kMostSpans; ++s) {
    if (s < count && token < p.m) load[s] = ask_span(p, token, begin + s);
  }
  float v[kMostSpans][4];
#pragma unroll
  for (int s = 0; s < kMostSpans; ++s) scale_span(p, load[s], v[s]);
  if (p.rotated) rotate_spans(v);
  uint32_t largest = 0;  // numbers without sign order as their bits do; NaN is the largest
#pragma unroll
  for (int s = 0; s < kMostSpans; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = max(largest, __float_as_uint(v[s][j]) & 0x7FFFFFFFU);
  }
  largest = __reduce_max_sync(~0U, largest);
  // A power of two, so that the largest is from 1024 to 2047. Not finite: as it is, which makes NaN or
  // infinity.
  const int exponent =
      largest >= 0x7F800000U ? 0 : min(max(static_cast<int>(largest >> 23), 30), 250) - 127 - 10;
  const float inverse = __int_as_float((127 - exponent) << 23);
  if (lane == 0 && count > 0) {
    work.units[i * kTokens + token] = __int_as_float((127 + exponent) << 23) * p.map.slope;
  }
#pragma unroll
  for (int s = 0; s < kMostSpans; ++s) {
    if (s >= count) break;
    // Activations 4 * (lane % 16) + j of a piece: of tile lane % 16 / 4, pairs 2 a + b with
    // a = 2 * (lane % 2) + j / 2 and b = lane / 2 % 2. Pairs 0 ... 3 are in the first half of a piece.
    unsigned char* const half =
        work.activations +
        (static_cast<int64_t>(2 * (begin + s) + lane / 16) * 2 + (lane & 1)) * (kTokens * 64);
    auto* const to = reinterpret_cast<__half2*>(half + (token * 4 + lane % 16 / 4) * 16) + (lane >> 1 & 1);
    to[0] = __floats2half2_rn(v[s][0] * inverse, v[s][1] * inverse);
    to[2] = __floats2half2_rn(v[s][2] * inverse, v[s][3] * inverse);
  }
}

// A warp for each band of each token.
template <int kGroups>
__global__ void __launch_bounds__(kThreads)
    add_panels(const __grid_constant__ TrellisProduct p, const __grid_constant__ TrellisDeal deal,
               const __grid_constant__ TrellisPanelWork work, int bands) {
  constexpr int kTokens = 8 * kGroups;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int band = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  const int token = static_cast<int>(blockIdx.y);
  BandScales scales;
  scales.ask(p, min(band, bands - 1));
  wait_for_previous();
  if (band >= bands) return;
  const int longer = deal.extra * (deal.bands + 1);
  const int team = band < longer ? band / (deal.bands + 1) : deal.extra + (band - longer) / deal.bands;
  const int row = 2 * (band - deal.first_band(team)) + lane / 16;  // of the team's
  const int own_rows = 2 * deal.bands_of(team);
  float v[4] = {};
  for (int rank = 0; rank < deal.blocks; ++rank) {
    const int columns = 2 * deal.spans_of(rank);
    if (columns == 0) continue;
    const TrellisRuns runs{own_rows * columns, panel_warps(kGroups)};
    const int met = runs.warp_of((row + 1) * columns - 1) - runs.warp_of(row * columns) + 1;
    const int64_t slot = (static_cast<int64_t>(2 * band + lane / 16) * deal.blocks + rank) * deal.parts;
    const float* from = work.parts + (slot * kTokens + token) * 64 + lane % 16 * 4;
    for (int part = 0; part < met; ++part, from += kTokens * 64) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      v[0] += four.x;
      v[1] += four.y;
      v[2] += four.z;
      v[3] += four.w;
    }
  }
  finish_rows(p, v, scales, band, token);
}

template <int kGroups>
void launch_activations(const TrellisPanelLaunch& launch) {
  const int warps = launch.deal.blocks * launch.deal.most_chunks();
  LaunchSettings settings(
      dim3(static_cast<unsigned>((warps + kThreads / 32 - 1) / (kThreads / 32)), 8U * kGroups),
      dim3(kThreads), launch.stream, false, 1);
  check_cuda(
      cudaLaunchKernelEx(&settings.config, make_panels<kGroups>, launch.product, launch.deal, launch.work),
      "matmul_cuda: launch of make_panels");
}

template <int kGroups>
void launch_sums(const TrellisPanelLaunch& launch) {
  const int bands = launch.deal.teams * launch.deal.bands + launch.deal.extra;
  LaunchSettings settings(dim3(static_cast<unsigned>((bands + kThreads / 32 - 1) / (kThreads / 32)),
                               static_cast<unsigned>(launch.product.m)),
                          dim3(kThreads), launch.stream, true, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, add_panels<kGroups>, launch.product, launch.deal,
                                launch.work, bands),
             "matmul_cuda: launch of add_panels");
}

}  // namespace

void launch_panel_activations(const TrellisPanelLaunch& launch) {
  launch.product.m <= 8 ? launch_activations<1>(launch) : launch_activations<2>(launch);
}

void launch_panel_sums(const TrellisPanelLaunch& launch) {
  launch.product.m <= 8 ? launch_sums<1>(launch) : launch_sums<2>(launch);
}

}  // namespace quantloom::cuda
