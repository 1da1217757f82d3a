// The product loop for many tokens, on any GPU since sm_80.
//
// A block of four warps works on a tile of 256 rows x 32 or 64 tokens. Codes and activations, 64 columns at
// a time, come through a ring of stages in shared memory, filled by asynchronous copies; the ring runs on
// from tile to tile. Each warp decodes the fragments of its own 64 rows, so that every weight is decoded
// once for all tokens of the tile, and multiplies them on the tensor cores.
#pragma once

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "kernels/group_scales.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_pipeline.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/token_order.hpp"

namespace quantloom::cuda {

// Sizes of the ring. A stage holds activations [tokens][128 bytes], then codes [warp][bits][lane][16 bytes].
template <class Decoder, int kTokens>
struct TileRing {
  static constexpr int kTokenBytes = kTokens * fragments::kTokenBytes;
  static constexpr int kWarpBytes = Decoder::kBits * 512;
  static constexpr int kStageBytes = kTokenBytes + TilePlan::kWarps * kWarpBytes;
  // With the decoder's table, a block of threads gets by with the 99 KB that every GPU has.
  static constexpr int kRoom = (98304 - Decoder::kSharedBytes) / kStageBytes;
  static constexpr int kMost = Decoder::kBits <= 6 ? 4 : 3;
  static constexpr int kStages = kRoom < kMost ? kRoom : kMost;
  static constexpr int kBytes = kStages * kStageBytes;
  static_assert(kStages >= 2);
};

// Two B fragments of 8 tokens each.
__device__ __forceinline__ void load_matrices(uint32_t shared, uint32_t (&b)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared)
               : "memory");
}

// The part of a tile that one warp adds up: 64 rows.
template <class Decoder, class T, int kTokens, bool kZeros>
class TileProduct {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr int kTiles = kTokens / 8;
  using Ring = TileRing<Decoder, kTokens>;

  __device__ __forceinline__ TileProduct(const ProductArguments& p, const Decoder& decoder)
      : p_(p), decoder_(decoder), lane_(static_cast<int>(threadIdx.x) % 32) {
    // Row lane % 8 of matrix lane / 8: tokens 0-7 or 8-15, the lower or the upper 8 columns of a step.
    const int token = lane_ / 16 * 8 + lane_ % 8;
    token_place_ = token * fragments::kTokenBytes + fragments::place_of_piece(token, lane_ / 8 % 2) * 16;
  }

  __device__ __forceinline__ void begin(int row_block, int begin, int end) {
    scales_.begin(p_.w, row_block, begin, end, lane_);
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[unit][tile][c] = 0.0F;
      }
    }
  }

  // `stage`: where a stage lies in shared memory; `codes`: this lane's codes in it.
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t codes) {
    uint4 pieces[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) pieces[i] = load_shared(codes + i * 512);
    multiply_step<0>(stage, pieces);
    multiply_step<1>(stage, pieces);
    multiply_step<2>(stage, pieces);
    multiply_step<3>(stage, pieces);
  }

  __device__ __forceinline__ void apply_factors() {
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[unit][tile][c] *= scales_.factor(2 * unit + c / 2);
      }
    }
  }

  __device__ __forceinline__ const float (&sums() const)[fragments::kUnits][kTiles][4] {
    return sums_;
  }

 private:
  template <int kStep>
  __device__ __forceinline__ void multiply_step(uint32_t stage, const uint4 (&pieces)[kBits]) {
    uint32_t b[kTiles / 2][4];
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      // The step moves a token's piece by 2 * kStep: bits 5 and 6 of its place.
      load_matrices(stage + pair * (16 * fragments::kTokenBytes) + (token_place_ ^ (kStep << 5)), b[pair]);
    }
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      uint32_t words[kBits];
      words_of_unit<kBits>(pieces, unit, words);
      uint32_t a[4];
      decoder_.template fragment<T, kStep>(words, a);
      scales_.apply(unit, a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(sums_[unit][tile], a, b[tile / 2][tile % 2 * 2],
                               b[tile / 2][tile % 2 * 2 + 1]);
      }
    }
    scales_.advance(p_.w);
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  int lane_;
  uint32_t token_place_;
  GroupScales<Decoder, T, kZeros> scales_;
  float sums_[fragments::kUnits][kTiles][4];
};

