// Products of integers on sm_90a: y = x W^T for codes of one byte, both in integer order
// (src/activations/integer_order.hpp).
//
// A tile of 128 outputs x kTokens tokens belongs to a block of threads: one warp fetches blocks of 128
// columns by bulk copies into a ring of stages, two warpgroups multiply them, 64 outputs each (wgmma, int32
// sums, which are exact). The kRows blocks of a cluster have the same tokens: each fetches its share of them
// and sends it to all. Or they have kTiles tiles of the same outputs, whose weights they share likewise. Or
// kParts blocks share a tile: each takes a part of the columns, and sends its sums to the blocks that finish
// them.
//
// Outliers are multiplied after the integers, as float16 onto the scaled float32 sums, in the same order
// whatever the sizes of tiles: a token's result does not depend on the others.
#pragma once

#include "common/check.cuh"
#include "common/shared_products.cuh"
#include "kernels/integer_finish.cuh"
#include "kernels/integer_tile.cuh"
#include "kernels/overlap.cuh"

namespace quantloom::cuda {

// What one warpgroup does with the stages.
template <class Tile>
class IntegerConsumer {
 public:
  __device__ __forceinline__ IntegerConsumer(uint32_t shared, int warpgroup)
      : shared_(shared), warpgroup_(warpgroup) {}

  // Sums of `blocks` blocks of columns: of all tokens of a tile, or of half of them.
  template <int kTokens>
  __device__ __forceinline__ void multiply(int (&sum)[kTokens / 2], int blocks) {
    multiply<kTokens, 0>(sum, blocks, [](int /*piece*/) {});
  }
  // The same, with pieces of other work while the first products run.
  template <int kTokens, int kPieces, class Work>
  __device__ __forceinline__ void multiply(int (&sum)[kTokens / 2], int blocks, const Work& work) {
    int before = -1;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece < blocks) begin_block<kTokens>(sum, piece > 0);
      work(piece);
      if (piece < blocks) end_block(before);
    }
#pragma unroll 1
    for (int block = kPieces; block < blocks; ++block) {
      begin_block<kTokens>(sum, block > 0);
      end_block(before);
    }
    wait_for_products<0>();
#pragma unroll
    for (int& value : sum) hold(value);
    if (before >= 0) leave(before);
  }

  // Adds `blocks` blocks of 64 outliers, of kTokens tokens from `first` on.
  template <int kTokens>
  __device__ __forceinline__ void add_outliers(int (&sum)[kTokens / 2], int blocks, int first) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_for_phase(full(at_.stage), at_.parity);
      const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
      const uint64_t w = token_descriptor(stage + warpgroup_ * integers::kSlabBytes);
      const uint64_t x = token_descriptor(stage + Tile::kWeightBytes + first * integers::kBlockBytes);
      open_products();
#pragma unroll
      for (int step = 0; step < 4; ++step) add_halves<0, kTokens>(sum, w + 2 * step, x + 2 * step);
      close_products();
      wait_for_products<0>();
#pragma unroll
      for (int& value : sum) hold(value);
      leave(at_.stage);
      at_.advance();
    }
  }

 private:
  // For the tokens from kFirst on, as many at once as an instruction takes.
  template <int kFirst, int kTokens>
  static __device__ __forceinline__ void add_halves(int (&sum)[kTokens / 2], uint64_t w, uint64_t x) {
    if constexpr (kFirst < kTokens) {
      constexpr int kLeft = kTokens - kFirst;
      constexpr int kPart = kLeft == 48 ? 32 : kLeft;
      multiply_halves<kPart>(reinterpret_cast<int(&)[kPart / 2]>(sum[kFirst / 2]), w,
                             x + kFirst * (integers::kBlockBytes / 16), 1);
      add_halves<kFirst + kPart, kTokens>(sum, w, x);
    }
  }

  template <int kTokens>
  __device__ __forceinline__ void begin_block(int (&sum)[kTokens / 2], bool add) {
    wait_for_phase(full(at_.stage), at_.parity);
    const uint32_t stage = shared_ + at_.stage * Tile::kStageBytes;
    const uint64_t w = token_descriptor(stage + warpgroup_ * integers::kSlabBytes);
    const uint64_t x = token_descriptor(stage + Tile::kWeightBytes);
    open_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply_integers<kTokens>(sum, w + 2 * step, x + 2 * step, add || step > 0 ? 1 : 0);
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
    if constexpr (Tile::kSharers == 1) {
      if (thread == 0) arrive(barrier);
    } else {
      if (thread < Tile::kSharers) arrive_at(barrier, thread);
    }
  }

  uint32_t shared_;
  int warpgroup_;
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

  // By one thread of block `rank`, before the blocks of the cluster meet.
  __device__ __forceinline__ void prepare(int rank) const {
    const int own = min(Tile::kOwnTokens, Tile::kTokens - rank * Tile::kOwnTokens);
    Delivery::prepare(barrier_);
    Delivery::expect(barrier_, max(own, 0) * (Tile::kParts * kTileRows * 4));
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
          place.token + first,
          place.token + place.tokens};
}

