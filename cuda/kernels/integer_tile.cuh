// The tiles of integer products (integer_product.cuh): their sizes, where they lie, and what fetches them.
#pragma once

#include "activations/integer_order.hpp"
#include "common/bulk_copies.cuh"
#include "common/cluster.cuh"
#include "kernels/integer_product.hpp"
#include "kernels/tile_pipeline.cuh"

namespace quantloom::cuda {

inline constexpr int kTileRows = 2 * integers::kSlabRows;
inline constexpr int kIntegerThreads = 384;
inline constexpr int kWarpgroupThreads = 128;

// Of kRows, kParts and kTiles two are 1.
template <int kTokens_, int kRows_, int kParts_, int kTiles_, bool kOutliers_>
struct IntegerTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kRows = kRows_;
  static constexpr int kParts = kParts_;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kOutliers = kOutliers_;
  static constexpr int kCluster = kRows * kParts * kTiles;
  // Blocks that send to each other what they fetch.
  static constexpr int kSharers = kRows * kTiles;
  // Tokens whose sums a block finishes: all of a tile, or a share of them. Some blocks may have fewer or
  // none.
  static constexpr int kOwnTokens = kParts == 1             ? kTokens
                                    : kTokens / kParts <= 8 ? 8
                                                            : (kTokens / kParts + 15) / 16 * 16;

  static constexpr int kWeightBytes = 2 * integers::kSlabBytes;
  static constexpr int kTokenBytes = kTokens * integers::kBlockBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // With many parts, two blocks share a processor, as clusters leave some processors over.
  static constexpr int kBlocks = kTokens == 16 || (kTokens == 64 && kParts >= 4) ? 2 : 1;
  // A tile is finished while the products of the next one run.
  static constexpr bool kDeferred = kTokens == 128 && kParts == 1;
  // The last tiles may be cut into two of half the tokens.
  static constexpr bool kHalves = kTokens == 256;
  // Registers move from the warpgroup that fetches to those that multiply.
  static constexpr bool kMovesRegisters = kTokens == 256 || kDeferred;
  // What registers are allotted for: others leave some, so that blocks of the kernel before this one may
  // still run beside it.
  static constexpr int kMostThreads = kTokens == 128 && !kMovesRegisters ? 576 : kIntegerThreads;
  static constexpr int kFewRegisters = kTokens == 256 ? 40 : 56;
  static constexpr int kManyRegisters = (504 - kFewRegisters) / 2;
  static constexpr int kStages = kTokens == 256 || (kTokens == 128 && kParts > 1) ? 4
                                 : kTokens == 64                                  ? (kBlocks == 2 ? 3 : 6)
                                 : kTokens == 128                                 ? 6
                                                                                  : 5;
  // Sums of the own tokens in int32, from all parts.
  static constexpr int kPartBytes = kOwnTokens * kTileRows * 4;
  static constexpr int kExchangeBytes = kParts > 1 ? kParts* kPartBytes : 0;
  // Rounded sums of a warpgroup, [tokens][64 outputs].
  static constexpr int kChunk = kOwnTokens < 64 ? kOwnTokens : 64;
  static constexpr int kResultBytes = kChunk * integers::kSlabRows * 2;
  // Scales of the tokens, then pairs of a zero point and a sum.
  static constexpr int kTermBytes = 12 * kOwnTokens;

  static constexpr int kExchange = kStages * kStageBytes;
  static constexpr int kResults = kExchange + kExchangeBytes;
  static constexpr int kTerms = kResults + 2 * kResultBytes;
  static constexpr int kBarriers = kTerms + 2 * kTermBytes;
  // A pair for each stage, and one for the exchange.
  static constexpr int kAllBytes = kBarriers + 16 * kStages + 16;
  static_assert((kParts == 1) + (kRows == 1) + (kTiles == 1) >= 2 && kTiles <= 2);
  static_assert(kTokens / kRows % 8 == 0 && kAllBytes <= (kBlocks == 2 ? 115712 : 232448));
};

// Half the tokens of a tile that has them all to itself, in the same memory.
template <class Tile>
struct HalfTile : Tile {
  static constexpr int kTokens = Tile::kTokens / 2;
  static constexpr int kOwnTokens = kTokens;
};

