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
  // With many parts, two blocks share a processor, as clusters leave some processors over.
  static constexpr int kBlocks = kTokens == 16 || (kTokens == 64 && kParts >= 4) ? 2 : 1;
  // A tile is finished while the products of the next one run.
  static constexpr bool kDeferred = kTokens == 128 && kParts == 1;
  static constexpr int kStages = kTokens == 256 || (kTokens == 128 && kParts > 1) ? 4
                                 : kTokens == 64                                  ? (kBlocks == 2 ? 3 : 6)
                                 : kDeferred                                      ? 6
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
  static_assert(kParts == 1 || (kRows == 1 && kColumns == 1));
  static_assert(kTokens / kRows % 8 == 0 && kAllBytes <= (kBlocks == 2 ? 115712 : 232448));
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

// A float32 or int32, without passing through registers.
__device__ __forceinline__ void copy_word_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void store_piece(void* global, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Rounds sums and writes them: the part of one warpgroup.
template <class Tile>
class IntegerFinish {
 public:
  static constexpr int kTokens = Tile::kOwnTokens;

  // `row`: the first of the warpgroup's outputs; `token`: the first token.
  __device__ __forceinline__ IntegerFinish(const IntegerArguments& p, unsigned char* memory, uint32_t shared,
                                           int warpgroup, int64_t row, int64_t token)
      : p_(&p),
        barrier_(warpgroup),
        row_(row),
        token_(token),
        terms_(Tile::kTerms + warpgroup * Tile::kTermBytes),
        results_(Tile::kResults + warpgroup * Tile::kResultBytes),
        memory_(memory),
        shared_(shared) {}

  // The terms of the tokens, to shared memory; those of the outputs.
  __device__ __forceinline__ void fetch_terms() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_ + thread() / 32 * 16 + lane() / 4 + 8 * i;
      scale_[i] = p_->rows[row].scale;
      bias_[i] = p_->bias != nullptr && row < p_->n ? load_half(p_->bias, row) : 0.0F;
    }
    for (int i = thread(); i < kTokens; i += kWarpgroupThreads) {
      if (token_ + i >= p_->m) break;
      const integers::TokenTerms* const from = p_->terms + token_ + i;
      copy_word_async(shared_ + terms_ + 4 * i, &from->scale);
      if (!p_->has_zeros) continue;
      const uint32_t pair = shared_ + terms_ + 4 * kTokens + 8 * i;
      copy_word_async(pair, &from->zero);
      copy_word_async(pair + 4, &from->sum);
    }
  }

  // Waits for the terms, and takes zero points out of the sums.
  __device__ __forceinline__ void begin(int (&sum)[kTokens / 2]) {
    wait_for_copies();
    warpgroup_barrier(barrier_);
    if (!p_->has_zeros) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowTerms terms = p_->rows[row_ + thread() / 32 * 16 + lane() / 4 + 8 * i];
      const auto* const pairs =
          reinterpret_cast<const int2*>(memory_ + terms_ + 4 * kTokens) + lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int2 token = pairs[8 * j + c];
          sum[4 * j + 2 * i + c] -= token.x * terms.sum + terms.zero * token.y;
        }
      }
    }
  }

  // sum := the scaled sums, as float32 in the same registers.
  __device__ __forceinline__ void scale(int (&sum)[kTokens / 2]) const {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 token = token_scales(j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int* const pair = sum + 4 * j + 2 * i;
        pair[0] = __float_as_int(__fmul_rn(__fmul_rn(static_cast<float>(pair[0]), scale_[i]), token.x));
        pair[1] = __float_as_int(__fmul_rn(__fmul_rn(static_cast<float>(pair[1]), scale_[i]), token.y));
      }
    }
  }

  // Scales the sums unless scale() has, adds the bias, rounds and writes.
  __device__ __forceinline__ void write(const int (&sum)[kTokens / 2]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      round_chunk(sum, chunk);
      copy_chunk(chunk);
    }
    warpgroup_barrier(barrier_);
  }

  // The whole in pieces, one after the other.
  static constexpr int kPieces = 1 + 2 * (kTokens / Tile::kChunk);
  __device__ __forceinline__ void piece(int index, int (&sum)[kTokens / 2]) {
    if (index == 0) {
      if constexpr (!Tile::kOutliers) begin(sum);
    } else if (index % 2 == 1) {
      round_chunk(sum, index / 2);
    } else {
      copy_chunk(index / 2 - 1);
    }
  }

 private:
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  }
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }

  // Of tokens 8 j + 2 t and the next.
  __device__ __forceinline__ float2 token_scales(int j) const {
    return reinterpret_cast<const float2*>(memory_ + terms_)[4 * j + lane() % 4];
  }
  __device__ __forceinline__ float finished(int sum, int i, float token_scale) const {
    if constexpr (Tile::kOutliers) return __int_as_float(sum) + bias_[i];
    return __fmaf_rn(__fmul_rn(static_cast<float>(sum), scale_[i]), token_scale, bias_[i]);
  }
  __device__ __forceinline__ uint32_t round_pair(float first, float second) const {
    return p_->bfloat16 ? bits_of(__floats2bfloat162_rn(first, second))
                        : bits_of(__floats2half2_rn(first, second));
  }
  template <class Pair>
  static __device__ __forceinline__ uint32_t bits_of(Pair pair) {
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ __forceinline__ float load_half(const void* values, int64_t i) const {
    return p_->bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i])
                        : __half2float(static_cast<const __half*>(values)[i]);
  }

  static constexpr int kChunks = kTokens / Tile::kChunk;

  // To shared memory, once the chunk before has been read.
  __device__ __forceinline__ void round_chunk(const int (&sum)[kTokens / 2], int chunk) const {
    constexpr int kChunkTiles = Tile::kChunk / 8;
    uint32_t words[2 * kChunkTiles];
#pragma unroll
    for (int j = 0; j < kChunkTiles; ++j) {
      const float2 token = Tile::kOutliers ? float2{1.0F, 1.0F} : token_scales(chunk * kChunkTiles + j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 4 * (chunk * kChunkTiles + j) + 2 * i;
        words[2 * j + i] = round_pair(finished(sum[at], i, token.x), finished(sum[at + 1], i, token.y));
      }
    }
    if (chunk > 0 || Tile::kDeferred) warpgroup_barrier(barrier_);
    store_chunk(words);
  }

  // Rows of 128 bytes, whose pieces of 16 are swizzled against conflicts of banks.
  static __device__ __forceinline__ int piece_at(int token, int piece) {
    return token * 128 + ((piece ^ (token & 7)) << 4);
  }
  template <int kWords>
  __device__ __forceinline__ void store_chunk(const uint32_t (&words)[kWords]) const {
    const int matrix = lane() / 8;
    const int piece = thread() / 32 * 2 + matrix % 2;
    if constexpr (kWords == 2) {
      store_transposed(shared_ + results_ + piece_at(lane() % 8, piece), words[0], words[1]);
    } else {
      const uint32_t first = shared_ + results_ + piece_at(8 * (matrix / 2) + lane() % 8, piece);
#pragma unroll
      for (int j = 0; j < kWords / 2; j += 2) {
        const uint32_t four[4] = {words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]};
        store_transposed(first + 1024 * j, four);
      }
    }
  }
  // From there to memory.
  __device__ __forceinline__ void copy_chunk(int chunk) const {
    warpgroup_barrier(barrier_);
    const int64_t first = token_ + chunk * Tile::kChunk;
    const int piece = thread() % 8;
    const int64_t column = row_ + 8 * piece;
    const auto width = static_cast<int>(min(int64_t{8}, p_->n - column));
    const auto tokens = static_cast<int>(min(int64_t{Tile::kChunk}, p_->m - first));
    const unsigned char* from =
        memory_ + results_ + piece_at(thread() / 8, piece);  // 16 tokens on: the same place
    uint16_t* to = static_cast<uint16_t*>(p_->y) + (first + thread() / 8) * p_->y_stride + column;
    if (width == 8 && p_->y_in_pieces) {
#pragma unroll
      for (int step = 0; step < (Tile::kChunk + 15) / 16; ++step) {
        if (thread() / 8 + 16 * step < tokens)
          store_piece(to, *reinterpret_cast<const uint4*>(from + 2048 * step));
        to += 16 * p_->y_stride;
      }
      return;
    }
    for (int token = thread() / 8; token < tokens; token += 16, from += 2048, to += 16 * p_->y_stride) {
      for (int i = 0; i < width; ++i) to[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
  }

  const IntegerArguments* p_;
  int barrier_;
  int64_t row_;
  int64_t token_;
  int terms_;  // places in shared memory
  int results_;
  unsigned char* memory_;
  uint32_t shared_;
  float scale_[2] = {};
  float bias_[2] = {};
};

// What one warpgroup does with the stages.
template <class Tile>
class IntegerConsumer {
 public:
  __device__ __forceinline__ IntegerConsumer(uint32_t shared, int warpgroup, int rank)
      : shared_(shared), warpgroup_(warpgroup), rank_(rank) {}

  // Sums of `blocks` blocks of columns.
  __device__ __forceinline__ void multiply(int (&sum)[Tile::kTokens / 2], int blocks) {
    multiply<0>(sum, blocks, [](int /*piece*/) {});
  }
  // The same, with pieces of other work while the first products run.
  template <int kPieces, class Work>
  __device__ __forceinline__ void multiply(int (&sum)[Tile::kTokens / 2], int blocks, const Work& work) {
    int before = -1;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece < blocks) begin_block(sum, piece > 0);
      work(piece);
      if (piece < blocks) end_block(before);
    }
#pragma unroll 1
    for (int block = kPieces; block < blocks; ++block) {
      begin_block(sum, block > 0);
      end_block(before);
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
  __device__ __forceinline__ void begin_block(int (&sum)[Tile::kTokens / 2], bool add) {
    wait_for_phase(full(at_.stage), at_.parity);
    const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
    const uint64_t w = token_descriptor(stage + warpgroup_ * integers::kSlabBytes);
    const uint64_t x = token_descriptor(stage + Tile::kWeightBytes);
    open_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply_integers<Tile::kTokens>(sum, w + 2 * step, x + 2 * step, add || step > 0 ? 1 : 0);
    }
    close_products();
  }
  // Leaves the stage before this one, whose products have ended.
  __device__ __forceinline__ void end_block(int& before) {
    wait_for_products<1>();
    if (before >= 0) leave(before);
    before = at_.stage;
    at_.advance();
  }
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

// Sums of parts, sent to the blocks that finish them: from each part, piece j of a thread holds its four of
// tokens 8 j ...
template <class Tile>
class SumExchange {
 public:
  __device__ __forceinline__ SumExchange(unsigned char* memory, int warpgroup)
      : received_(
            reinterpret_cast<float*>(memory + Tile::kExchange) +
            (warpgroup * kPieces * kWarpgroupThreads + static_cast<int>(threadIdx.x) % kWarpgroupThreads) *
                4),
        barrier_(reinterpret_cast<uint64_t*>(memory + Tile::kBarriers + 16 * Tile::kStages)) {}

  // By one thread, before the blocks of the cluster meet.
  __device__ __forceinline__ void prepare() const {
    Delivery::prepare(barrier_);
    Delivery::expect(barrier_, Tile::kExchangeBytes);
    Delivery::all_expected(barrier_);
  }
  __device__ __forceinline__ void send(const int (&sum)[Tile::kTokens / 2], int rank) const {
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
      Delivery::send(received_ + rank * (Tile::kPartBytes / 4) + j % kPieces * kStep, barrier_, j / kPieces,
                     {__int_as_float(sum[4 * j]), __int_as_float(sum[4 * j + 1]),
                      __int_as_float(sum[4 * j + 2]), __int_as_float(sum[4 * j + 3])});
    }
  }
  __device__ __forceinline__ void receive(int (&sum)[Tile::kOwnTokens / 2]) const {
    Delivery::wait(barrier_);
#pragma unroll
    for (int i = 0; i < Tile::kOwnTokens / 2; ++i) sum[i] = 0;
#pragma unroll
    for (int rank = 0; rank < Tile::kParts; ++rank) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int4 part =
            *reinterpret_cast<const int4*>(received_ + rank * (Tile::kPartBytes / 4) + j * kStep);
        sum[4 * j] += part.x;
        sum[4 * j + 1] += part.y;
        sum[4 * j + 2] += part.z;
        sum[4 * j + 3] += part.w;
      }
    }
  }

 private:
  static constexpr int kPieces = Tile::kOwnTokens / 8;
  static constexpr int kStep = kWarpgroupThreads * 4;
  float* received_;
  uint64_t* barrier_;
};

