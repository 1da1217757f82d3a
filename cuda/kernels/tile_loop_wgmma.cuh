// The product loop for many tokens on sm_90a, whose tensor cores read activations from shared memory by
// themselves.
//
// As tile_loop.cuh, but copies are in bulk, and the four warps multiply as one: in each step of 16 columns,
// unit u of each warp's 64 rows is a quarter of the 64 rows of a product. While the products of a step run,
// the warps decode the fragments of the next.
#pragma once

#include "common/bulk_copies.cuh"
#include "common/check.cuh"
#include "common/warpgroup.cuh"
#include "kernels/group_scales.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_pipeline.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/token_order.hpp"

namespace quantloom::cuda {

// Sizes of the ring. A stage holds activations [tokens][128 bytes], then codes [warp][bits][lane][16 bytes];
// each begins at a multiple of 1024 bytes. After the table come two barriers for each stage: its copies have
// arrived; all warps are done with its activations.
template <class Decoder, int kTokens>
struct WarpgroupRing {
  static constexpr int kTokenBytes = kTokens * fragments::kTokenBytes;
  static constexpr int kWarpBytes = Decoder::kBits * 512;
  static constexpr int kStageBytes = kTokenBytes + TilePlan::kWarps * kWarpBytes;
  // Two blocks of threads share the 227 KB of a multiprocessor.
  static constexpr int kRoom = (115712 - 96 - Decoder::kSharedBytes) / kStageBytes;
  static constexpr int kStages = kRoom < 6 ? kRoom : 6;
  // Stages that are filled while one is multiplied, and one is still read by products of the unit before.
  static constexpr int kAhead = kStages - 2;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarriers = kBytes + Decoder::kSharedBytes;
  static constexpr int kAllBytes = kBarriers + 16 * kStages;
  static_assert(kStages >= 3 && kStageBytes % 1024 == 0);
};

// The copies of one warp into the ring, begun by its first lane: its own codes, and the activations of every
// kWarps-th unit.
template <class Ring>
class BulkLoader {
 public:
  // Units [begin, end).
  __device__ __forceinline__ BulkLoader(const ProductArguments& p, const TileWork& work, uint32_t ring,
                                        int64_t begin, int64_t end)
      : p_(p),
        work_(work),
        ring_(ring),
        warp_(static_cast<int>(threadIdx.x) / 32),
        unasked_(end - begin),
        tokens_turn_(warp_),
        at_(work.plan, begin),
        codes_policy_(codes_policy(work.plan.token_tiles == 1)),
        tokens_policy_(codes_policy(false)) {}

  __device__ __forceinline__ uint32_t arrived(int stage) const { return ring_ + Ring::kBarriers + 8 * stage; }
  __device__ __forceinline__ uint32_t done(int stage) const { return arrived(Ring::kStages + stage); }

  __device__ __forceinline__ void start_barriers() const {
#pragma unroll
    for (int stage = 0; stage < 2 * Ring::kStages; ++stage) start_barrier(arrived(stage), TilePlan::kWarps);
    publish_barriers();
  }

  // By the first lane: the codes of the first units; then, once they may be read, their activations.
  __device__ __forceinline__ void ask_first_codes() const {
    TileCursor at = at_;
#pragma unroll
    for (int stage = 0; stage < Ring::kAhead; ++stage) {
      if (stage >= unasked_) break;
      announce_bytes(arrived(stage), (warp_ == stage % TilePlan::kWarps ? Ring::kTokenBytes : 0) +
                                         (has_rows(at) ? Ring::kWarpBytes : 0));
      if (has_rows(at)) copy_codes(codes_of(at), stage);
      at.advance(work_.plan);
    }
  }
  __device__ __forceinline__ void ask_first_tokens() {
#pragma unroll
    for (int stage = 0; stage < Ring::kAhead; ++stage) {
      if (stage >= unasked_) break;
      if (warp_ == stage % TilePlan::kWarps) copy_tokens(tokens_of(at_), stage);
      at_.advance(work_.plan);
    }
    unasked_ -= Ring::kAhead;
    tokens_turn_ = (warp_ + TilePlan::kWarps - Ring::kAhead % TilePlan::kWarps) % TilePlan::kWarps;
    follow();
  }