template <class Decoder, class T, int kTokens, bool kZeros>
__global__ void __launch_bounds__(kTileThreads, 2)
    multiply_tiles(const __grid_constant__ ProductArguments p, const __grid_constant__ TileWork work) {
  using Ring = TileRing<Decoder, kTokens>;
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t ring = shared_address(tile_memory);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t begin = work.plan.begin(blockIdx.x);
  const int64_t end = work.plan.begin(static_cast<int64_t>(blockIdx.x) + 1);

  let_next_begin();
  const TileLoader<Ring> loader(p, work, ring);
  TileCursor ahead(work.plan, begin);
  {
    TileCursor codes = ahead;
#pragma unroll
    for (int s = 0; s < Ring::kStages - 1; ++s) {
      if (begin + s >= end) break;
      loader.load_codes(codes, s);
      codes.advance(work.plan);
    }
  }
  Decoder decoder;
  decoder.template prepare<T>(p.w.table, p.w.table_entries, tile_memory + Ring::kBytes);
  wait_for_previous();
#pragma unroll
  for (int s = 0; s < Ring::kStages - 1; ++s) {
    if (begin + s < end) {
      loader.load_tokens(ahead, s);
      ahead.advance(work.plan);
    }
    close_copies();
  }

  TileProduct<Decoder, T, kTokens, kZeros> product(p, decoder);
  int stage = 0;
  for (int64_t unit = begin; unit < end;) {
    const TileCursor at(work.plan, unit);
    const int stop =
        static_cast<int>(min(static_cast<int64_t>(work.plan.column_blocks), at.block + end - unit));
    const bool has_rows = at.row_group * TilePlan::kWarps + warp < p.w.row_blocks;
    if (has_rows) product.begin(at.row_group * TilePlan::kWarps + warp, at.block, stop);
    for (int block = at.block; block < stop; ++block, ++unit) {
      wait_for_copies<Ring::kStages - 2>();
      __syncthreads();
      // All warps have left the stage before this one: it is filled anew.
      const int behind = stage == 0 ? Ring::kStages - 1 : stage - 1;
      if (unit + Ring::kStages - 1 < end) {
        loader.load_codes(ahead, behind);
        loader.load_tokens(ahead, behind);
        ahead.advance(work.plan);
      }
      close_copies();
      const uint32_t place = ring + stage * Ring::kStageBytes;
      if (has_rows) {
        product.multiply(place, place + Ring::kTokenBytes + warp * Ring::kWarpBytes + lane * 16);
      }
      stage = stage + 1 == Ring::kStages ? 0 : stage + 1;
    }
    if (!has_rows) continue;
    product.apply_factors();
    const int64_t tile = static_cast<int64_t>(at.row_group) * work.plan.token_tiles + at.token_tile;
    const bool complete = at.block == 0 && stop == work.plan.column_blocks;
    finish_tile<T, kTokens / 8>(p, work, blockIdx.x, tile, complete, warp, lane, product.sums());
  }
}

template <class Decoder, class T, int kTokens>
void launch_multiply_tiles(const ProductLaunch& launch, const TileWork& work) {
  constexpr int kShared = TileRing<Decoder, kTokens>::kBytes + Decoder::kSharedBytes;
  auto* kernel = multiply_tiles<Decoder, T, kTokens, false>;
  if constexpr (kHasZeros<Decoder>) {
    if (launch.arguments.w.zeros != nullptr) kernel = multiply_tiles<Decoder, T, kTokens, true>;
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
             "matmul_cuda: shared memory of multiply_tiles");
  LaunchSettings settings(dim3(static_cast<unsigned>(work.plan.grid)), dim3(kTileThreads), launch.stream,
                          overlaps(current_device()), 1);
  settings.config.dynamicSmemBytes = kShared;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, launch.arguments, work),
             "matmul_cuda: launch of multiply_tiles");
}

template <class Decoder>
void launch_tiles(const ProductLaunch& launch, void* workspace) {
  if (launch.arguments.m == 0 || launch.arguments.w.n == 0) return;
  if (launch.arguments.w.column_blocks == 0) return launch_bias_alone(launch);
  const TileWork work = tile_work(launch, workspace);
  launch_arrange(launch, work);
  const bool small = work.plan.tokens == 32;
  if (launch.dtype == DType::f16) {
    small ? launch_multiply_tiles<Decoder, __half, 32>(launch, work)
          : launch_multiply_tiles<Decoder, __half, 64>(launch, work);
  } else {
    small ? launch_multiply_tiles<Decoder, __nv_bfloat16, 32>(launch, work)
          : launch_multiply_tiles<Decoder, __nv_bfloat16, 64>(launch, work);
  }
  if (work.plan.has_partials()) launch_add_parts(launch, work);
}

}  // namespace quantloom::cuda