template <class Tile>
__device__ __forceinline__ IntegerFinish<Tile> finish_of(const IntegerArguments& p, unsigned char* memory,
                                                         uint32_t shared, int warpgroup,
                                                         const TilePlace& place, int first) {
  return {p,
          memory,
          shared,
          warpgroup,
          int64_t{place.row_tile} * kTileRows + warpgroup * integers::kSlabRows,
          int64_t{place.token_tile} * Tile::kTokens + first};
}

// The tiles of a cluster, each finished before the next begins.
template <class Tile>
__device__ __forceinline__ void multiply_whole(const IntegerArguments& p, unsigned char* memory,
                                               uint32_t shared, int rank, int warpgroup,
                                               IntegerConsumer<Tile>& consumer) {
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < p.row_groups * p.token_groups;
       tile += clusters) {
    const TilePlace place = place_of_tile<Tile>(p, tile, rank);
    const bool has_rows = place.row_tile < p.row_tiles;
    IntegerFinish<Tile> finish = finish_of<Tile>(p, memory, shared, warpgroup, place, 0);
    if (has_rows) finish.fetch_terms();
    int sum[Tile::kTokens / 2];
    consumer.multiply(sum, p.blocks);
    if (has_rows) finish.begin(sum);
    if constexpr (Tile::kOutliers) {
      if (has_rows) finish.scale(sum);
      consumer.add_outliers(sum, p.outlier_blocks, 0);
    }
    if (has_rows) finish.write(sum);
  }
}

