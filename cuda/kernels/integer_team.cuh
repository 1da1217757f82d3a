// Products of few tokens on sm_90a with weights in register order: as integer_registers.cuh, but kTeam
// warpgroups share a tile of 64 outputs, each with every kTeam-th block of columns, as the products of so few
// tokens take longer for one block than its way from memory.
//
// With groups, the exact sums of the team's blocks meet in shared memory, where each warpgroup adds those of
// its share of the tile, scaled, in the order of columns: the same additions as in all tiles.
#pragma once

#include "kernels/integer_registers.cuh"

namespace quantloom::cuda {

template <int kTokens_, int kTeam_, bool kNibbles_, int kSteps_, bool kPairs_>
struct TeamTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kTeam = kTeam_;
  static constexpr int kSlabs = 1;
  static constexpr int kRows = 1;
  static constexpr int kParts = 1;
  static constexpr int kTiles = 1;
  static constexpr bool kHalves = false;
  static constexpr bool kNibbles = kNibbles_;
  static constexpr int kSteps = kSteps_;
  static constexpr bool kPairs = kPairs_;
  static constexpr bool kGrouped = kSteps > 0;
  static constexpr bool kTokenSums = kPairs && !kNibbles;
  // The team, and a warp of copies for each of its warpgroups.
  static constexpr int kThreads = kTeam * (kWarpgroupThreads + 32);
  static constexpr int kBlocks = kTeam == 2 && kTokens == 16 ? 2 : 1;
  static constexpr int kUnit = kTokens;
  static constexpr int kUnits = kGrouped ? kSteps : 1;
  static constexpr bool kAhead = true;

  static constexpr int kRecordBytes = registers::record_bytes(kNibbles, kSteps, kPairs);
  static constexpr int kTokenBytes = kTokens * integers::kBlockBytes;
  static constexpr int kSumBytes = kTokenSums ? kSteps * kTokens * 4 : 0;
  static constexpr int kSums = kTokenBytes + kRecordBytes;
  static constexpr int kStageBytes = (kSums + kSumBytes + 1023) / 1024 * 1024;

  static constexpr int kOwnTokens = kTokens;
  static constexpr bool kOutliers = kGrouped;
  static constexpr bool kDeferred = false;
  static constexpr int kChunk = kTokens < 64 ? kTokens : 64;
  static constexpr int kResultBytes = kChunk * integers::kSlabRows * 2;
  static constexpr int kTermBytes = 12 * kTokens;

  // What the team exchanges: pairs of a thread's sums, of each warpgroup and step, and scales of the rows.
  // With groups twice, as one is read while the other is written.
  static constexpr int kPairCount = kTokens / 4;
  static constexpr int kSumPart = kPairCount * kWarpgroupThreads * 8;
  static constexpr int kScales = kTeam * kUnits * kSumPart;
  static constexpr int kTurnBytes = kGrouped ? kScales + kTeam * kUnits * 256 : (kTeam - 1) * kSumPart;
  static constexpr int kExchangeBytes = (kGrouped ? 2 : 1) * kTurnBytes;

  static constexpr int kLimit = kBlocks == 2 ? 115712 : 232448;
  static constexpr int kFixed = kResultBytes + kTermBytes + kExchangeBytes + 16 * 24;
  static constexpr int kFitting = (kLimit - kFixed) / kStageBytes / kTeam * kTeam;
  static constexpr int kStages = kFitting < 24 ? kFitting : 24;
  static constexpr int kResults = kStages * kStageBytes;
  static constexpr int kTerms = kResults + kResultBytes;
  static constexpr int kExchange = kTerms + kTermBytes;
  static constexpr int kBarriers = kExchange + kExchangeBytes;
  static constexpr int kAllBytes = kBarriers + 16 * kStages;
  static_assert(kStages >= 2 * kTeam && kAllBytes <= kLimit && kPairCount % kTeam == 0);
};

template <class Tile>
class TeamConsumer : private RegisterConsumer<Tile> {
 public:
  using Base = RegisterConsumer<Tile>;
  // Of an accumulated tile, with groups: this warpgroup's share.
  static constexpr int kOwnPairs = Tile::kPairCount / Tile::kTeam;

