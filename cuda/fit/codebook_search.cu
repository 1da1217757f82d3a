// Nearest centroids by scores from tensor cores: the least score and its place are kept in registers, a
// matrix of distances never exists. Thread and row keep the least score of each block of 16 centroids; the
// best block is compared in float64, and rows where another block comes near it are searched once more, all
// in float64.
#include <algorithm>
#include <cmath>

#include "common/load_float.cuh"
#include "fit/codebook_search.hpp"
#include "fit/row_distance.cuh"
#include "fit/score_slots.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileEntries = 8;
constexpr int kBlockTiles = 8;  // 64 entries, 16 for each of the four threads that share a row

template <int kSteps>
struct Shape {
  static constexpr int kRowTiles = kSteps <= 2 ? 4 : 2;      // of 16 rows, for each warp
  static constexpr int kChunkTiles = kSteps <= 2 ? 32 : 16;  // of entries in shared memory at once
  static constexpr int kChunkWords = kChunkTiles * kSteps * 32;
  static constexpr int64_t kRows = int64_t{kWarps} * 16 * kRowTiles;  // of a thread block
};

struct SearchTask {
  CudaMatrix x;
  const float* centroids;  // [count, d]
  int64_t count;
  const uint2* table;
  int64_t tiles;
  float factor;
  int32_t* codes;
  int32_t* open;
  int32_t* opened;
};

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  const __half2 pair = __halves2half2(__float2half_rn(low), __float2half_rn(high));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Thread (tile, step, lane) writes the two registers of mma.m16n8k16's second operand.
__global__ void __launch_bounds__(kThreads)
    pack_entries(const float* centroids, int64_t count, int d, int steps, int64_t tiles, float factor,
                 uint2* table) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= tiles * steps * 32) return;
  const int lane = static_cast<int>(at % 32);
  const int step = static_cast<int>(at / 32 % steps);
  const int64_t entry = at / 32 / steps * kTileEntries + lane / 4;
  const auto slot = [&](int offset) {
    const int place = step * kSlotsPerStep + lane % 4 * 2 + offset;
    if (entry >= count) return place >= 3 * d && place < 3 * d + 3 ? kPadding : 0.0F;
    return entry_slot(d, place, [&](int j) { return centroids[entry * d + j] * factor; });
  };
  table[at] = make_uint2(half_pair(slot(0), slot(1)), half_pair(slot(8), slot(9)));
}

// sum = a b, or sum += a b.
template <bool kFirst>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (kFirst) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(0.0F));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
}

// 16 bytes from global to shared memory, in the background.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from)
      : "memory");
}

template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Codes and distances in the order that the definition takes them in: the lower distance, then the lower
// code.
struct Candidate {
  double distance;
  int32_t code;

  __device__ __forceinline__ void take(double other_distance, int32_t other_code) {
    if (other_distance < distance || (other_distance == distance && other_code < code)) {
      distance = other_distance;
      code = other_code;
    }
  }
  // The best of the threads whose lanes differ in the bits below `lanes`.
  __device__ __forceinline__ void merge(int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) {
      const double other_distance = __shfl_xor_sync(0xffffffffU, distance, mask);
      const int32_t other_code = __shfl_xor_sync(0xffffffffU, code, mask);
      take(other_distance, other_code);
    }
  }
};