// The same; a tile is finished while the first products of the next run, from a copy of its sums: the
// registers of sums belong to the products.
template <class Tile>
__device__ __forceinline__ void multiply_deferred(const IntegerArguments& p, unsigned char* memory,
                                                  uint32_t shared, int rank, int warpgroup,
                                                  IntegerConsumer<Tile>& consumer) {
  using Finish = IntegerFinish<Tile>;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  const int tiles = p.row_groups * p.token_groups;
  Finish finish = finish_of<Tile>(p, memory, shared, warpgroup, {0, 0}, 0);
  bool pending = false;  // a tile is to be finished
  int last[Tile::kTokens / 2];
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < tiles; tile += clusters) {
    const TilePlace place = place_of_tile<Tile>(p, tile, rank);
    int sum[Tile::kTokens / 2];
    consumer.template multiply<Finish::kPieces>(sum, p.blocks, [&](int piece) {
      if (pending) finish.piece(piece, last);
    });
    pending = place.row_tile < p.row_tiles;
    finish = finish_of<Tile>(p, memory, shared, warpgroup, place, 0);
    if (pending) finish.fetch_terms();
    if constexpr (Tile::kOutliers) {
      if (pending) {
        finish.begin(sum);
        finish.scale(sum);
      }
      consumer.add_outliers(sum, p.outlier_blocks, 0);
    }
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) last[i] = sum[i];
  }