// One tile, or, of class HalfTile<Tile>, half of one.
template <class Tile, class Part>
__device__ __forceinline__ void multiply_tile(const IntegerArguments& p, unsigned char* memory,
                                              uint32_t shared, int warpgroup, const TilePlace& place,
                                              IntegerConsumer<Tile>& consumer) {
  const bool has_rows = place.row_tile < p.row_tiles;
  IntegerFinish<Part> finish = finish_of<Part>(p, memory, shared, warpgroup, place, 0);
  if (has_rows) finish.fetch_terms();
  int sum[Part::kTokens / 2];
  consumer.template multiply<Part::kTokens>(sum, p.blocks);
  if (has_rows) finish.begin(sum);
  if constexpr (Tile::kOutliers) {
    if (has_rows) finish.scale(sum);
    consumer.template add_outliers<Part::kTokens>(sum, p.outlier_blocks, 0);
  }
  if (has_rows) finish.write(sum);
}

// The tiles of a cluster, each finished before the next begins.
template <class Tile>
__device__ __forceinline__ void multiply_whole(const IntegerArguments& p, unsigned char* memory,
                                               uint32_t shared, int rank, int warpgroup,
                                               IntegerConsumer<Tile>& consumer) {
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < p.tiles; tile += clusters) {
    const TilePlace place = place_of_tile<Tile>(p, tile, rank);
    if constexpr (Tile::kHalves) {
      if (place.tokens < Tile::kTokens) {
        multiply_tile<Tile, HalfTile<Tile>>(p, memory, shared, warpgroup, place, consumer);
        continue;
      }
    }
    multiply_tile<Tile, Tile>(p, memory, shared, warpgroup, place, consumer);
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
  Finish finish = finish_of<Tile>(p, memory, shared, warpgroup, {}, 0);
  bool pending = false;  // a tile is to be finished
  int last[Tile::kTokens / 2];
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < p.tiles; tile += clusters) {
    const TilePlace place = place_of_tile<Tile>(p, tile, rank);
    int sum[Tile::kTokens / 2];
    consumer.template multiply<Tile::kTokens, Finish::kPieces>(sum, p.blocks, [&](int piece) {
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
      consumer.template add_outliers<Tile::kTokens>(sum, p.outlier_blocks, 0);
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
  consumer.template multiply<Tile::kTokens>(sum, blocks);
  const SumExchange<Tile> exchange(memory, warpgroup);
  exchange.send(sum, rank);
  if (!is_owner) return;
  int own[Tile::kOwnTokens / 2];
  exchange.receive(own);
  finish.begin(own);
  if constexpr (Tile::kOutliers) {
    finish.scale(own);
    consumer.template add_outliers<Tile::kOwnTokens>(own, p.outlier_blocks, first);
  }
  finish.write(own);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kMostThreads, Tile::kBlocks)
    multiply_integer_tiles(const __grid_constant__ IntegerArguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tile_memory[];
  const uint32_t shared = shared_address(tile_memory);
  const int rank = Tile::kCluster > 1 ? static_cast<int>(block_in_cluster()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  // With parts there is one tile to a cluster.
  const int begin = Tile::kParts > 1 ? static_cast<int>(int64_t{p.blocks} * rank / Tile::kParts) : 0;
  const int end =
      Tile::kParts > 1 ? static_cast<int>(int64_t{p.blocks} * (rank + 1) / Tile::kParts) : p.blocks;
  const bool is_owner = Tile::kParts == 1 || rank * Tile::kOwnTokens < Tile::kTokens;
  const int outlier_blocks = Tile::kOutliers && is_owner ? p.outlier_blocks : 0;

  let_next_begin();
  IntegerLoader<Tile> loader(p, shared, rank);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      start_barrier(loader.full(stage), 1);
      start_barrier(loader.empty(stage), 2 * Tile::kSharers);
    }
    publish_barriers();
    if constexpr (Tile::kParts > 1) SumExchange<Tile>(tile_memory, 0).prepare(rank);
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) {
    cluster_begin();
    cluster_wait();
  }

  if (warpgroup == 2) {
    if constexpr (Tile::kMovesRegisters) leave_registers<Tile::kFewRegisters>();
    if (threadIdx.x == 2 * kWarpgroupThreads) {
      bool is_first = true;
      for (int tile = cluster; tile < p.tiles; tile += clusters) {
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
    if constexpr (Tile::kMovesRegisters) take_registers<Tile::kManyRegisters>();
    wait_for_previous();
    IntegerConsumer<Tile> consumer(shared, warpgroup);
    if constexpr (Tile::kDeferred) {
      multiply_deferred<Tile>(p, tile_memory, shared, rank, warpgroup, consumer);
    } else if constexpr (Tile::kParts > 1) {
      multiply_part<Tile>(p, tile_memory, shared, rank, warpgroup, consumer, end - begin);
    } else {
      multiply_whole<Tile>(p, tile_memory, shared, rank, warpgroup, consumer);
    }
  }
  if constexpr (Tile::kSharers > 1) {
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