  // By the first lane: the next unit's copies, into a stage whose products of this warp have ended.
  __device__ __forceinline__ void ask_next() {
    if (--unasked_ < 0) return;
    const bool tokens = tokens_turn_ == 0;
    announce_bytes(arrived(stage_), (tokens ? Ring::kTokenBytes : 0) + code_bytes_);
    if (code_bytes_ > 0) copy_codes(codes_, stage_);
    if (tokens) {
      wait_for_phase(done(stage_), parity_);
      copy_tokens(tokens_, stage_);
    }
    tokens_turn_ = tokens ? TilePlan::kWarps - 1 : tokens_turn_ - 1;
    if (++stage_ == Ring::kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
    if (--left_ > 0) {
      codes_ += Ring::kWarpBytes;
      tokens_ += work_.plan.padded_tokens() * fragments::kTokenBytes;
      return;
    }
    at_.end_tile(work_.plan);
    follow();
  }

 private:
  __device__ __forceinline__ int row_block(const TileCursor& at) const {
    return at.row_group * TilePlan::kWarps + warp_;
  }
  __device__ __forceinline__ bool has_rows(const TileCursor& at) const {
    return row_block(at) < p_.w.row_blocks;
  }
  __device__ __forceinline__ const unsigned char* codes_of(const TileCursor& at) const {
    return reinterpret_cast<const unsigned char*>(p_.w.codes) +
           (static_cast<int64_t>(row_block(at)) * p_.w.column_blocks + at.block) * Ring::kWarpBytes;
  }
  __device__ __forceinline__ const unsigned char* tokens_of(const TileCursor& at) const {
    return reinterpret_cast<const unsigned char*>(work_.tokens) +
           (static_cast<int64_t>(at.block) * work_.plan.padded_tokens() +
            static_cast<int64_t>(at.token_tile) * work_.plan.tokens) *
               fragments::kTokenBytes;
  }
  __device__ __forceinline__ void copy_codes(const unsigned char* from, int stage) const {
    copy_bulk(ring_ + stage * Ring::kStageBytes + Ring::kTokenBytes + warp_ * Ring::kWarpBytes, from,
              Ring::kWarpBytes, arrived(stage), codes_policy_);
  }
  __device__ __forceinline__ void copy_tokens(const unsigned char* from, int stage) const {
    copy_bulk(ring_ + stage * Ring::kStageBytes, from, Ring::kTokenBytes, arrived(stage), tokens_policy_);
  }
  // To the unit at_, which may be past the end.
  __device__ __forceinline__ void follow() {
    left_ = work_.plan.column_blocks - at_.block;
    code_bytes_ = has_rows(at_) ? Ring::kWarpBytes : 0;
    codes_ = codes_of(at_);
    tokens_ = tokens_of(at_);
  }

  const ProductArguments& p_;
  const TileWork& work_;
  uint32_t ring_;
  int warp_;
  int64_t unasked_;
  int tokens_turn_;  // units until the next whose activations this warp copies
  TileCursor at_;    // the next unit; after the first, its tile
  uint64_t codes_policy_;
  uint64_t tokens_policy_;
  int stage_ = Ring::kAhead;  // the stage to fill next
  int parity_ = 1;            // of the phase in which its activations were last read
  int left_ = 0;              // units of the tile, from the next on
  int code_bytes_ = 0;
  const unsigned char* codes_ = nullptr;  // the next unit's
  const unsigned char* tokens_ = nullptr;
};

template <class Decoder, class T, int kTokens, bool kZeros>
class WarpgroupProduct {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr int kTiles = kTokens / 8;

  __device__ __forceinline__ WarpgroupProduct(const ProductArguments& p, const Decoder& decoder)
      : p_(p), decoder_(decoder) {}

  __device__ __forceinline__ void begin(int row_block, int begin, int end) {
    scales_.begin(p_.w, row_block, begin, end, static_cast<int>(threadIdx.x) % 32);
    add_ = 0;
  }

  // `stage`: where a stage lies in shared memory; `codes`: this lane's codes in it. The products of the last
  // step still run when this returns; they read the stage until the first step of the next call is over, when
  // that calls once_over().
  template <class OnceOver>
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t codes, const OnceOver& once_over) {
    uint4 pieces[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) pieces[i] = load_shared(codes + i * 512);
    const uint64_t tokens = token_descriptor(stage);
    multiply_step<0>(tokens, pieces);
    once_over();
    multiply_step<1>(tokens, pieces);
    multiply_step<2>(tokens, pieces);
    multiply_step<3>(tokens, pieces);
  }

  // Waits for all products.
  __device__ __forceinline__ void finish() {
    wait_for_products<0>();
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          hold(sums_[unit][tile][c]);
          sums_[unit][tile][c] *= scales_.factor(2 * unit + c / 2);
        }
      }
    }
  }

  __device__ __forceinline__ const float (&sums() const)[fragments::kUnits][kTiles][4] {
    return sums_;
  }

 private:
  template <int kStep>
  __device__ __forceinline__ void multiply_step(uint64_t tokens, const uint4 (&pieces)[kBits]) {
    // Two sets of fragments: one is decoded while products read the other.
    uint32_t(&a)[fragments::kUnits][4] = a_[kStep % 2];
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      uint32_t words[kBits];
      words_of_unit<kBits>(pieces, unit, words);
      decoder_.template fragment<T, kStep>(words, a[unit]);
      scales_.apply(unit, a[unit]);
    }
    open_products();
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      multiply_warpgroup<T, kTiles>(sums_[unit], a[unit], tokens + kStep * (32 >> 4), kStep == 0 ? add_ : 1);
    }
    close_products();
    if (kStep == 0) add_ = 1;
    scales_.advance(p_.w);
    wait_for_products<1>();
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  GroupScales<Decoder, T, kZeros> scales_;
  uint32_t a_[2][fragments::kUnits][4];
  int add_ = 0;  // 0: the first products of a tile, which replace the sums of the last one
  float sums_[fragments::kUnits][kTiles][4] = {};
};

