// What both tile loops share: activations in token order, and what becomes of the sums of a tile.
#pragma once

#include "common/device.hpp"
#include "common/half_pairs.cuh"
#include "kernels/product_arguments.cuh"
#include "kernels/tile_plan.hpp"

namespace quantloom::cuda {

using fragments::TilePlan;

constexpr int kTileThreads = 32 * TilePlan::kWarps;

// Whether grids of a decoder may have a plane of zero points: the kernels then come in two variants.
template <class Decoder>
constexpr bool kHasZeros = Decoder::kCenter != 0.0F;

// Kernels may begin before the previous one has ended: griddepcontrol.
inline bool overlaps(const DeviceFacts& device) {
  return device.code >= 90;
}

inline int64_t aligned_bytes(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// A tile loop's place in its workspace.
struct TileWork {
  TilePlan plan;
  uint4* tokens = nullptr;     // activations in token order: [column_blocks][padded_tokens][8]
  float4* partials = nullptr;  // [slots][warp][unit][8 tokens][lane]
};

TilePlan tile_plan_of(const FragmentMatrix& w, int m, int splits);
TileWork tile_work(const ProductLaunch& launch, void* workspace);
// Activations into token order; the first kernel of a product.
void launch_arrange(const ProductLaunch& launch, const TileWork& work);
// Adds the parts of tiles that several blocks of threads have worked on; the last kernel of a product.
void launch_add_parts(const ProductLaunch& launch, const TileWork& work);
// y = bias, or 0: the product of a matrix without columns.
void launch_bias_alone(const ProductLaunch& launch);

// The words of unit `unit`, from a lane's pieces of a block.
template <int kBits>
__device__ __forceinline__ void words_of_unit(const uint4 (&pieces)[kBits], int unit,
                                              uint32_t (&words)[kBits]) {
#pragma unroll
  for (int i = 0; i < kBits; ++i) {
    const int at = unit * kBits + i;
    const uint4& piece = pieces[at / 4];
    words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
  }
}

// Where a lane's sums of unit `unit` and tokens 8 * tile... lie in a slot.
__device__ __forceinline__ int64_t partial_place(int64_t slot, int warp, int unit, int tile, int tiles,
                                                 int lane) {
  return (((slot * TilePlan::kWarps + warp) * fragments::kUnits + unit) * tiles + tile) * 32 + lane;
}

// Stores sums of the tensor core: rows row and row + 8, tokens token and token + 1.
template <class T>
__device__ __forceinline__ void store_sums(const ProductArguments& p, int64_t row, int token,
                                           const float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = row + 8 * i;
    if (at >= p.w.n) continue;
    const float bias = p.bias == nullptr ? 0.0F : HalfPair<T>::to_float(static_cast<const T*>(p.bias)[at]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (token + c >= p.m) continue;
      static_cast<T*>(p.y)[static_cast<int64_t>(token + c) * p.y_stride + at] =
          HalfPair<T>::from_float(sum[2 * i + c] + bias);
    }
  }
}

// Stores the sums of a warp's part of a tile, to y if all columns are in them, else to its slot.
template <class T, int kTiles>
__device__ __forceinline__ void finish_tile(const ProductArguments& p, const TileWork& work, int64_t part,
                                            int64_t tile, bool complete, int warp, int lane,
                                            const float (&sums)[fragments::kUnits][kTiles][4]) {
  const int row_block = static_cast<int>(tile / work.plan.token_tiles) * TilePlan::kWarps + warp;
  if (row_block >= p.w.row_blocks) return;
  if (complete) {
    const int64_t row = static_cast<int64_t>(row_block) * fragments::kBlockRows + lane / 4;
    const int token = static_cast<int>(tile % work.plan.token_tiles) * (8 * kTiles) + lane % 4 * 2;
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) store_sums<T>(p, row + 16 * unit, token + 8 * t, sums[unit][t]);
    }
    return;
  }
  const int64_t slot = work.plan.slot(part, tile);
#pragma unroll
  for (int unit = 0; unit < fragments::kUnits; ++unit) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float(&sum)[4] = sums[unit][t];
      work.partials[partial_place(slot, warp, unit, t, kTiles, lane)] =
          make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
  }
}

}  // namespace quantloom::cuda
