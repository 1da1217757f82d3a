// Products of integers on sm_90a: y = x W^T for codes of one byte, both in integer order
// (src/activations/integer_order.hpp).
//
// A tile of 128 outputs x kTokens tokens belongs to a block of threads: one warp fetches blocks of 128
// columns by bulk copies into a ring of stages, two warpgroups multiply them, 64 outputs each (wgmma, int32
// sums, which are exact). Blocks of a cluster share what they fetch: kRows of them have the same tokens,
// kColumns the same outputs; each fetches its share of an operand and sends it to all that need it. Or kParts
// blocks share a tile: each takes a part of the columns, and their sums meet in shared memory.
//
// Outliers are multiplied after the integers, as float16 onto the scaled float32 sums, in the same order
// whatever the sizes of tiles: a token's result does not depend on the others.
#pragma once

#include "activations/integer_order.hpp"
#include "common/bulk_copies.cuh"
#include "common/check.cuh"
#include "common/cluster.cuh"
#include "common/shared_memory.cuh"
#include "common/shared_products.cuh"
#include "kernels/integer_product.hpp"
#include "kernels/overlap.cuh"
#include "kernels/tile_pipeline.cuh"

namespace quantloom::cuda {

inline constexpr int kTileRows = 2 * integers::kSlabRows;
inline constexpr int kIntegerThreads = 384;
inline constexpr int kWarpgroupThreads = 128;

// kParts > 1: parts of the columns; then kRows = kColumns = 1.
template <int kTokens_, int kRows_, int kColumns_, int kParts_, bool kOutliers_>
struct IntegerTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kParts = kParts_;
  static constexpr bool kOutliers = kOutliers_;
  static constexpr int kCluster = kRows * kColumns * kParts;
  // Tokens whose sums a block finishes: all of a tile, or a share of them.
  static constexpr int kOwnTokens = kTokens / kParts < 8 ? 8 : kTokens / kParts;

  static constexpr int kWeightBytes = 2 * integers::kSlabBytes;
  static constexpr int kTokenBytes = kTokens * integers::kBlockBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStages = kTokens >= 256 || (kTokens == 128 && kParts > 1) ? 4 : kTokens == 64 ? 6 : 5;
  // Sums of all tokens in int32, as each lane has them.
  static constexpr int kExchangeBytes = kParts > 1 ? kTokens* kTileRows * 4 : 0;
  // Rounded sums of a warpgroup, [tokens][64 outputs].
  static constexpr int kChunk = kOwnTokens < 64 ? kOwnTokens : 64;
  static constexpr int kResultBytes = kChunk * integers::kSlabRows * 2;
  static constexpr int kTermBytes = kOwnTokens * static_cast<int>(sizeof(integers::TokenTerms));

  static constexpr int kExchange = kStages * kStageBytes;
  static constexpr int kResults = kExchange + kExchangeBytes;
  static constexpr int kTerms = kResults + 2 * kResultBytes;
  static constexpr int kBarriers = kTerms + 2 * kTermBytes;
  static constexpr int kAllBytes = kBarriers + 16 * kStages;
  static_assert(kParts == 1 || (kRows == 1 && kColumns == 1));
  static_assert(kTokens / kRows % 8 == 0 && kAllBytes <= 232448);
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
// Arrives at the barrier of another block.
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
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
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
// Two or four 8 x 8 matrices of 16 bits, transposed: lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t row, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(first),
               "r"(second)
               : "memory");
}

// Where a tile lies.
struct TilePlace {
  int row_tile;    // of 128 outputs
  int token_tile;  // of kTokens
};