#pragma unroll
  for (int piece = 0; piece < Finish::kPieces; ++piece) {
    if (pending) finish.piece(piece, last);
  }
}

// A part of one tile.
template <class Tile>
__device__ __forceinline__ void multiply_part(const IntegerArguments& p, unsigned char* memory,
                                              uint32_t shared, int rank, int warpgroup,
                                              IntegerConsumer<Tile>& consumer, int blocks) {
  const bool is_owner = rank * Tile::kOwnTokens < Tile::kTokens;
  const int first = rank * Tile::kOwnTokens;
  IntegerFinish<Tile> finish =
      finish_of<Tile>(p, memory, shared, warpgroup,
                      place_of_tile<Tile>(p, static_cast<int>(blockIdx.x) / Tile::kCluster, rank), first);
  if (is_owner) finish.fetch_terms();
  int sum[Tile::kTokens / 2];
  consumer.multiply(sum, blocks);
  const SumExchange<Tile> exchange(memory, warpgroup);
  exchange.send(sum, rank);
  if (!is_owner) return;
  int own[Tile::kOwnTokens / 2];
  exchange.receive(own);
  finish.begin(own);
  if constexpr (Tile::kOutliers) {
    finish.scale(own);
    consumer.add_outliers(own, p.outlier_blocks, first);
  }
  finish.write(own);
}

