// Products of integers on sm_90a with weights in register order (src/kernels/register_order.hpp): of at most
// 4 bits, or with scales for groups of columns.
//
// A tile of 64 or 128 outputs x kTokens tokens belongs to a block of threads: one warp fetches records of
// weights and blocks of tokens into a ring of stages, a warpgroup for each 64 outputs takes its codes to
// registers, 4 bits becoming 8 there, and multiplies them by tokens in shared memory (wgmma, int32 sums).
//
// With groups, the sums of each run of at most 128 columns that share a scale are exact in float32; they are
// scaled and added to float32 sums, run after run in the order of columns, each by one fused multiplication
// and addition. So a token's result is the same in tiles of all sizes. These additions take as many
// instructions as products take time: they are done for 64 tokens at a time while the products of the next 64
// run, and by one warpgroup while the other's products run.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "common/check.cuh"
#include "common/shared_products.cuh"
#include "kernels/integer_finish.cuh"
#include "kernels/integer_registers.hpp"
#include "kernels/overlap.cuh"
#include "kernels/register_order.hpp"

namespace quantloom::cuda {

template <int kTokens_, int kSlabs_, int kCluster_, bool kNibbles_, int kSteps_, bool kPairs_>
struct RegisterTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kSlabs = kSlabs_;
  static constexpr int kRows = kCluster_;  // tiles of a cluster, as place_of_tile() calls them
  static constexpr int kParts = 1;
  static constexpr int kTiles = 1;
  static constexpr bool kHalves = false;
  static constexpr bool kNibbles = kNibbles_;
  static constexpr int kSteps = kSteps_;
  static constexpr bool kPairs = kPairs_;
  static constexpr bool kGrouped = kSteps > 0;
  static constexpr bool kTokenSums = kPairs && !kNibbles;
  static constexpr int kThreads = kSlabs == 2 ? kIntegerThreads : kWarpgroupThreads + 32;
  static constexpr int kBlocks = kSlabs == 2 ? 1 : 2;  // that share a processor

  // Tokens whose products are taken to the sums at a time, and how often for a block of columns.
  static constexpr int kUnit = kGrouped && kTokens > 64 ? 64 : kTokens;
  static constexpr int kUnits = kTokens / kUnit * (kGrouped ? kSteps : 1);
  // Registers hold the weights of two blocks, so that products of one block run while the next is unpacked.
  static constexpr bool kAhead =
      !kTokenSums && kSteps <= 1 && (kTokens <= 64 || (kTokens == 128 && kSlabs == 2));

  static constexpr int kRecordBytes = registers::record_bytes(kNibbles, kSteps, kPairs);
  static constexpr int kTokenBytes = kTokens * integers::kBlockBytes;
  static constexpr int kSumBytes = kTokenSums ? kSteps * kTokens * 4 : 0;
  static constexpr int kSums = kTokenBytes + kSlabs * kRecordBytes;  // in a stage
  static constexpr int kStageBytes = (kSums + kSumBytes + 1023) / 1024 * 1024;

  // As IntegerFinish knows them. Outliers, or groups: sums come scaled.
  static constexpr int kOwnTokens = kTokens;
  static constexpr bool kOutliers = kGrouped;
  static constexpr bool kDeferred = false;
  static constexpr int kChunk = kTokens < 64 ? kTokens : 64;
  static constexpr int kResultBytes = kChunk * integers::kSlabRows * 2;
  static constexpr int kTermBytes = 12 * kTokens;

  static constexpr int kLimit = kBlocks == 2 ? 115712 : 232448;
  static constexpr int kFixed = kSlabs * (kResultBytes + kTermBytes) + 16 * 12;
  static constexpr int kFitting = (kLimit - kFixed) / kStageBytes;
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;
  static constexpr int kResults = kStages * kStageBytes;
  static constexpr int kTerms = kResults + kSlabs * kResultBytes;
  static constexpr int kBarriers = kTerms + kSlabs * kTermBytes;
  static constexpr int kAllBytes = kBarriers + 16 * kStages;
  static_assert(kStages >= 3 && kAllBytes <= kLimit && kTokens / kRows % 8 == 0);
};