template <class Decoder, class T, int kTokens, bool kZeros>
__global__ void __launch_bounds__(kTileThreads, 2)
    multiply_tiles_wgmma(const __grid_constant__ ProductArguments p, const __grid_constant__ TileWork work) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using Ring = WarpgroupRing<Decoder, kTokens>;
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t ring = shared_address(tile_memory);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t begin = work.plan.begin(blockIdx.x);
  const int64_t end = work.plan.begin(static_cast<int64_t>(blockIdx.x) + 1);

  let_next_begin();
  BulkLoader<Ring> loader(p, work, ring, begin, end);
  if (threadIdx.x == 0) loader.start_barriers();
  __syncthreads();
  if (lane == 0) loader.ask_first_codes();
  Decoder decoder;
  decoder.template prepare<T>(p.w.table, p.w.table_entries, tile_memory + Ring::kBytes);
  wait_for_previous();
  if (lane == 0) loader.ask_first_tokens();
  if constexpr (Decoder::kSharedBytes > 0) __syncthreads();

  WarpgroupProduct<Decoder, T, kTokens, kZeros> product(p, decoder);
  int stage = 0;
  int parity = 0;  // of the stage's phase
  int before = -1;
  for (int64_t unit = begin; unit < end;) {
    const TileCursor at(work.plan, unit);
    const int stop =
        static_cast<int>(min(static_cast<int64_t>(work.plan.column_blocks), at.block + end - unit));
    // Warps without rows multiply those of the last block again: the products need all four.
    const int row_block = min(at.row_group * TilePlan::kWarps + warp, p.w.row_blocks - 1);
    product.begin(row_block, at.block, stop);
    for (int block = at.block; block < stop; ++block, ++unit) {
      wait_for_phase(loader.arrived(stage), parity);
      const uint32_t place = ring + stage * Ring::kStageBytes;
      product.multiply(place, place + Ring::kTokenBytes + warp * Ring::kWarpBytes + lane * 16, [&] {
        if (lane == 0) {
          if (before >= 0) arrive(loader.done(before));
          loader.ask_next();
        }
        __syncwarp();  // the products take whole warps
      });
      before = stage;
      if (++stage == Ring::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    product.finish();
    const int64_t tile = static_cast<int64_t>(at.row_group) * work.plan.token_tiles + at.token_tile;
    const bool complete = at.block == 0 && stop == work.plan.column_blocks;
    finish_tile<T, kTokens / 8>(p, work, blockIdx.x, tile, complete, warp, lane, product.sums());
  }
#else
  __trap();  // runs_wgmma() keeps launches away
#endif
}

template <class Decoder, class T, int kTokens>
void launch_multiply_wgmma(const ProductLaunch& launch, const TileWork& work) {
  constexpr int kShared = WarpgroupRing<Decoder, kTokens>::kAllBytes;
  auto* kernel = multiply_tiles_wgmma<Decoder, T, kTokens, false>;
  if constexpr (kHasZeros<Decoder>) {
    if (launch.arguments.w.zeros != nullptr) kernel = multiply_tiles_wgmma<Decoder, T, kTokens, true>;
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
             "matmul_cuda: shared memory of multiply_tiles_wgmma");
  LaunchSettings settings(dim3(static_cast<unsigned>(work.plan.grid)), dim3(kTileThreads), launch.stream,
                          true, 1);
  settings.config.dynamicSmemBytes = kShared;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, launch.arguments, work),
             "matmul_cuda: launch of multiply_tiles_wgmma");
}

template <class Decoder>
void launch_tiles_wgmma(const ProductLaunch& launch, void* workspace) {
  if (launch.arguments.m == 0 || launch.arguments.w.n == 0) return;
  if (launch.arguments.w.column_blocks == 0) return launch_bias_alone(launch);
  const TileWork work = tile_work(launch, workspace);
  launch_arrange(launch, work);
  const bool small = work.plan.tokens == 32;
  if (launch.dtype == DType::f16) {
    small ? launch_multiply_wgmma<Decoder, __half, 32>(launch, work)
          : launch_multiply_wgmma<Decoder, __half, 64>(launch, work);
  } else {
    small ? launch_multiply_wgmma<Decoder, __nv_bfloat16, 32>(launch, work)
          : launch_multiply_wgmma<Decoder, __nv_bfloat16, 64>(launch, work);
  }
  if (work.plan.has_partials()) launch_add_parts(launch, work);
}

}  // namespace quantloom::cuda