template <class Tile>
__global__ void __launch_bounds__(kIntegerThreads, Tile::kBlocks)
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
    if constexpr (Tile::kParts > 1) SumExchange<Tile>(tile_memory, 0).prepare();
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) {
    cluster_begin();
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
#pragma unroll 1
          for (int i = 0; i < ahead; ++i, loader.advance()) {
            loader.announce();
            loader.copy_weights(p.weights, p.blocks, begin + i);
          }
          const StageCursor<Tile::kStages> stop = loader.at();
          loader.at() = start;
          wait_for_previous();
#pragma unroll 1
          for (int i = 0; i < ahead; ++i, loader.advance()) loader.copy_tokens(p.tokens, p.blocks, begin + i);
          loader.at() = stop;
          block += ahead;
          is_first = false;
        }
#pragma unroll 1
        for (; block < end; ++block, loader.advance()) {
          loader.announce();
          loader.copy_weights(p.weights, p.blocks, block);
          loader.copy_tokens(p.tokens, p.blocks, block);
        }
#pragma unroll 1
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
    if constexpr (Tile::kDeferred) {
      multiply_deferred<Tile>(p, tile_memory, shared, rank, warpgroup, consumer);
    } else if constexpr (Tile::kParts > 1) {
      multiply_part<Tile>(p, tile_memory, shared, rank, warpgroup, consumer, end - begin);
    } else {
      multiply_whole<Tile>(p, tile_memory, shared, rank, warpgroup, consumer);
    }
  }
  if constexpr (Tile::kRows * Tile::kColumns > 1) {
    // Others may still send to this block, or tell it that they have read what it sent.
    __syncwarp();
    cluster_begin();
    cluster_wait();
  }
#else
  __trap();  // the plan keeps launches away
#endif
}

template <class Tile>
int resident_integer_clusters(const DeviceFacts& device) {
  auto* const kernel = multiply_integer_tiles<Tile>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kAllBytes),
             "matmul_integers_cuda: shared memory of multiply_integer_tiles");
  int count = 0;
  if constexpr (Tile::kCluster == 1) {
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kIntegerThreads, Tile::kAllBytes),
        "matmul_integers_cuda: blocks that run at the same time");
    return count * device.processors;
  }
  LaunchSettings settings(dim3(static_cast<unsigned>(1024 * Tile::kCluster)), dim3(kIntegerThreads), nullptr,
                          false, Tile::kCluster);
  settings.config.dynamicSmemBytes = Tile::kAllBytes;
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