// The copies of a block of threads: one thread.
template <class Tile>
class RegisterLoader {
 public:
  __device__ __forceinline__ RegisterLoader(const RegisterArguments& p, uint32_t shared, int rank)
      : p_(p),
        shared_(shared),
        rank_(rank),
        weights_policy_(p.token_tiles == 1 ? cache_policy<Reuse::none>() : cache_policy<Reuse::some>()),
        tokens_policy_(cache_policy<Reuse::most>()) {}

  __device__ __forceinline__ void begin_tile(const TilePlace& place) {
    const int64_t rows = p_.m_padded - place.token;
    tokens_ = static_cast<int>(max(int64_t{0}, min(rows, int64_t{Tile::kTokens})));
    has_rows_ = place.row_tile < p_.row_tiles;
    place_ = place;
  }
  // Announces what comes to this block in a stage that all blocks have left.
  __device__ __forceinline__ void announce() {
    wait_for_phase(full(at_.stage) + 8, at_.parity ^ 1);
    announce_bytes(full(at_.stage), (has_rows_ ? Tile::kSlabs * Tile::kRecordBytes : 0) +
                                        tokens_ * integers::kBlockBytes + Tile::kSumBytes);
  }
  __device__ __forceinline__ void copy_weights(int64_t block) {
    if (!has_rows_) return;
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      const int64_t record = (int64_t{place_.row_tile} * Tile::kSlabs + slab) * p_.blocks + block;
      copy_bulk(shared_ + at_.stage * Tile::kStageBytes + Tile::kTokenBytes + slab * Tile::kRecordBytes,
                p_.weights + record * Tile::kRecordBytes, Tile::kRecordBytes, full(at_.stage),
                weights_policy_);
    }
  }
  // This block's share of the tokens, to all blocks of the cluster.
  __device__ __forceinline__ void copy_tokens(int64_t block) {
    constexpr int kShare = Tile::kTokens / Tile::kRows;
    constexpr int kPieceRows = kShare < integers::kSlabRows ? kShare : integers::kSlabRows;
    const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
#pragma unroll
    for (int piece = 0; piece < kShare / kPieceRows; ++piece) {
      const int row = rank_ * kShare + piece * kPieceRows;
      const int bytes = min(kPieceRows, tokens_ - row) * integers::kBlockBytes;
      if (bytes <= 0) break;
      const int64_t absolute = place_.token + row;
      const unsigned char* const from =
          p_.tokens + (absolute / integers::kSlabRows * p_.blocks + block) * integers::kSlabBytes +
          absolute % integers::kSlabRows * integers::kBlockBytes;
      const uint32_t to = stage + row * integers::kBlockBytes;
      if constexpr (Tile::kRows > 1) {
        copy_to_blocks(to, from, bytes, full(at_.stage), static_cast<uint16_t>((1U << Tile::kRows) - 1U),
                       tokens_policy_);
      } else {
        copy_bulk(to, from, bytes, full(at_.stage), tokens_policy_);
      }
    }
    if constexpr (Tile::kTokenSums) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        copy_bulk(stage + Tile::kSums + step * Tile::kTokens * 4,
                  p_.token_sums + (block * Tile::kSteps + step) * p_.sums_tokens + place_.token,
                  Tile::kTokens * 4, full(at_.stage), tokens_policy_);
      }
    }
  }
  __device__ __forceinline__ void advance() {
    at_.advance();
  }
  __device__ __forceinline__ StageCursor<Tile::kStages>& at() {
    return at_;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared_ + Tile::kBarriers + 16 * stage;
  }

 private:
  const RegisterArguments& p_;
  uint32_t shared_;
  int rank_;
  uint64_t weights_policy_;
  uint64_t tokens_policy_;
  StageCursor<Tile::kStages> at_;
  TilePlace place_{};
  int tokens_ = 0;
  bool has_rows_ = false;
};

__device__ __forceinline__ uint32_t load_word(uint32_t shared) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}
__device__ __forceinline__ uint2 load_pair(uint32_t shared) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(shared) : "memory");
  return value;
}