// Clusters walk over bands of `band` token groups, in each over all row groups, so that what is fetched at
// the same time is shared in the L2 cache.
template <class Tile>
__device__ __forceinline__ TilePlace place_of_tile(const IntegerArguments& p, int index, int rank) {
  const int per_band = p.band * p.row_groups;
  const int band = index / per_band;
  const int width = min(p.band, p.token_groups - band * p.band);
  const int in_band = index - band * per_band;
  const int row_group = in_band / width;
  const int token_group = band * p.band + in_band % width;
  if constexpr (Tile::kParts > 1) return {row_group, token_group};
  return {row_group * Tile::kRows + rank % Tile::kRows, token_group * Tile::kColumns + rank / Tile::kRows};
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
        row_rank_(Tile::kParts > 1 ? 0 : rank % Tile::kRows),
        column_rank_(Tile::kParts > 1 ? 0 : rank / Tile::kRows),
        weights_policy_(p.token_groups == 1 ? cache_policy<Reuse::none>() : cache_policy<Reuse::some>()),
        tokens_policy_(cache_policy<Reuse::most>()) {}

  __device__ __forceinline__ void begin_tile(const TilePlace& place) {
    const int64_t rows = p_.m_padded - static_cast<int64_t>(place.token_tile) * Tile::kTokens;
    tokens_ = static_cast<int>(max(int64_t{0}, min(rows, int64_t{Tile::kTokens})));
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
    const uint32_t to = shared_ + at_.stage * Tile::kStageBytes;
    constexpr int kShare = kTileRows / Tile::kColumns;
    const int first = column_rank_ * kShare;
    copy<kShare, Tile::kColumns>(to, order, blocks, block, int64_t{place_.row_tile} * kTileRows, first,
                                 first + kShare, weights_mask(), weights_policy_);
  }
  __device__ __forceinline__ void copy_tokens(const unsigned char* order, int64_t blocks, int64_t block) {
    const uint32_t to = shared_ + at_.stage * Tile::kStageBytes + Tile::kWeightBytes;
    constexpr int kShare = Tile::kTokens / Tile::kRows;
    const int first = row_rank_ * kShare;
    copy<kShare, Tile::kRows>(to, order, blocks, block, int64_t{place_.token_tile} * Tile::kTokens, first,
                              min(first + kShare, tokens_), tokens_mask(), tokens_policy_);
  }
  __device__ __forceinline__ void advance() { at_.advance(); }
  __device__ __forceinline__ StageCursor<Tile::kStages>& at() { return at_; }

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers_ + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers_ + 16 * stage + 8; }

 private:
  // Blocks with the same outputs, and with the same tokens.
  __device__ __forceinline__ uint16_t weights_mask() const {
    uint32_t mask = 0;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) mask |= 1U << (c * Tile::kRows + row_rank_);
    return static_cast<uint16_t>(mask);
  }
  __device__ __forceinline__ uint16_t tokens_mask() const {
    return static_cast<uint16_t>(((1U << Tile::kRows) - 1U) << (column_rank_ * Tile::kRows));
  }
  // Rows [first, last) of a tile that begins at row `base`; slab by slab, as they lie one after the other
  // only within one.
  template <int kShare, int kBlocks>
  __device__ __forceinline__ void copy(uint32_t to, const unsigned char* order, int64_t blocks, int64_t block,
                                       int64_t base, int first, int last, uint16_t mask, uint64_t policy) {
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
        copy_to_blocks(place, from, rows * integers::kBlockBytes, full(at_.stage), mask, policy);
      } else {
        copy_bulk(place, from, rows * integers::kBlockBytes, full(at_.stage), policy);
      }
    }
  }

  const IntegerArguments& p_;
  uint32_t shared_;
  uint32_t barriers_;
  int row_rank_;
  int column_rank_;
  uint64_t weights_policy_;
  uint64_t tokens_policy_;
  StageCursor<Tile::kStages> at_;
  TilePlace place_{};
  int tokens_ = 0;
  bool has_rows_ = false;
};

// Rounds sums and writes them: the part of one warpgroup.
template <class Tile>
class IntegerFinish {
 public:
  static constexpr int kTokens = Tile::kOwnTokens;