  __device__ __forceinline__ TeamConsumer(unsigned char* memory, uint32_t shared, int member)
      : Base(shared, 0), memory_(memory), member_(member) {
    this->at_.stage = member;
  }

  // The float32 sums of a tile with groups, in the first warpgroup.
  __device__ __forceinline__ void multiply(float (&sum)[Tile::kTokens / 2], int blocks) {
    float own[kOwnPairs][2] = {};
    const int rounds = (blocks + Tile::kTeam - 1) / Tile::kTeam;
    begin_block<0>(0, blocks);
    int round = 1;
#pragma unroll 1
    for (; round + 1 < rounds; round += 2) {
      begin_block<1>(round, blocks);
      end_block<0, 1>(own, round - 1, blocks);
      begin_block<0>(round + 1, blocks);
      end_block<1, 1>(own, round, blocks);
    }
    if (round < rounds) {
      begin_block<1>(round, blocks);
      end_block<0, 1>(own, round - 1, blocks);
      end_block<1, 0>(own, round, blocks);
      asm volatile("// after an even number of rounds" ::: "memory");
    } else {
      end_block<0, 0>(own, round - 1, blocks);
      asm volatile("// after an odd number of rounds" ::: "memory");
    }
    unsigned char* const to = turn();
#pragma unroll
    for (int i = 0; i < kOwnPairs; ++i) {
      *pair_at(to, 0, member_ * kOwnPairs + i) = {own[i][0], own[i][1]};
    }
    team_barrier();
    turn_ ^= 1;
    if (member_ > 0) return;
#pragma unroll
    for (int i = 0; i < Tile::kPairCount; ++i) {
      const float2 pair = *pair_at(to, 0, i);
      sum[2 * i] = pair.x;
      sum[2 * i + 1] = pair.y;
    }
  }

  // The int32 sums of a tile of rows with one scale, in the first warpgroup.
  __device__ __forceinline__ void multiply(int (&sum)[Tile::kTokens / 2], int blocks) {
    const int own = (blocks - member_ + Tile::kTeam - 1) / Tile::kTeam;
    int before = -1;
    int block = 0;
#pragma unroll 1
    for (; block + 1 < own; block += 2) {
      add_block<0>(sum, before, block > 0);
      add_block<1>(sum, before, true);
    }
    if (block < own) add_block<0>(sum, before, block > 0);
    wait_for_products<0>();
#pragma unroll
    for (int& value : sum) {
      hold(value);
      if (own <= 0) value = 0;
    }
    leave(before);
    team_barrier();  // the sums of the tile before have been read
    unsigned char* const exchange = memory_ + Tile::kExchange;
    if (member_ > 0) {
#pragma unroll
      for (int i = 0; i < Tile::kPairCount; ++i) {
        *pair_at(exchange, member_ - 1, i) = {__int_as_float(sum[2 * i]), __int_as_float(sum[2 * i + 1])};
      }
    }
    team_barrier();
    if (member_ > 0) return;
#pragma unroll
    for (int part = 0; part < Tile::kTeam - 1; ++part) {
#pragma unroll
      for (int i = 0; i < Tile::kPairCount; ++i) {
        const float2 pair = *pair_at(exchange, part, i);
        sum[2 * i] += __float_as_int(pair.x);
        sum[2 * i + 1] += __float_as_int(pair.y);
      }
    }
  }

 private:
  static constexpr int kSteps = Tile::kUnits;
  static constexpr int kProducts = 4 / kSteps;

