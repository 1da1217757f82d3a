// Asynchronous copies of codes and activations into the ring of stages of a tile loop.
#pragma once

#include "common/shared_memory.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/token_order.hpp"

namespace quantloom::cuda {

// A place in the sequence of units.
struct TileCursor {
  int row_group;
  int token_tile;
  int block;

  __device__ __forceinline__ TileCursor(const TilePlan& plan, int64_t unit) {
    const int64_t tile = unit / plan.column_blocks;
    block = static_cast<int>(unit % plan.column_blocks);
    row_group = static_cast<int>(tile / plan.token_tiles);
    token_tile = static_cast<int>(tile % plan.token_tiles);
  }
  __device__ __forceinline__ void advance(const TilePlan& plan) {
    if (++block == plan.column_blocks) end_tile(plan);
  }
  // To the first unit of the next tile.
  __device__ __forceinline__ void end_tile(const TilePlan& plan) {
    block = 0;
    if (++token_tile < plan.token_tiles) return;
    token_tile = 0;
    ++row_group;
  }
};

__device__ __forceinline__ void copy_piece(uint32_t shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "l"(policy)
               : "memory");
}
__device__ __forceinline__ void copy_piece(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}
// Codes that are read once leave the L2 cache first; those that other tiles of tokens read too, do not.
__device__ __forceinline__ uint64_t codes_policy(bool read_once) {
  uint64_t policy;
  if (read_once) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}
__device__ __forceinline__ uint4 load_shared(uint32_t shared) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(shared)
               : "memory");
  return value;
}

// The copies of one warp into the ring.
template <class Ring>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const ProductArguments& p, const TileWork& work, uint32_t ring)
      : p_(p), work_(work), ring_(ring), policy_(codes_policy(work.plan.token_tiles == 1)) {}

  __device__ __forceinline__ void load_codes(const TileCursor& at, int stage) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row_block = at.row_group * TilePlan::kWarps + warp;
    if (row_block >= p_.w.row_blocks) return;
    const uint4* from = p_.w.codes +
                        (static_cast<int64_t>(row_block) * p_.w.column_blocks + at.block) * (kPieces * 32) +
                        lane;
    const uint32_t to =
        ring_ + stage * Ring::kStageBytes + Ring::kTokenBytes + warp * Ring::kWarpBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) copy_piece(to + i * 512, from + i * 32, policy_);
  }

  __device__ __forceinline__ void load_tokens(const TileCursor& at, int stage) const {
    const uint4* from = work_.tokens +
                        (static_cast<int64_t>(at.block) * work_.plan.padded_tokens() +
                         static_cast<int64_t>(at.token_tile) * work_.plan.tokens) *
                            fragments::kTokenPieces +
                        threadIdx.x;
    const uint32_t to = ring_ + stage * Ring::kStageBytes + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < Ring::kTokenBytes / (16 * kTileThreads); ++i) {
      copy_piece(to + i * 16 * kTileThreads, from + i * kTileThreads);
    }
  }

 private:
  static constexpr int kPieces = Ring::kWarpBytes / 512;  // of 16 bytes for each lane

  const ProductArguments& p_;
  const TileWork& work_;
  uint32_t ring_;
  uint64_t policy_;
};

}  // namespace quantloom::cuda