template <int kSteps>
__global__ void __launch_bounds__(kThreads) search_kernel(SearchTask task) {
  using S = Shape<kSteps>;
  __shared__ __align__(16) uint2 chunks[2][S::kChunkWords];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int quad_lane = lane % 4;
  const int d = static_cast<int>(task.x.cols);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * S::kRows +
                            static_cast<int64_t>(threadIdx.x / 32) * 16 * S::kRowTiles;
  // Of rows past the end, the last one is searched again, and not written.
  const auto row_at = [&](int tile, int half) {
    return min(first_row + tile * 16 + half * 8 + lane / 4, task.x.rows - 1);
  };

  uint32_t a[S::kRowTiles][kSteps][4];
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t offset = row_at(r, i % 2) * task.x.stride;
        const int slot = step * kSlotsPerStep + quad_lane * 2 + i / 2 * 8;
        const auto value = [&](int j) {
          return load_float(task.x.data, task.x.dtype, offset + j) * task.factor;
        };
        a[r][step][i] = half_pair(row_slot(d, slot, value), row_slot(d, slot + 1, value));
      }
    }
  }

  float least[S::kRowTiles][2];
  float next[S::kRowTiles][2];
  int best[S::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      least[r][half] = next[r][half] = 3e38F;
      best[r][half] = 0;
    }
  }

  const int chunk_count = static_cast<int>(task.tiles / S::kChunkTiles);
  const auto fetch = [&](int chunk) {
    const uint2* from = task.table + static_cast<int64_t>(chunk) * S::kChunkWords;
    for (int i = static_cast<int>(threadIdx.x) * 2; i < S::kChunkWords; i += kThreads * 2) {
      copy_16(&chunks[chunk % 2][i], from + i);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  fetch(0);
  for (int chunk = 0; chunk < chunk_count; ++chunk) {
    if (chunk + 1 < chunk_count) {
      fetch(chunk + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const uint2* const words = chunks[chunk % 2] + lane;
#pragma unroll 1
    for (int block = 0; block < S::kChunkTiles / kBlockTiles; ++block) {
      float block_least[S::kRowTiles][2];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) block_least[r][0] = block_least[r][1] = 3e38F;
#pragma unroll
      for (int tile = 0; tile < kBlockTiles; ++tile) {
        uint2 b[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          b[step] = words[((block * kBlockTiles + tile) * kSteps + step) * 32];
        }
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
          float score[4];
          multiply<true>(score, a[r][0], b[0]);
#pragma unroll
          for (int step = 1; step < kSteps; ++step) multiply<false>(score, a[r][step], b[step]);
          block_least[r][0] = fminf(block_least[r][0], fminf(score[0], score[1]));
          block_least[r][1] = fminf(block_least[r][1], fminf(score[2], score[3]));
        }
      }
      const int index = chunk * (S::kChunkTiles / kBlockTiles) + block;
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float score = block_least[r][half];
          if (score < least[r][half]) best[r][half] = index;
          next[r][half] = fminf(next[r][half], fmaxf(least[r][half], score));
          least[r][half] = fminf(least[r][half], score);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row_at(r, half);
      const int64_t offset = row * task.x.stride;
      // The four threads of a row hold the scores of different entries: those of place * 4 + thread.
      float first = least[r][half];
      float second = next[r][half];
      int place = best[r][half] * 4 + quad_lane;
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other_first = __shfl_xor_sync(0xffffffffU, first, mask);
        const float other_second = __shfl_xor_sync(0xffffffffU, second, mask);
        const int other_place = __shfl_xor_sync(0xffffffffU, place, mask);
        second = fminf(fmaxf(first, other_first), fminf(second, other_second));
        if (other_first < first || (other_first == first && other_place < place)) place = other_place;
        first = fminf(first, other_first);
      }
      float square = 0;
      for (int j = 0; j < d; ++j) {
        const float value = load_float(task.x.data, task.x.dtype, offset + j) * task.factor;
        square += value * value;
      }
      Candidate candidate{INFINITY, INT32_MAX};
      for (int i = 0; i < 4; ++i) {
        const int tile = quad_lane * 2 + i / 2;
        const int64_t entry =
            (static_cast<int64_t>(place / 4) * kBlockTiles + tile) * kTileEntries + place % 4 * 2 + i % 2;
        if (entry >= task.count) continue;
        candidate.take(squared_distance(task.x, offset, task.centroids + entry * d),
                       static_cast<int32_t>(entry));
      }
      candidate.merge(4);
      const bool decided = second > first + score_slack(kSteps, square, first);
      const bool inside = first_row + r * 16 + half * 8 + lane / 4 < task.x.rows;
      if (quad_lane == 0 && inside) {
        task.codes[row] = candidate.code;
        if (!decided) task.open[atomicAdd(task.opened, 1)] = static_cast<int32_t>(row);
      }
    }
  }
}

// A warp takes an open row and compares all centroids in float64.
__global__ void __launch_bounds__(kThreads) decide_kernel(SearchTask task) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t rows = *task.opened;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < rows; i += warps) {
    const int64_t row = task.open[i];
    Candidate candidate{INFINITY, INT32_MAX};
    for (int64_t entry = lane; entry < task.count; entry += 32) {
      candidate.take(squared_distance(task.x, row * task.x.stride, task.centroids + entry * task.x.cols),
                     static_cast<int32_t>(entry));
    }
    candidate.merge(32);
    if (lane == 0) task.codes[row] = candidate.code;
  }
}

template <int kSteps>
void launch_search(const SearchTask& task, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(task.x.rows, Shape<kSteps>::kRows));
  search_kernel<kSteps><<<blocks, kThreads, 0, stream>>>(task);
  check_cuda(cudaGetLastError(), "launch of the search for nearest centroids");
}

// The power of two that brings `largest` to [2^11, 2^12), or as close as a normal float32 can.
float scale_factor(float largest) {
  int exponent = 0;
  static_cast<void>(std::frexp(largest, &exponent));
  return std::ldexp(1.0F, std::min(kLargestExponent - exponent, 120));
}

}  // namespace

CodebookSearch::CodebookSearch(const CudaMatrix& x, int64_t count, float largest, cudaStream_t stream)
    : x_(x),
      count_(count),
      factor_(scale_factor(largest)),
      steps_(steps_of(x.cols)),
      tiles_(checked_pad(ceil_div(count, kTileEntries),
                         steps_ <= 2 ? Shape<1>::kChunkTiles : Shape<3>::kChunkTiles)),
      stream_(stream),
      table_(tiles_ * steps_ * 32, stream),
      open_(x.rows, stream),
      opened_(1, stream) {}

void CodebookSearch::run(const float* centroids, int32_t* codes) {
  if (x_.rows == 0) return;
  const int64_t words = tiles_ * steps_ * 32;
  pack_entries<<<static_cast<unsigned>(ceil_div(words, kThreads)), kThreads, 0, stream_>>>(
      centroids, count_, static_cast<int>(x_.cols), steps_, tiles_, factor_, table_.data());
  check_cuda(cudaGetLastError(), "launch of pack_entries");
  opened_.fill_bytes(0);
  const SearchTask task{x_,      centroids, count_,       table_.data(), tiles_,
                        factor_, codes,     open_.data(), opened_.data()};
  switch (steps_) {
    case 1:
      launch_search<1>(task, stream_);
      break;
    case 2:
      launch_search<2>(task, stream_);
      break;
    case 3:
      launch_search<3>(task, stream_);
      break;
    default:
      launch_search<4>(task, stream_);
  }
  constexpr int64_t kMostBlocks = 2048;
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(x_.rows, kWarps), 1, kMostBlocks));
  decide_kernel<<<blocks, kThreads, 0, stream_>>>(task);
  check_cuda(cudaGetLastError(), "launch of decide");
}

}  // namespace quantloom::cuda
