// The kernel that rounds tokens: a block of threads for one token at a time, whose values stay in registers
// between finding their range and rounding them.
//
// Source says where values come from:
//   using Value                                    float16, bfloat16 or float32
//   Raw load(row, v)                               what eight values are made of
//   template <class Each> Terms measure(row, each) by all threads, after the loads: what the values need of
//                                                  the whole token; each(visit) calls visit(raw, v)
//   TokenVector<Value> finish(raw, v, terms)       zeros beyond the token's end
// Sink says where codes go:
//   vectors(cols)                                  of eight values in a row of the result
//   begin(row)                                     by all threads
//   store(row, v, values, codes, grid, count, kept) eight codes, of which `count` are inputs; bits of `kept`:
//                                                  the outliers among them
//   keep(row, column, place, bits)                 an outlier, before or after its code is stored
//   end(row, grid, sum)                            by one thread; sum: of code - zero
//   pad(row)                                       by all threads: a row of padding
// The scale of a grid is NaN, and codes are 0, where a value that shares it is refused.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "activations/token_grid.cuh"
#include "activations/token_values.cuh"
#include "common/check.cuh"
#include "kernels/overlap.cuh"

namespace quantloom::cuda {

inline constexpr int kMostTokenThreads = 1024;
// Where they keep values.
inline constexpr int kKeepingThreads = 512;

struct TokenTask {
  int64_t rows = 0;
  int64_t padded_rows = 0;  // with those that the sink pads
  int64_t cols = 0;
  GridRule rule;
  const uint32_t* range = nullptr;  // of all tokens: bits of the largest float32 below and above 0, and 1 if
                                    // any value is refused; or null: each token has its own
  const int32_t* places = nullptr;  // [cols] of inputs among the outliers, or -1; or null
};

// The largest of each over the block, for every thread. All threads of a block.
__device__ __forceinline__ uint2 block_largest(uint2 value) {
  __shared__ uint2 parts[kMostTokenThreads / 32];
  value.x = __reduce_max_sync(~0U, value.x);
  value.y = __reduce_max_sync(~0U, value.y);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? parts[lane] : make_uint2(0, 0);
  return {__reduce_max_sync(~0U, value.x), __reduce_max_sync(~0U, value.y)};
}

// The sum over the block, for the threads of the first warp. A block_largest() lies between two of them.
__device__ __forceinline__ int block_total(int value) {
  __shared__ int parts[kMostTokenThreads / 32];
  value = __reduce_add_sync(~0U, value);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  return __reduce_add_sync(~0U, lane < blockDim.x / 32 ? parts[lane] : 0);
}

// kVectors: those that a thread keeps; 0: rows of any length, which are read twice.
// kOutliers: a block takes several tokens, so that it reads the places of outliers once.
template <class Source, class Sink, int kVectors, bool kOutliers>
__global__ void __launch_bounds__(kVectors > 0 ? kKeepingThreads : kMostTokenThreads)
    round_tokens_kernel(const Source source, const Sink sink, const TokenTask task) {
  using T = typename Source::Value;
  let_next_begin();
  wait_for_previous();
  const auto vectors = static_cast<int>(sink.vectors(task.cols));
  const auto first_thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  const auto outliers_of = [&](int v) {
    uint32_t mask = 0;
    for (int i = 0; i < kVectorValues; ++i) {
      const int64_t c = int64_t{v} * kVectorValues + i;
      if (c < task.cols && task.places[c] >= 0) mask |= 1U << i;
    }
    return mask;
  };
  // Eight bits for each vector of this thread.
  uint64_t masks = 0;
  if constexpr (kOutliers) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      masks |= static_cast<uint64_t>(outliers_of(first_thread + i * threads)) << 8 * i;
    }
  }
  const auto take_outliers = [&](TokenVector<T>& values, int64_t row, int v, uint32_t mask) {
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if ((mask >> i & 1U) == 0) continue;
      const int64_t column = int64_t{v} * kVectorValues + i;
      sink.keep(row, column, task.places[column], values.bits(i));
      values.put(i, 0);
    }
  };
  const auto round_token = [&](int64_t row) {
    // Not `first_thread`: addresses that are found again for each token take no registers from values.
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    if (row >= task.rows) {
      sink.pad(row);
      return;
    }
    sink.begin(row);
    typename Source::Raw raw[kVectors > 0 ? kVectors : 1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = source.load(row, thread + i * threads);
    const auto terms = source.measure(row, [&](const auto& visit) {
      if constexpr (kVectors > 0) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) visit(raw[i], thread + i * threads);
      } else {
        for (int v = thread; v < vectors; v += threads) visit(source.load(row, v), v);
      }
    });
    TokenVector<T> kept[kVectors > 0 ? kVectors : 1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = thread + i * threads;
      kept[i] = source.finish(raw[i], v, terms);
      if constexpr (kOutliers) {
        const uint32_t mask = static_cast<uint32_t>(masks >> 8 * i) & 0xFFU;
        if (mask != 0) take_outliers(kept[i], row, v, mask);
      }
    }
    // Calls visit(values, v, kept) for this thread's vectors.
    const auto each = [&](const auto& visit) {
      if constexpr (kVectors > 0) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int v = thread + i * threads;
          if (v < vectors) visit(kept[i], v, kOutliers ? static_cast<uint32_t>(masks >> 8 * i) & 0xFFU : 0U);
        }
      } else {
        for (int v = thread; v < vectors; v += threads) {
          TokenVector<T> values = source.finish(source.load(row, v), v, terms);
          uint32_t mask = 0;
          if constexpr (kOutliers) {
            mask = outliers_of(v);
            take_outliers(values, row, v, mask);
          }
          visit(values, v, mask);
        }
      }
    };
    TokenRange<T> range;
    each([&](const TokenVector<T>& values, int, uint32_t) { range.take(values); });
    range.fold();
    const uint2 own = block_largest({range.low, range.high});
    bool good = max(own.x, own.y) < ValueBits<T>::kRefused;
    float low = ValueBits<T>::to_float(own.x);
    float high = ValueBits<T>::to_float(own.y);
    if (task.range != nullptr) {
      low = __uint_as_float(task.range[0]);
      high = __uint_as_float(task.range[1]);
      good = task.range[2] == 0;
    }
    DeviceGrid grid = good ? grid_between(task.rule, low, high) : DeviceGrid{1.0F, 0};
    const Coder coder(task.rule, grid);
    if (!good) grid.scale = __uint_as_float(kRefusedScale);
    int sum = 0;
    each([&](const TokenVector<T>& values, int v, uint32_t mask) {
      const int64_t left = task.cols - int64_t{v} * kVectorValues;
      const int count = left >= kVectorValues ? kVectorValues : left > 0 ? static_cast<int>(left) : 0;
      uint2 codes = coder.codes(values, count);
      if (!good) codes = {0, 0};
      sum = __dp4a(static_cast<int>(codes.x), 0x01010101, sum);
      sum = __dp4a(static_cast<int>(codes.y), 0x01010101, sum);
      sink.store(row, v, values, codes, grid, count, mask);
    });
    sum = block_total(sum);
    if (thread == 0) sink.end(row, grid, sum - static_cast<int>(task.cols) * grid.zero);
  };
  if constexpr (kOutliers) {
#pragma unroll 1
    for (int64_t row = blockIdx.x; row < task.padded_rows; row += gridDim.x) round_token(row);
  } else {
    round_token(blockIdx.x);
  }
}