// What one warpgroup does with the stages.
template <class Tile>
class RegisterConsumer {
 public:
  // What is summed: int32, or with groups float32.
  using Sum = std::conditional_t<Tile::kGrouped, float, int>;
  static constexpr int kSums = Tile::kTokens / 2;

  __device__ __forceinline__ RegisterConsumer(uint32_t shared, int warpgroup)
      : shared_(shared), warpgroup_(warpgroup) {}

  // Sums of a tile; those of rows with one scale come multiplied by 16.
  __device__ __forceinline__ void multiply(Sum (&sum)[kSums], int blocks) {
    if constexpr (Tile::kGrouped) {
#pragma unroll
      for (float& value : sum) value = 0.0F;
    }
    begin();
    if constexpr (Tile::kAhead) {
      int block = 0;
#pragma unroll 1
      for (; block + 1 < blocks; block += 2) {
        multiply_block<0>(sum, block > 0);
        multiply_block<1>(sum, true);
      }
      // The two ends are kept apart: merged, they would index registers.
      if (block < blocks) {
        multiply_block<0>(sum, block > 0);
        end<0>(sum);
        asm volatile("// after an odd number of blocks" ::: "memory");
      } else {
        end<1>(sum);
        asm volatile("// after an even number of blocks" ::: "memory");
      }
    } else {
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        multiply_block<0>(sum, block > 0);
        end<0>(sum);
      }
    }
  }

 protected:
  static constexpr int kAhead = Tile::kAhead ? 1 : 0;
  static constexpr int kSlots = 1 + kAhead;
  static constexpr int kSteps = Tile::kGrouped ? Tile::kSteps : 1;
  static constexpr int kProducts = 4 / kSteps;  // of a unit
  // Which of the two sets of sums the last unit of a block has.
  template <int kPhase>
  static constexpr int kLastPart = (kPhase * Tile::kUnits + Tile::kUnits - 1) % 2;

  template <int kPhase>
  __device__ __forceinline__ void multiply_block(Sum (&sum)[kSums], bool add) {
    wait_for_phase(full(at_.stage), at_.parity);
    const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
    constexpr int kSlot = kPhase * kAhead;
    load<kSlot>(stage + Tile::kTokenBytes + warpgroup_ * Tile::kRecordBytes);
    const uint64_t x = token_descriptor(stage);
    if constexpr (Tile::kGrouped) {
      units<kPhase>(sum, x, std::make_integer_sequence<int, Tile::kUnits>());
    } else {
      open_products();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        multiply_registers<Tile::kTokens>(sum, weights_[kSlot][step], x + 2 * step, add || step > 0 ? 1 : 0);
      }
      close_products();
      wait_for_products<1>();
      leave_before();
    }
    before_ = at_.stage;
    at_.advance();
  }

  // What is added before the first products have ended: nothing.
  __device__ __forceinline__ void begin() {
    before_ = -1;
    if constexpr (Tile::kGrouped && Tile::kAhead) {
#pragma unroll
      for (int i = 0; i < Tile::kUnit / 2; ++i) part_[kLastPart<1>][i] = 0;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) terms_[1][i / 2][i % 2] = {0, 0};
    }
  }
  // Waits for the last products.
  template <int kPhase>
  __device__ __forceinline__ void end(Sum (&sum)[kSums]) {
    wait_for_products<0>();
    if constexpr (Tile::kGrouped) {
      add_unit<kPhase, Tile::kUnits - 1>(sum, max(before_, 0));
      leave_before();
    } else {
#pragma unroll
      for (int& value : sum) hold(value);
      leave_before();
    }
    before_ = -1;
  }

  template <int kPhase, int... kUnit>
  __device__ __forceinline__ void units(float (&sum)[kSums], uint64_t x,
                                        std::integer_sequence<int, kUnit...> /*units*/) {
    (unit<kPhase, kUnit>(sum, x), ...);
  }
  // Begins the products of a unit, and adds those of the unit before.
  template <int kPhase, int kUnit>
  __device__ __forceinline__ void unit(float (&sum)[kSums], uint64_t x) {
    constexpr int kStep = kUnit % kSteps;
    constexpr int kChunk = kUnit / kSteps;
    open_products();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      constexpr int kFirst = kStep * kProducts;
      multiply_registers<Tile::kUnit>(
          part_[(kPhase * Tile::kUnits + kUnit) % 2], weights_[kPhase * kAhead][kFirst + i],
          x + kChunk * (Tile::kUnit * integers::kBlockBytes / 16) + 2 * (kFirst + i), i > 0 ? 1 : 0);
    }
    close_products();
    if constexpr (kUnit > 0) {
      wait_for_products<1>();
      add_unit<kPhase, kUnit - 1>(sum, at_.stage);
    } else if constexpr (Tile::kAhead) {
      wait_for_products<1>();
      if constexpr (!Tile::kTokenSums) leave_before();
      add_unit<1 - kPhase, Tile::kUnits - 1>(sum, max(before_, 0));
      if constexpr (Tile::kTokenSums) leave_before();
    }
  }
  // Of the block in `stage`.
  template <int kPhase, int kUnit>
  __device__ __forceinline__ void add_unit(float (&sum)[kSums], int stage) {
    constexpr int kStep = kUnit % kSteps;
    constexpr int kChunk = kUnit / kSteps;
    auto& part = part_[(kPhase * Tile::kUnits + kUnit) % 2];
    const auto& terms = terms_[kPhase * kAhead][kStep];
#pragma unroll
    for (int& value : part) hold(value);
#pragma unroll
    for (int j = 0; j < Tile::kUnit / 8; ++j) {
      uint2 codes{};
      if constexpr (Tile::kTokenSums) {
        const int token = kChunk * Tile::kUnit + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2;
        codes = load_pair(shared_ + stage * Tile::kStageBytes + Tile::kSums +
                          (kStep * Tile::kTokens + token) * 4);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& to = sum[kChunk * (Tile::kUnit / 2) + 4 * j + i];
        auto own = static_cast<float>(part[4 * j + i]);
        if constexpr (Tile::kTokenSums) {
          own = __fmaf_rn(__uint_as_float(terms[i / 2].y), __uint_as_float(i % 2 == 0 ? codes.x : codes.y),
                          own);
        }
        to = __fmaf_rn(own, __uint_as_float(terms[i / 2].x), to);
      }
    }
  }

  // Weights and terms of a block.
  template <int kSlot>
  __device__ __forceinline__ void load(uint32_t record) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    if constexpr (Tile::kGrouped) {
      const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const uint32_t from =
            record + registers::place_of_term(row + 8 * (i % 2), i / 2, Tile::kNibbles, Tile::kPairs);
        if constexpr (Tile::kPairs) {
          terms_[kSlot][i / 2][i % 2] = load_pair(from);
        } else {
          terms_[kSlot][i / 2][i % 2].x = load_word(from);
        }
      }
    }
    uint32_t(&to)[4][4] = weights_[kSlot];
    if constexpr (!Tile::kNibbles) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint4 four = load_shared(record + (step * registers::kThreads + thread) * 16);
        to[step][0] = four.x;
        to[step][1] = four.y;
        to[step][2] = four.z;
        to[step][3] = four.w;
      }
    } else {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 four = load_shared(record + (pair * registers::kThreads + thread) * 16);
        const auto& terms = terms_[kSlot];
        unpack(to[2 * pair], terms[2 * pair * kSteps / 4], four.x, four.y);
        unpack(to[2 * pair + 1], terms[(2 * pair + 1) * kSteps / 4], four.z, four.w);
      }
    }
  }
  // The bytes of 32 columns: 16 times the code, or with zero points the code less that.
  static __device__ __forceinline__ void unpack(uint32_t (&to)[4], const uint2 (&terms)[2], uint32_t first,
                                                uint32_t second) {
    if constexpr (Tile::kPairs) {
      to[0] = difference(first & 0x0F0F0F0FU, terms[0].y);
      to[1] = difference(first >> 4 & 0x0F0F0F0FU, terms[1].y);
      to[2] = difference(second & 0x0F0F0F0FU, terms[0].y);
      to[3] = difference(second >> 4 & 0x0F0F0F0FU, terms[1].y);
    } else {
      to[0] = first << 4 & 0xF0F0F0F0U;
      to[1] = first & 0xF0F0F0F0U;
      to[2] = second << 4 & 0xF0F0F0F0U;
      to[3] = second & 0xF0F0F0F0U;
    }
  }
  // Of each byte: no borrow crosses from one to the next.
  static __device__ __forceinline__ uint32_t difference(uint32_t codes, uint32_t zeros) {
    return ((codes | 0x80808080U) - zeros) ^ 0x80808080U;
  }

  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared_ + Tile::kBarriers + 16 * stage;
  }
  // Tells all blocks that send to this one that the products of the stage before have ended.
  __device__ __forceinline__ void leave_before() {
    if (before_ < 0) return;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const uint32_t barrier = full(before_) + 8;
    if constexpr (Tile::kRows == 1) {
      if (thread == 0) arrive(barrier);
    } else {
      if (thread < Tile::kRows) arrive_at(barrier, thread);
    }
  }

  uint32_t shared_;
  int warpgroup_;
  int before_ = -1;
  StageCursor<Tile::kStages> at_;
  uint32_t weights_[kSlots][4][4];
  uint2 terms_[kSlots][kSteps][2];  // rows g and g + 8
  int part_[2][Tile::kGrouped ? Tile::kUnit / 2 : 1];
};