  static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  }
  static __device__ __forceinline__ void team_barrier() {
    asm volatile("bar.sync 2, %0;" ::"n"(Tile::kTeam * kWarpgroupThreads) : "memory");
  }
  __device__ __forceinline__ unsigned char* turn() const {
    return memory_ + Tile::kExchange + turn_ * Tile::kTurnBytes;
  }
  static __device__ __forceinline__ float2* pair_at(unsigned char* exchange, int part, int pair) {
    return reinterpret_cast<float2*>(exchange + part * Tile::kSumPart) + pair * kWarpgroupThreads + thread();
  }
  __device__ __forceinline__ void leave(int stage) const {
    if (stage >= 0 && thread() == 0) arrive(this->full(stage) + 8);
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int i = 0; i < Tile::kTeam; ++i) this->at_.advance();
  }

  template <int kSlot>
  __device__ __forceinline__ void add_block(int (&sum)[Tile::kTokens / 2], int& before, bool add) {
    wait_for_phase(this->full(this->at_.stage), this->at_.parity);
    const uint32_t stage = this->shared_ + this->at_.stage * Tile::kStageBytes;
    this->template load<kSlot>(stage + Tile::kTokenBytes);
    const uint64_t x = token_descriptor(stage);
    open_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply_registers<Tile::kTokens>(sum, this->weights_[kSlot][step], x + 2 * step,
                                        add || step > 0 ? 1 : 0);
    }
    close_products();
    wait_for_products<1>();
    leave(before);
    before = this->at_.stage;
    advance();
  }

  // A warpgroup without a block in this round multiplies what lies there; nobody adds it.
  template <int kSlot>
  __device__ __forceinline__ void begin_block(int round, int blocks) {
    const bool has_block = round * Tile::kTeam + member_ < blocks;
    if (has_block) wait_for_phase(this->full(this->at_.stage), this->at_.parity);
    const uint32_t stage = this->shared_ + this->at_.stage * Tile::kStageBytes;
    this->template load<kSlot>(stage + Tile::kTokenBytes);
    const uint64_t x = token_descriptor(stage);
    open_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_registers<Tile::kTokens>(runs_[kSlot][i / kProducts], this->weights_[kSlot][i], x + 2 * i,
                                        i % kProducts > 0 ? 1 : 0);
    }
    close_products();
    stage_[kSlot] = this->at_.stage;
    if (has_block) advance();
  }
  // Exchanges the sums of a round, and adds them.
  template <int kSlot, int kOpen>
  __device__ __forceinline__ void end_block(float (&own)[kOwnPairs][2], int round, int blocks) {
    wait_for_products<kOpen>();
#pragma unroll
    for (int i = 0; i < kSteps * Tile::kTokens / 2; ++i) {
      hold(runs_[kSlot][i / (Tile::kTokens / 2)][i % (Tile::kTokens / 2)]);
    }
    unsigned char* const to = turn();
    const int row = thread() / 32 * 16 + thread() % 32 / 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto& terms = this->terms_[kSlot][step];
#pragma unroll
      for (int i = 0; i < Tile::kPairCount; ++i) {
        float2 pair = {static_cast<float>(runs_[kSlot][step][2 * i]),
                       static_cast<float>(runs_[kSlot][step][2 * i + 1])};
        if constexpr (Tile::kTokenSums) {
          const int token = 8 * (i / 2) + thread() % 4 * 2;
          const uint2 codes = load_pair(this->shared_ + stage_[kSlot] * Tile::kStageBytes + Tile::kSums +
                                        (step * Tile::kTokens + token) * 4);
          const float zero = __uint_as_float(terms[i % 2].y);
          pair.x = __fmaf_rn(zero, __uint_as_float(codes.x), pair.x);
          pair.y = __fmaf_rn(zero, __uint_as_float(codes.y), pair.y);
        }
        *pair_at(to, member_ * kSteps + step, i) = pair;
      }
      if (thread() % 4 < 2) {
        const uint32_t scale = thread() % 4 == 0 ? terms[0].x : terms[1].x;
        scales_at(to, member_ * kSteps + step)[row + thread() % 4 * 8] = __uint_as_float(scale);
      }
    }
    if (round * Tile::kTeam + member_ < blocks) leave(stage_[kSlot]);
    team_barrier();
    // All are loaded before they are added one after the other.
    constexpr int kRuns = Tile::kTeam * kSteps;
    float2 pairs[kRuns][kOwnPairs];
    float scales[kRuns][2];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kOwnPairs; ++i) pairs[run][i] = *pair_at(to, run, member_ * kOwnPairs + i);
      // Of rows g, and g + 8 where the pair's number is odd.
      const float* const of_rows = scales_at(to, run) + row;
      if constexpr (kOwnPairs == 1) {
        scales[run][0] = of_rows[member_ % 2 * 8];
      } else {
        scales[run][0] = of_rows[0];
        scales[run][1] = of_rows[8];
      }
    }
    const int there = min(kRuns, (blocks - round * Tile::kTeam) * kSteps);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (run >= there) break;