  // `row`: the first of the warpgroup's outputs; `token`: the first token.
  __device__ __forceinline__ IntegerFinish(const IntegerArguments& p, unsigned char* shared_memory,
                                           uint32_t shared, int warpgroup, int64_t row, int64_t token)
      : p_(p),
        warpgroup_(warpgroup),
        thread_(static_cast<int>(threadIdx.x) % kWarpgroupThreads),
        row_(row),
        token_(token),
        terms_(reinterpret_cast<integers::TokenTerms*>(shared_memory + Tile::kTerms +
                                                       warpgroup * Tile::kTermBytes)),
        results_(shared + Tile::kResults + warpgroup * Tile::kResultBytes),
        read_(reinterpret_cast<const uint4*>(shared_memory + Tile::kResults +
                                             warpgroup * Tile::kResultBytes)) {}

  // The terms of the tokens, to shared memory.
  __device__ __forceinline__ void fetch_terms() {
    for (int i = thread_; i < kTokens; i += kWarpgroupThreads) {
      if (token_ + i < p_.m) copy_async(terms_ + i, p_.terms + token_ + i);
    }
  }

  // sum := the scaled sums, as float32 in the same registers.
  __device__ __forceinline__ void scale(int (&sum)[kTokens / 2]) {
    wait_for_copies();
    warpgroup_barrier(warpgroup_);
    const int lane = thread_ % 32;
    const int64_t row = row_ + thread_ / 32 * 16 + lane / 4;
    RowTerms rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[i] = p_.rows[row + 8 * i];
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const integers::TokenTerms& token = terms_[8 * j + lane % 4 * 2 + c];
        const float scale = token.scale;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int value = sum[4 * j + 2 * i + c];
          if (p_.has_zeros) value -= token.zero * rows[i].sum + rows[i].zero * token.sum;
          sum[4 * j + 2 * i + c] = __float_as_int(static_cast<float>(value) * (scale * rows[i].scale));
        }
      }
    }
  }

  // Adds the bias, rounds and writes.
  __device__ __forceinline__ void write(const int (&sum)[kTokens / 2]) {
    const int lane = thread_ % 32;
    const int warp = thread_ / 32;
    float bias[2] = {0.0F, 0.0F};
    if (p_.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = row_ + warp * 16 + lane / 4 + 8 * i;
        if (row < p_.n) bias[i] = load_half(p_.bias, row);
      }
    }
    constexpr int kChunkTiles = Tile::kChunk / 8;
#pragma unroll
    for (int chunk = 0; chunk < kTokens / Tile::kChunk; ++chunk) {
      uint32_t words[2 * kChunkTiles];
#pragma unroll
      for (int j = 0; j < kChunkTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * (chunk * kChunkTiles + j) + 2 * i;
          words[2 * j + i] =
              round_pair(__int_as_float(sum[at]) + bias[i], __int_as_float(sum[at + 1]) + bias[i]);
        }
      }
      if (chunk > 0) warpgroup_barrier(warpgroup_);  // the last chunk has been read
      store_chunk(words, warp, lane);
      warpgroup_barrier(warpgroup_);
      copy_chunk(token_ + chunk * Tile::kChunk);
    }
    warpgroup_barrier(warpgroup_);
  }

 private:
  __device__ __forceinline__ uint32_t round_pair(float first, float second) const {
    return p_.bfloat16 ? bits_of(__floats2bfloat162_rn(first, second))
                       : bits_of(__floats2half2_rn(first, second));
  }
  template <class Pair>
  static __device__ __forceinline__ uint32_t bits_of(Pair pair) {
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ __forceinline__ float load_half(const void* values, int64_t i) const {
    return p_.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i])
                       : __half2float(static_cast<const __half*>(values)[i]);
  }

  // Rows of 128 bytes, whose pieces of 16 are swizzled against conflicts of banks.
  static __device__ __forceinline__ uint32_t piece_at(int token, int piece) {
    return static_cast<uint32_t>(token * 128 + ((piece ^ (token & 7)) << 4));
  }
  template <int kWords>
  __device__ __forceinline__ void store_chunk(const uint32_t (&words)[kWords], int warp, int lane) const {
    const int matrix = lane / 8;
    if constexpr (kWords == 2) {
      store_transposed(results_ + piece_at(lane % 8, 2 * warp + matrix % 2), words[0], words[1]);
    } else {
#pragma unroll
      for (int j = 0; j < kWords / 2; j += 2) {
        const uint32_t four[4] = {words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]};
        store_transposed(results_ + piece_at(8 * (j + matrix / 2) + lane % 8, 2 * warp + matrix % 2), four);
      }
    }
  }
  __device__ __forceinline__ void copy_chunk(int64_t first) const {
    const int piece = thread_ % 8;
    const int64_t column = row_ + 8 * piece;
    if (column >= p_.n) return;
#pragma unroll
    for (int token = thread_ / 8; token < Tile::kChunk; token += 16) {
      if (first + token >= p_.m) break;
      const uint4 value = read_[piece_at(token, piece) / 16];
      auto* const to = static_cast<uint16_t*>(p_.y) + (first + token) * p_.y_stride + column;
      if (p_.y_in_pieces && column + 8 <= p_.n) {
        *reinterpret_cast<uint4*>(to) = value;
        continue;
      }
      const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < p_.n) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      }
    }
  }

  const IntegerArguments& p_;
  int warpgroup_;
  int thread_;
  int64_t row_;
  int64_t token_;
  integers::TokenTerms* terms_;
  uint32_t results_;
  const uint4* read_;
};