// The end of a tile with groups.
template <class Tile>
class RegisterFinish : public IntegerFinish<Tile> {
 public:
  using IntegerFinish<Tile>::IntegerFinish;

  // Zero points and scales of the tokens.
  __device__ __forceinline__ void scale_sums(const float (&sum)[Tile::kTokens / 2],
                                             int (&scaled)[Tile::kTokens / 2]) const {
    this->await_terms();
    const float rows[2] = {__int_as_float(this->terms_of_row(0).sum),
                           __int_as_float(this->terms_of_row(1).sum)};
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
      const float2 scales = this->token_scales(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value = sum[4 * j + i];
        if (this->p_->has_zeros) {
          const auto zero = static_cast<float>(this->token_pairs()[8 * j + i % 2].x);
          value = __fmaf_rn(-zero, rows[i / 2], value);
        }
        scaled[4 * j + i] = __float_as_int(__fmul_rn(value, i % 2 == 0 ? scales.x : scales.y));
      }
    }
  }
};

// Scales the sums of a tile, rounds and writes them: one warpgroup.
template <class Tile>
__device__ __forceinline__ void finish_register_tile(
    RegisterFinish<Tile>& finish, const typename RegisterConsumer<Tile>::Sum (&sum)[Tile::kTokens / 2]) {
  int scaled[Tile::kTokens / 2];
  if constexpr (Tile::kGrouped) {
    finish.scale_sums(sum, scaled);
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) scaled[i] = sum[i] >> 4;
    finish.begin(scaled);
  }
  finish.write(scaled);
}

