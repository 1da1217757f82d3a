// The sums of a team of thread blocks: parts of a row block's sum, one of each warp that met it, on their way
// to the block of threads that adds them in the order of the warps. Parts meet in the shared memory of a
// cluster.
#pragma once

#include "common/cluster.cuh"
#include "kernels/stream_loop.cuh"

namespace quantloom::cuda {

// kTokens: columns of sums that a walk has room for. One token's parts are sent and counted, those of more
// are written before a barrier of the cluster.
template <class T, int kTokens>
class StreamSums {
 public:
  // `parts`: shared memory of stream_parts_bytes(). By all threads, at the beginning.
  __device__ __forceinline__ StreamSums(const ProductArguments& p, const StreamDeal& deal, float* parts,
                                        uint64_t* delivery)
      : p_(p),
        deal_(deal),
        delivery_(delivery),
        parts_(parts),
        part_size_(stream_part_size(p.m)),
        team_(static_cast<int>(deal.by_blocks.divide(blockIdx.x))),
        rank_(static_cast<int>(blockIdx.x) - team_ * deal.blocks) {
    own_rows_ = (deal.rows_of(team_) - rank_ + deal.blocks - 1) / deal.blocks;
    parts_of_rows_ =
        reinterpret_cast<StreamParts*>(parts + static_cast<int64_t>(own_rows_) * deal.parts * part_size_);
    if (deal.blocks > 1) {
      if (kTokens == 1 && threadIdx.x == 0) Delivery::prepare(delivery);
      cluster_begin();
    }
  }

  __device__ __forceinline__ int first_row() const { return deal_.first_row(team_); }
  __device__ __forceinline__ const StreamRuns& runs() const { return deal_.runs_of(team_); }
  __device__ __forceinline__ int rank() const { return rank_; }

  // By all threads: says what the block expects, and waits for the others to have begun.
  __device__ __forceinline__ void expect() const {
    if (threadIdx.x < 32) {
      const int lane = static_cast<int>(threadIdx.x);
      const bool counted = kTokens == 1 && deal_.blocks > 1;
      __syncwarp();  // the first lane has prepared the delivery
#pragma unroll 1
      for (int row = lane; row < own_rows_; row += 32) {
        const StreamParts met = parts_of(runs(), row * deal_.blocks + rank_, p_.w.column_blocks);
        parts_of_rows_[row] = met;
        if (counted) Delivery::expect(delivery_, met.count * p_.m * fragments::kBlockRows * 4);
      }
      __syncwarp();
      if (counted && lane == 0) Delivery::all_expected(delivery_);
    }
    if (deal_.blocks > 1) cluster_wait();
  }

  // The sums of the team's row block `row` from warp `warp` of the team: sums[tile][i][c] is that of row
  // lane / 4 + 8 * i and token 8 * tile + lane % 4 * 2 + c.
  template <int kTiles, int kColumns>
  __device__ __forceinline__ void leave(int warp, int row, const float (&sums)[kTiles][8][kColumns]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int place = warp & (deal_.parts - 1);
    const auto own_row = static_cast<int>(deal_.by_blocks.divide(static_cast<uint32_t>(row)));
    const int owner = row - own_row * deal_.blocks;
    float* to = parts_ + (own_row * deal_.parts + place) * part_size_;
    if (kTokens > 1 && deal_.blocks > 1) to = cluster_place(to, owner);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int token = 8 * tile + lane % 4 * 2 + c;
        if (token >= p_.m) continue;
        float* const eight = to + token * fragments::kBlockRows + lane / 4 * 8;
        const auto& s = sums[tile];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four = make_float4(s[i][c], s[i + 1][c], s[i + 2][c], s[i + 3][c]);
          if (kTokens == 1 && deal_.blocks > 1) {
            Delivery::send(eight + i, delivery_, owner, four);
          } else {
            *reinterpret_cast<float4*>(eight + i) = four;
          }
        }
      }
    }
  }

  // By all threads, after their last leave(): adds the parts and writes the results.
  __device__ __forceinline__ void finish() const {
    if (deal_.blocks == 1) {
      __syncthreads();
    } else if constexpr (kTokens == 1) {
      Delivery::wait(delivery_);
    } else {
      cluster_arrive();
      cluster_wait();
    }
    constexpr int kSharers = kTokens == 1 ? 8 : kTokens == 8 ? 4 : 1;
    add_parts<T, kSharers>(p_, deal_, first_row(), rank_, own_rows_, parts_, parts_of_rows_);
  }

 private:
  const ProductArguments& p_;
  const StreamDeal& deal_;
  uint64_t* delivery_;
  float* parts_;
  StreamParts* parts_of_rows_;
  int part_size_;
  int team_;
  int rank_;
  int own_rows_;
};

}  // namespace quantloom::cuda
