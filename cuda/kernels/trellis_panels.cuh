// Products of up to 16 tokens with trellis codes, in three launches: activations are scaled, rotated and
// rounded to float16 in the order of the tensor cores; ring words pass from memory through registers, where
// they are decoded to float16; parts of the sums are added, rotated and scaled.
//
// Work is dealt as in trellis_stream.cuh, but the blocks of threads of a team leave their parts in memory, so
// that a team may have any number of them.
#pragma once

#include "common/bulk_copies.cuh"
#include "common/check.cuh"
#include "kernels/overlap.cuh"
#include "kernels/trellis_operands.cuh"
#include "kernels/trellis_panel_launch.hpp"
#include "kernels/trellis_spans.cuh"

namespace quantloom::cuda {

// The walk of one warp. kGroups: of eight tokens.
template <class Decoder, int kGroups>
class TrellisPanelWalk {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr int kPieceBytes = kGroups * 1024;  // of activations: [2][8 * kGroups tokens][4 tiles][16]

  __device__ __forceinline__ TrellisPanelWalk(const TrellisProduct& p, const uint4* codes, int columns,
                                              const Divider& by_columns, int begin, int end)
      : lane_(static_cast<int>(threadIdx.x % 32)),
        columns_(columns),
        row_(static_cast<int>(by_columns.divide(static_cast<uint32_t>(begin)))),
        column_(begin - row_ * columns),
        left_(end - begin),
        row_step_((p.column_pieces - columns) * (kBits * 32)) {
    codes_ = codes + (static_cast<int64_t>(row_) * p.column_pieces + column_) * (kBits * 32) + lane_;
    asked_ = column_;
    if (left_ > 0) ask(ahead_[0]);
  }

  // Calls leave(row, totals) for each row of pieces that the walk meets: totals[group][2 * unit + r][c] is
  // that of row 16 * unit + 8 * r + lane / 4 and token 8 * group + 2 * (lane % 4) + c.
  template <class Leave>
  __device__ __forceinline__ void run(const TrellisMap& map, const unsigned char* operands,
                                      const float* units, int chunk_pieces, Leave leave) {
    if (left_ <= 0) return;
    operands_ = operands + lane_ * 16;
    units_ = units + lane_ % 4 * 2;
    chunk_ = chunk_pieces;
    clear_totals();
    clear_sums();
    while (multiply_piece(map, ahead_[0], ahead_[1], leave) &&
           multiply_piece(map, ahead_[1], ahead_[0], leave)) {
      continue;
    }
  }

 private:
  // One piece, while the words of the next are on their way. False: it was the last.
  template <class Leave>
  __device__ __forceinline__ bool multiply_piece(const TrellisMap& map, const uint4 (&words)[kBits],
                                                 uint4 (&next)[kBits], Leave leave) {
    if (left_ > 1) ask(next);
    const unsigned char* const at = operands_ + column_ * kPieceBytes;
    multiply_half<0>(map, words, at);
    multiply_half<1>(map, words, at + kPieceBytes / 2);
    --left_;
    ++column_;
    const bool row_ends = column_ == columns_;
    if (row_ends || left_ == 0 || (column_ & (chunk_ - 1)) == 0) {
      add_scaled(units_ + (column_ - 1) / chunk_ * (8 * kGroups));
      clear_sums();
      if (row_ends || left_ == 0) {
        leave(row_, totals_);
        if (left_ == 0) return false;
        clear_totals();
        ++row_;
        column_ = 0;
      }
    }
    return true;
  }

  __device__ __forceinline__ void ask(uint4 (&to)[kBits]) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) to[i] = __ldcs(codes_ + i * 32);
    codes_ += kBits * 32;
    if (++asked_ == columns_) {
      codes_ += row_step_;
      asked_ = 0;
    }
  }

  // Positions 16 * kHalf ... 16 * kHalf + 15 of the lane, of all units.
  template <int kHalf>
  __device__ __forceinline__ void multiply_half(const TrellisMap& map, const uint4 (&pieces)[kBits],
                                                const unsigned char* at) {
    uint4 operand[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) operand[g] = *reinterpret_cast<const uint4*>(at + g * 512);
    multiply_unit<kHalf, 0>(map, pieces, operand);
    multiply_unit<kHalf, 1>(map, pieces, operand);
    multiply_unit<kHalf, 2>(map, pieces, operand);
    multiply_unit<kHalf, 3>(map, pieces, operand);
  }

  template <int kHalf, int kUnit>
  __device__ __forceinline__ void multiply_unit(const TrellisMap& map, const uint4 (&pieces)[kBits],
                                                const uint4 (&operand)[kGroups]) {
    uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int at = kUnit * kBits + i;
      const uint4& piece = pieces[at / 4];
      words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
    }
    const typename Decoder::Windows windows(words);
    constexpr int kFirst = 8 * kHalf;
    const uint32_t a[4] = {
        Decoder::template word<kFirst>(windows, map), Decoder::template word<kFirst + 2>(windows, map),
        Decoder::template word<kFirst + 1>(windows, map), Decoder::template word<kFirst + 3>(windows, map)};
    const uint32_t b[4] = {
        Decoder::template word<kFirst + 4>(windows, map), Decoder::template word<kFirst + 6>(windows, map),
        Decoder::template word<kFirst + 5>(windows, map), Decoder::template word<kFirst + 7>(windows, map)};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      multiply_accumulate<__half>(sums_[g][kUnit], a, operand[g].x, operand[g].y);
      multiply_accumulate<__half>(sums_[g][kUnit], b, operand[g].z, operand[g].w);
    }
  }

  __device__ __forceinline__ void add_scaled(const float* units) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 unit = *reinterpret_cast<const float2*>(units + 8 * g);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals_[g][2 * i][0] = fmaf(unit.x, sums_[g][i][0], totals_[g][2 * i][0]);
        totals_[g][2 * i][1] = fmaf(unit.y, sums_[g][i][1], totals_[g][2 * i][1]);
        totals_[g][2 * i + 1][0] = fmaf(unit.x, sums_[g][i][2], totals_[g][2 * i + 1][0]);
        totals_[g][2 * i + 1][1] = fmaf(unit.y, sums_[g][i][3], totals_[g][2 * i + 1][1]);
      }
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sums_[g][i / 4][i % 4] = 0.0F;
    }
  }
  __device__ __forceinline__ void clear_totals() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 16; ++i) totals_[g][i / 2][i % 2] = 0.0F;
    }
  }

  int lane_;
  int columns_;
  int row_;
  int column_;
  int left_;   // pieces of the walk
  int asked_;  // the column of the next piece to ask for
  int row_step_;
  int chunk_;  // pieces that share a scale
  const unsigned char* operands_;
  const float* units_;
  const uint4* codes_;
  uint4 ahead_[2][kBits];
  float sums_[kGroups][4][4];
  float totals_[kGroups][8][2];
};