template <class Tile>
__device__ __forceinline__ void multiply_register_tile(const RegisterArguments& p, unsigned char* memory,
                                                       uint32_t shared, int warpgroup, const TilePlace& place,
                                                       RegisterConsumer<Tile>& consumer) {
  const bool has_rows = place.row_tile < p.row_tiles;
  RegisterFinish<Tile> finish(p, memory, shared, warpgroup,
                              (int64_t{place.row_tile} * Tile::kSlabs + warpgroup) * integers::kSlabRows,
                              place.token, place.token + Tile::kTokens);
  if (has_rows) finish.fetch_terms();
  typename RegisterConsumer<Tile>::Sum sum[Tile::kTokens / 2];
  consumer.multiply(sum, p.blocks);
  if (has_rows) finish_register_tile<Tile>(finish, sum);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    multiply_integer_registers(const __grid_constant__ RegisterArguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t shared = shared_address(tile_memory);
  const int rank = Tile::kRows > 1 ? static_cast<int>(block_in_cluster()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kRows;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kRows;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  const int tiles = p.row_groups * p.token_tiles;

  let_next_begin();
  RegisterLoader<Tile> loader(p, shared, rank);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      start_barrier(loader.full(stage), 1);
      start_barrier(loader.full(stage) + 8, Tile::kSlabs * Tile::kRows);
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (Tile::kRows > 1) {
    cluster_begin();
    cluster_wait();
  }

  if (warpgroup == Tile::kSlabs) {
    if constexpr (Tile::kSlabs == 2) leave_registers<40>();
    if (threadIdx.x == Tile::kSlabs * kWarpgroupThreads) {
      bool is_first = true;
#pragma unroll 1
      for (int tile = cluster; tile < tiles; tile += clusters) {
        loader.begin_tile(place_of_tile<Tile>(p, tile, rank));
        int block = 0;
        if (is_first) {
          // Weights of the first stages do not wait for the kernel before this one.
          const StageCursor<Tile::kStages> start = loader.at();
          const int ahead = min(p.blocks, Tile::kStages);
#pragma unroll 1
          for (int i = 0; i < ahead; ++i, loader.advance()) {
            loader.announce();
            loader.copy_weights(i);
          }
          const StageCursor<Tile::kStages> stop = loader.at();
          loader.at() = start;
          wait_for_previous();
#pragma unroll 1
          for (int i = 0; i < ahead; ++i, loader.advance()) loader.copy_tokens(i);
          loader.at() = stop;
          block = ahead;
          is_first = false;
        }
#pragma unroll 1
        for (; block < p.blocks; ++block, loader.advance()) {
          loader.announce();
          loader.copy_weights(block);
          loader.copy_tokens(block);
        }
      }
    }
  } else {
    if constexpr (Tile::kSlabs == 2) take_registers<232>();
    wait_for_previous();
    RegisterConsumer<Tile> consumer(shared, warpgroup);
#pragma unroll 1
    for (int tile = cluster; tile < tiles; tile += clusters) {
      multiply_register_tile<Tile>(p, tile_memory, shared, warpgroup, place_of_tile<Tile>(p, tile, rank),
                                   consumer);
    }
  }
  if constexpr (Tile::kRows > 1) {
    // Others may still send to this block, or tell it that they have read what it sent.
    __syncwarp();
    cluster_begin();
    cluster_wait();
  }
#else
  __trap();  // the plan keeps launches away
#endif
}

using RegisterFunction = void (*)(RegisterArguments);

template <class Tile, RegisterFunction kFunction>
int resident_register_clusters(const DeviceFacts& device) {
  check_cuda(cudaFuncSetAttribute(kFunction, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kAllBytes),
             "matmul_integers_cuda: shared memory of products in registers");
  int count = 0;
  if constexpr (Tile::kRows == 1) {
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kFunction, Tile::kThreads, Tile::kAllBytes),
        "matmul_integers_cuda: blocks that run at the same time");
    return count * device.processors;
  }
  LaunchSettings settings(dim3(static_cast<unsigned>(1024 * Tile::kRows)), dim3(Tile::kThreads), nullptr,
                          false, Tile::kRows);
  settings.config.dynamicSmemBytes = Tile::kAllBytes;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kFunction, &settings.config),
             "matmul_integers_cuda: clusters that run at the same time");
  return count;
}

template <class Tile, RegisterFunction kFunction>
void launch_register_kernel(const RegisterArguments& arguments, int clusters, cudaStream_t stream) {
  check_cuda(cudaFuncSetAttribute(kFunction, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kAllBytes),
             "matmul_integers_cuda: shared memory of products in registers");
  LaunchSettings settings(dim3(static_cast<unsigned>(clusters * Tile::kRows)), dim3(Tile::kThreads), stream,
                          true, Tile::kRows);
  settings.config.dynamicSmemBytes = Tile::kAllBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kFunction, arguments),
             "matmul_integers_cuda: launch of products in registers");
}

template <int kTokens, int kSlabs, int kCluster, bool kNibbles, int kSteps, bool kPairs>
constexpr RegisterKernel register_kernel_of() {
  using Tile = RegisterTile<kTokens, kSlabs, kCluster, kNibbles, kSteps, kPairs>;
  return {{kNibbles, kSteps, kPairs},
          {kTokens, kSlabs, kCluster, 1},
          launch_register_kernel<Tile, multiply_integer_registers<Tile>>,
          resident_register_clusters<Tile, multiply_integer_registers<Tile>>};
}

}  // namespace quantloom::cuda