// What one warpgroup does with the stages.
template <class Tile>
class IntegerConsumer {
 public:
  __device__ __forceinline__ IntegerConsumer(uint32_t shared, int warpgroup, int rank)
      : shared_(shared), warpgroup_(warpgroup), rank_(rank) {}

  // Sums of `blocks` blocks of columns.
  __device__ __forceinline__ void multiply(int (&sum)[Tile::kTokens / 2], int blocks) {
    int before = -1;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_for_phase(full(at_.stage), at_.parity);
      const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
      const uint64_t w = token_descriptor(stage + warpgroup_ * integers::kSlabBytes);
      const uint64_t x = token_descriptor(stage + Tile::kWeightBytes);
      open_products();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        multiply_integers<Tile::kTokens>(sum, w + 2 * step, x + 2 * step, block > 0 || step > 0 ? 1 : 0);
      }
      close_products();
      wait_for_products<1>();
      if (before >= 0) leave(before);
      before = at_.stage;
      at_.advance();
    }
    wait_for_products<0>();
#pragma unroll
    for (int& value : sum) hold(value);
    if (before >= 0) leave(before);
  }

  // Adds `blocks` blocks of 64 outliers, of the tokens from `first` on.
  __device__ __forceinline__ void add_outliers(int (&sum)[Tile::kOwnTokens / 2], int blocks, int first) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_for_phase(full(at_.stage), at_.parity);
      const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
      const uint64_t w = token_descriptor(stage + warpgroup_ * integers::kSlabBytes);
      const uint64_t x = token_descriptor(stage + Tile::kWeightBytes + first * integers::kBlockBytes);
      open_products();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        multiply_halves<Tile::kOwnTokens>(sum, w + 2 * step, x + 2 * step, 1);
      }
      close_products();
      wait_for_products<0>();
#pragma unroll
      for (int& value : sum) hold(value);
      leave(at_.stage);
      at_.advance();
    }
  }

 private:
  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared_ + Tile::kBarriers + 16 * stage;
  }
  // Tells all blocks that send to this one.
  __device__ __forceinline__ void leave(int stage) const {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const uint32_t barrier = full(stage) + 8;
    if constexpr (Tile::kRows * Tile::kColumns == 1) {
      if (thread == 0) arrive(barrier);
    } else {
      if (thread >= Tile::kRows * Tile::kColumns) return;
      if (thread % Tile::kRows == rank_ % Tile::kRows || thread / Tile::kRows == rank_ / Tile::kRows) {
        arrive_at(barrier, thread);
      }
    }
  }

  uint32_t shared_;
  int warpgroup_;
  int rank_;
  StageCursor<Tile::kStages> at_;
};