// Grid: [deal.teams * deal.blocks].
template <class Decoder, int kGroups>
__global__ void __launch_bounds__(32 * panel_warps(kGroups), 1)
    multiply_panels(const __grid_constant__ TrellisProduct p, const __grid_constant__ TrellisDeal deal,
                    const __grid_constant__ TrellisPanelWork work) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWarps = panel_warps(kGroups);
  using Walk = TrellisPanelWalk<Decoder, kGroups>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t arrival;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int team = static_cast<int>(deal.by_blocks.divide(blockIdx.x));
  const int rank = static_cast<int>(blockIdx.x) - team * deal.blocks;
  const int first_band = deal.first_band(team);
  const int first_span = deal.first_span(rank);
  const int spans = deal.spans_of(rank);
  const int columns = 2 * spans;
  const TrellisRuns runs{2 * deal.bands_of(team) * columns, kWarps};

  let_next_begin();
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&arrival));
  if (threadIdx.x == 0) {
    start_barrier(barrier, 1);
    publish_barriers();
  }
  Walk walk(p,
            p.codes + (static_cast<int64_t>(2 * first_band) * p.column_pieces + 2 * first_span) *
                          (Decoder::kBits * 32),
            columns, deal.columns_of(rank), runs.begin(warp), runs.begin(warp + 1));
  __syncthreads();
  wait_for_previous();
  // Chunks are counted from the beginning of each block's columns.
  const int unit_bytes = (deal.most_chunks() * 8 * kGroups * 4 + 15) / 16 * 16;
  if (threadIdx.x == 0) {
    const int bytes = columns * Walk::kPieceBytes;
    const int units = (spans + deal.chunk - 1) / deal.chunk * (8 * kGroups) * 4;
    announce_bytes(barrier, bytes + units);
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    copy_bulk(to, work.units + static_cast<int64_t>(rank) * deal.most_chunks() * (8 * kGroups), units,
              barrier, policy);
    const unsigned char* const from =
        work.activations + static_cast<int64_t>(2 * first_span) * Walk::kPieceBytes;
    constexpr int kAtOnce = 16384;
    for (int at = 0; at < bytes; at += kAtOnce) {
      copy_bulk(to + unit_bytes + at, from + at, min(kAtOnce, bytes - at), barrier, policy);
    }
  }
  wait_for_phase(barrier, 0);
  walk.run(p.map, memory + unit_bytes, reinterpret_cast<const float*>(memory), 2 * deal.chunk,
           [&](int row, const float(&totals)[kGroups][8][2]) {
             const int part = warp - runs.warp_of(row * columns);
             const int64_t slot =
                 (static_cast<int64_t>(2 * first_band + row) * deal.blocks + rank) * deal.parts + part;
#pragma unroll
             for (int g = 0; g < kGroups; ++g) {
#pragma unroll
               for (int c = 0; c < 2; ++c) {
                 const int token = 8 * g + lane % 4 * 2 + c;
                 if (token >= p.m) continue;
                 float* const to = work.parts + (slot * (8 * kGroups) + token) * 64 + lane / 4 * 8;
                 const float(&t)[8][2] = totals[g];
                 *reinterpret_cast<float4*>(to) = make_float4(t[0][c], t[1][c], t[2][c], t[3][c]);
                 *reinterpret_cast<float4*>(to + 4) = make_float4(t[4][c], t[5][c], t[6][c], t[7][c]);
               }
             }
           });
#else
  __trap();  // the plan keeps launches away
#endif
}

template <class Decoder, int kGroups>
void launch_panels(const TrellisPanelLaunch& launch) {
  const int shared = panel_memory(launch.deal, kGroups);
  LaunchSettings settings(dim3(static_cast<unsigned>(launch.deal.teams * launch.deal.blocks)),
                          dim3(32 * panel_warps(kGroups)), launch.stream, true, 1);
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  const auto kernel = multiply_panels<Decoder, kGroups>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_panels");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, launch.product, launch.deal, launch.work),
             "matmul_cuda: launch of multiply_panels");
}

template <int kBits, TrellisHash kHash>
void launch_trellis_panels(const TrellisPanelLaunch& launch) {
  using Decoder = TrellisExact<kBits, kHash>;
  launch.product.m <= 8 ? launch_panels<Decoder, 1>(launch) : launch_panels<Decoder, 2>(launch);
}

}  // namespace quantloom::cuda