__device__ __forceinline__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}
// Arrives at the barrier of another block. Nothing was written that it would see: what products have read may
// be overwritten.
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
               : "memory");
}
// To the same place in all blocks of `mask`.
__device__ __forceinline__ void copy_to_blocks(uint32_t shared, const void* global, int bytes,
                                               uint32_t barrier, uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4, %5;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"(mask), "l"(policy)
      : "memory");
}
enum class Reuse { none, some, most };
template <Reuse kReuse>
__device__ __forceinline__ uint64_t cache_policy() {
  uint64_t policy;
  if constexpr (kReuse == Reuse::none) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else if constexpr (kReuse == Reuse::some) {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  }
  return policy;
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Where a tile lies.
struct TilePlace {
  int row_tile;   // of 128 outputs
  int64_t token;  // the first
  int tokens;     // of which some may be beyond the last
};

// Clusters walk over bands of `band` token tiles, in each over all row groups, so that what is fetched at
// the same time is shared in the L2 cache.
template <class Tile>
__device__ __forceinline__ TilePlace place_of_tile(const IntegerArguments& p, int index, int rank) {
  int half = -1;
  if constexpr (Tile::kHalves) {
    const int extra = index - p.whole_tiles;
    if (extra >= 0) {
      index = p.whole_tiles + extra / 2;
      half = extra % 2;
    }
  }
  const int begin = index / (p.band * p.row_groups) * p.band;
  const int width = min(p.band, p.token_tiles - begin);
  const int in_band = index - begin * p.row_groups;
  const int64_t token = int64_t{begin + in_band % width} * (Tile::kTokens * Tile::kTiles);
  constexpr int kHalf = Tile::kTokens / 2;
  return {in_band / width * Tile::kRows + (Tile::kRows > 1 ? rank : 0),
          token + (Tile::kTiles > 1 ? rank * Tile::kTokens : max(half, 0) * kHalf),
          half < 0 ? Tile::kTokens : kHalf};
}

// A ring's stage and the parity of its phase.
template <int kStages>
struct StageCursor {
  int stage = 0;
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The copies of a block: one thread.
template <class Tile>
class IntegerLoader {
 public:
  __device__ __forceinline__ IntegerLoader(const IntegerArguments& p, uint32_t shared, int rank)
      : p_(p),
        shared_(shared),
        barriers_(shared + Tile::kBarriers),
        rank_(Tile::kParts > 1 ? 0 : rank),
        weights_policy_(p.token_tiles == 1 ? cache_policy<Reuse::none>() : cache_policy<Reuse::some>()),
        tokens_policy_(cache_policy<Reuse::most>()) {}

  __device__ __forceinline__ void begin_tile(const TilePlace& place) {
    tokens_ = static_cast<int>(max(int64_t{0}, min(p_.m_padded - place.token, int64_t{place.tokens})));
    has_rows_ = place.row_tile < p_.row_tiles;
    place_ = place;
  }

  // Announces what comes to this block in a stage that all blocks have left.
  __device__ __forceinline__ void announce() {
    wait_for_phase(empty(at_.stage), at_.parity ^ 1);
    announce_bytes(full(at_.stage), (has_rows_ ? Tile::kWeightBytes : 0) + tokens_ * integers::kBlockBytes);
  }
  // `order`: an operand in integer order, of `blocks` blocks to a slab.
  __device__ __forceinline__ void copy_weights(const unsigned char* order, int64_t blocks, int64_t block) {
    if (!has_rows_) return;
    constexpr int kShare = kTileRows / Tile::kTiles;
    const int first = Tile::kTiles > 1 ? rank_ * kShare : 0;
    copy<kShare, Tile::kTiles>(shared_ + at_.stage * Tile::kStageBytes, order, blocks, block,
                               int64_t{place_.row_tile} * kTileRows, first, first + kShare, weights_policy_);
  }
  __device__ __forceinline__ void copy_tokens(const unsigned char* order, int64_t blocks, int64_t block) {
    constexpr int kShare = Tile::kTokens / Tile::kRows;
    const int share = Tile::kHalves ? place_.tokens / Tile::kRows : kShare;
    const int first = Tile::kRows > 1 ? rank_ * share : 0;
    copy<kShare, Tile::kRows>(shared_ + at_.stage * Tile::kStageBytes + Tile::kWeightBytes, order, blocks,
                              block, place_.token, first, min(first + share, tokens_), tokens_policy_);
  }
  __device__ __forceinline__ void advance() { at_.advance(); }
  __device__ __forceinline__ StageCursor<Tile::kStages>& at() { return at_; }

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers_ + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers_ + 16 * stage + 8; }

 private:
  // Rows [first, last) of a tile that begins at row `base`, for kBlocks blocks; slab by slab, as they lie one
  // after the other only within one.
  template <int kShare, int kBlocks>
  __device__ __forceinline__ void copy(uint32_t to, const unsigned char* order, int64_t blocks, int64_t block,
                                       int64_t base, int first, int last, uint64_t policy) {
    constexpr int kPieces = kShare <= integers::kSlabRows ? 1 : kShare / integers::kSlabRows;
    constexpr int kPieceRows = kShare / kPieces;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int row = first + piece * kPieceRows;
      const int rows = min(kPieceRows, last - row);
      if (rows <= 0) break;
      const int64_t absolute = base + row;
      const unsigned char* from = order +
                                  (absolute / integers::kSlabRows * blocks + block) * integers::kSlabBytes +
                                  absolute % integers::kSlabRows * integers::kBlockBytes;
      const uint32_t place = to + row * integers::kBlockBytes;
      if constexpr (kBlocks > 1) {
        copy_to_blocks(place, from, rows * integers::kBlockBytes, full(at_.stage),
                       static_cast<uint16_t>((1U << kBlocks) - 1U), policy);
      } else {
        copy_bulk(place, from, rows * integers::kBlockBytes, full(at_.stage), policy);
      }
    }
  }

  const IntegerArguments& p_;
  uint32_t shared_;
  uint32_t barriers_;
  int rank_;
  uint64_t weights_policy_;
  uint64_t tokens_policy_;
  StageCursor<Tile::kStages> at_;
  TilePlace place_{};
  int tokens_ = 0;
  bool has_rows_ = false;
};

}  // namespace quantloom::cuda