// The sums of a part, for the other blocks of the cluster: piece j of a thread holds its four of tokens 8 j
// ...
template <class Tile>
class SumExchange {
 public:
  __device__ __forceinline__ SumExchange(unsigned char* shared_memory, int warpgroup)
      : here_(reinterpret_cast<float*>(shared_memory + Tile::kExchange) +
              (warpgroup * (Tile::kTokens / 8) * kWarpgroupThreads +
               static_cast<int>(threadIdx.x) % kWarpgroupThreads) *
                  4) {}

  __device__ __forceinline__ void give(const int (&sum)[Tile::kTokens / 2]) const {
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
      *reinterpret_cast<int4*>(here_ + j * kStep) =
          make_int4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    }
  }
  // Of the tokens from `first` on.
  __device__ __forceinline__ void collect(int (&sum)[Tile::kOwnTokens / 2], int first) const {
#pragma unroll
    for (int i = 0; i < Tile::kOwnTokens / 2; ++i) sum[i] = 0;
#pragma unroll
    for (int rank = 0; rank < Tile::kParts; ++rank) {
      const float* const there = cluster_place(here_, rank);
#pragma unroll
      for (int j = 0; j < Tile::kOwnTokens / 8; ++j) {
        const int4 part = *reinterpret_cast<const int4*>(there + (first / 8 + j) * kStep);
        sum[4 * j] += part.x;
        sum[4 * j + 1] += part.y;
        sum[4 * j + 2] += part.z;
        sum[4 * j + 3] += part.w;
      }
    }
  }

 private:
  static constexpr int kStep = kWarpgroupThreads * 4;
  float* here_;
};