#pragma unroll
      for (int i = 0; i < kOwnPairs; ++i) {
        own[i][0] = __fmaf_rn(pairs[run][i].x, scales[run][i % 2], own[i][0]);
        own[i][1] = __fmaf_rn(pairs[run][i].y, scales[run][i % 2], own[i][1]);
      }
    }
    turn_ ^= 1;
  }
  static __device__ __forceinline__ float* scales_at(unsigned char* exchange, int part) {
    return reinterpret_cast<float*>(exchange + Tile::kScales) + 64 * part;
  }

  unsigned char* memory_;
  int member_;
  int turn_ = 0;
  int stage_[2] = {};
  int runs_[2][kSteps][Tile::kTokens / 2];
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    multiply_integer_team(const __grid_constant__ RegisterArguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t shared = shared_address(tile_memory);
  const int tiles = p.row_groups * p.token_tiles;

  let_next_begin();
  RegisterLoader<Tile> loader(p, shared, 0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      start_barrier(loader.full(stage), 1);
      start_barrier(loader.full(stage) + 8, 1);
    }
    publish_barriers();
  }
  __syncthreads();

  constexpr int kConsumers = Tile::kTeam * kWarpgroupThreads;
  if (threadIdx.x >= kConsumers) {
    const int member = (static_cast<int>(threadIdx.x) - kConsumers) / 32;
    if (threadIdx.x % 32 == 0) {
      loader.at().stage = member;
      const auto advance = [&] {
#pragma unroll
        for (int i = 0; i < Tile::kTeam; ++i) loader.advance();
      };
      bool is_first = true;
#pragma unroll 1
      for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        loader.begin_tile(place_of_tile<Tile>(p, tile, 0));
        int block = member;
        if (is_first) {
          // Weights of the first stages do not wait for the kernel before this one.
          const StageCursor<Tile::kStages> start = loader.at();
          const int ahead = min(p.blocks, Tile::kStages);
#pragma unroll 1
          for (int i = member; i < ahead; i += Tile::kTeam, advance()) {
            loader.announce();
            loader.copy_weights(i);
          }
          const StageCursor<Tile::kStages> stop = loader.at();
          loader.at() = start;
          wait_for_previous();
#pragma unroll 1
          for (int i = member; i < ahead; i += Tile::kTeam, advance()) loader.copy_tokens(i);
          loader.at() = stop;
          block = member < ahead ? (ahead - member + Tile::kTeam - 1) / Tile::kTeam * Tile::kTeam + member
                                 : member;
          is_first = false;
        }
#pragma unroll 1
        for (; block < p.blocks; block += Tile::kTeam, advance()) {
          loader.announce();
          loader.copy_weights(block);
          loader.copy_tokens(block);
        }
      }
    }
    return;
  }
  wait_for_previous();
  const int member = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  TeamConsumer<Tile> consumer(tile_memory, shared, member);
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const TilePlace place = place_of_tile<Tile>(p, tile, 0);
    RegisterFinish<Tile> finish(p, tile_memory, shared, 0, int64_t{place.row_tile} * integers::kSlabRows,
                                place.token, place.token + Tile::kTokens);
    if (member == 0) finish.fetch_terms();
    typename RegisterConsumer<Tile>::Sum sum[Tile::kTokens / 2];
    consumer.multiply(sum, p.blocks);
    if (member == 0) finish_register_tile<Tile>(finish, sum);
  }
#else
  __trap();  // the plan keeps launches away
#endif
}

template <int kTokens, int kTeam, bool kNibbles, int kSteps, bool kPairs>
constexpr RegisterKernel team_kernel_of() {
  using Tile = TeamTile<kTokens, kTeam, kNibbles, kSteps, kPairs>;
  return {{kNibbles, kSteps, kPairs},
          {kTokens, 1, 1, kTeam},
          launch_register_kernel<Tile, multiply_integer_team<Tile>>,
          resident_register_clusters<Tile, multiply_integer_team<Tile>>};
}

}  // namespace quantloom::cuda