// Threads of a block and vectors that each keeps, for rows of so many vectors.
struct TokenShape {
  int threads = 32;
  int vectors = 0;

  TokenShape(int64_t row_vectors, int64_t rows, int processors) {
    const auto threads_for = [&](int64_t each) {
      return std::max<int64_t>(32, (row_vectors + 32 * each - 1) / (32 * each) * 32);
    };
    // Few tokens: more threads for each, so that all processors have enough to wait for.
    vectors = rows <= 4 * processors && threads_for(2) <= kKeepingThreads ? 2
              : threads_for(4) <= kKeepingThreads                         ? 4
              : threads_for(8) <= kKeepingThreads                         ? 8
                                                                          : 0;
    threads = static_cast<int>(vectors == 0 ? kMostTokenThreads : threads_for(vectors));
  }
};

template <class Source, class Sink>
void launch_token_kernel(const Source& source, const Sink& sink, const TokenTask& task, cudaStream_t stream,
                         bool overlap) {
  if (task.padded_rows == 0) return;
  int device = 0;
  int processors = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "processors of the CUDA device");
  const TokenShape shape(sink.vectors(task.cols), task.rows, processors);
  int64_t blocks = task.padded_rows;
  if (task.places != nullptr) {
    blocks = std::min(blocks, int64_t{processors} * std::max(1, 1536 / shape.threads));
  }
  const auto launch = [&](auto kernel) {
    const LaunchSettings settings(dim3(static_cast<unsigned>(blocks)),
                                  dim3(static_cast<unsigned>(shape.threads)), stream, overlap, 1);
    check_cuda(cudaLaunchKernelEx(&settings.config, kernel, source, sink, task), "rounding of tokens");
  };
  const auto launch_for = [&]<bool kOutliers>() {
    switch (shape.vectors) {
      case 2:
        return launch(round_tokens_kernel<Source, Sink, 2, kOutliers>);
      case 4:
        return launch(round_tokens_kernel<Source, Sink, 4, kOutliers>);
      case 8:
        return launch(round_tokens_kernel<Source, Sink, 8, kOutliers>);
      default:
        return launch(round_tokens_kernel<Source, Sink, 0, kOutliers>);
    }
  };
  if (task.places != nullptr) return launch_for.template operator()<true>();
  launch_for.template operator()<false>();
}

}  // namespace quantloom::cuda