template <class Tile>
__global__ void __launch_bounds__(kIntegerThreads, Tile::kTokens <= 16 ? 2 : 1)
    multiply_integer_tiles(const __grid_constant__ IntegerArguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t shared = shared_address(tile_memory);
  const int rank = Tile::kCluster > 1 ? static_cast<int>(block_in_cluster()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  const int tiles = p.row_groups * p.token_groups;
  // With parts there is one tile to a cluster.
  const int begin = Tile::kParts > 1 ? static_cast<int>(int64_t{p.blocks} * rank / Tile::kParts) : 0;
  const int end =
      Tile::kParts > 1 ? static_cast<int>(int64_t{p.blocks} * (rank + 1) / Tile::kParts) : p.blocks;
  const bool is_owner = rank * Tile::kOwnTokens < Tile::kTokens || Tile::kParts == 1;
  const int outlier_blocks = Tile::kOutliers && is_owner ? p.outlier_blocks : 0;

  let_next_begin();
  IntegerLoader<Tile> loader(p, shared, rank);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      start_barrier(loader.full(stage), 1);
      start_barrier(loader.empty(stage), 2 * (Tile::kParts > 1 ? 1 : Tile::kRows + Tile::kColumns - 1));
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  }

  if (warpgroup == 2) {
    if constexpr (Tile::kTokens > 64) leave_registers<Tile::kTokens == 256 ? 40 : 56>();
    if (threadIdx.x == 2 * kWarpgroupThreads) {
      bool is_first = true;
      for (int tile = cluster; tile < tiles; tile += clusters) {
        loader.begin_tile(place_of_tile<Tile>(p, tile, rank));
        int block = begin;
        if (is_first) {
          // Weights of the first stages do not wait for the kernel before this one.
          const StageCursor<Tile::kStages> start = loader.at();
          const int ahead = min(end - begin, Tile::kStages);
          for (int i = 0; i < ahead; ++i, loader.advance()) {
            loader.announce();
            loader.copy_weights(p.weights, p.blocks, begin + i);
          }
          const StageCursor<Tile::kStages> stop = loader.at();
          loader.at() = start;
          wait_for_previous();
          for (int i = 0; i < ahead; ++i, loader.advance()) loader.copy_tokens(p.tokens, p.blocks, begin + i);
          loader.at() = stop;
          block += ahead;
          is_first = false;
        }
        for (; block < end; ++block, loader.advance()) {
          loader.announce();
          loader.copy_weights(p.weights, p.blocks, block);
          loader.copy_tokens(p.tokens, p.blocks, block);
        }
        for (int i = 0; i < outlier_blocks; ++i, loader.advance()) {
          loader.announce();
          loader.copy_weights(p.outlier_weights, p.outlier_blocks, i);
          loader.copy_tokens(p.outlier_tokens, p.outlier_blocks, i);
        }
      }
    }
  } else {
    if constexpr (Tile::kTokens > 64) take_registers<Tile::kTokens == 256 ? 232 : 224>();
    wait_for_previous();
    IntegerConsumer<Tile> consumer(shared, warpgroup, rank);
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const TilePlace place = place_of_tile<Tile>(p, tile, rank);
      const int first = Tile::kParts > 1 ? rank * Tile::kOwnTokens : 0;
      IntegerFinish<Tile> finish(p, tile_memory, shared, warpgroup,
                                 int64_t{place.row_tile} * kTileRows + warpgroup * integers::kSlabRows,
                                 int64_t{place.token_tile} * Tile::kTokens + first);
      const bool has_rows = place.row_tile < p.row_tiles;
      if (is_owner && has_rows) finish.fetch_terms();
      int sum[Tile::kTokens / 2];
      consumer.multiply(sum, end - begin);
      if constexpr (Tile::kParts > 1) {
        const SumExchange<Tile> exchange(tile_memory, warpgroup);
        if (end == begin) {
#pragma unroll
          for (int& value : sum) value = 0;
        }
        exchange.give(sum);
        cluster_arrive();
        cluster_wait();
        if (is_owner) {
          int own[Tile::kOwnTokens / 2];
          exchange.collect(own, first);
          finish.scale(own);
          if constexpr (Tile::kOutliers) consumer.add_outliers(own, outlier_blocks, first);
          finish.write(own);
        }
      } else {
        if (has_rows) finish.scale(sum);
        if constexpr (Tile::kOutliers) consumer.add_outliers(sum, outlier_blocks, 0);
        if (has_rows) finish.write(sum);
      }
    }
  }
  if constexpr (Tile::kParts > 1) {
    if (warpgroup == 2) {
      __syncwarp();
      cluster_arrive();
      cluster_wait();
    }
  }
  if constexpr (Tile::kCluster > 1) {
    // Others may still read from this block's memory, or send to it.
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
#else
  __trap();  // the plan keeps launches away
#endif
}

template <class Tile>
int resident_integer_clusters() {
  auto* const kernel = multiply_integer_tiles<Tile>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kAllBytes),
             "matmul_integers_cuda: shared memory of multiply_integer_tiles");
  LaunchSettings settings(dim3(static_cast<unsigned>(1024 * Tile::kCluster)), dim3(kIntegerThreads), nullptr,
                          false, Tile::kCluster);
  settings.config.dynamicSmemBytes = Tile::kAllBytes;
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &settings.config),
             "matmul_integers_cuda: clusters that run at the same time");
  return count;
}

template <class Tile>
void launch_integer_tiles(const IntegerArguments& arguments, int clusters, bool overlap,
                          cudaStream_t stream) {
  auto* const kernel = multiply_integer_tiles<Tile>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kAllBytes),
             "matmul_integers_cuda: shared memory of multiply_integer_tiles");
  LaunchSettings settings(dim3(static_cast<unsigned>(clusters * Tile::kCluster)), dim3(kIntegerThreads),
                          stream, overlap, Tile::kCluster);
  settings.config.dynamicSmemBytes = Tile::kAllBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, arguments),
             "matmul_integers_cuda: launch of multiply_integer_tiles");
}

}  // namespace quantloom::cuda
