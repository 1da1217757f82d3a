// The kernel that rounds tokens: a block of threads for one token, whose values stay in registers between
// finding their range and rounding them.
//
// Source says where values come from:
//   using Value                                    float16, bfloat16 or float32
//   load_all(row, thread, threads, Raw (&)[n])     what vectors thread, thread + threads, ... are made of
//   Raw load(row, v)                               the same of one
//   template <class Each> Terms measure(row, each) by all threads, after the loads: what the values need of
//                                                  the whole token; each(visit) calls visit(raw, v)
//   TokenVector<Value> finish(raw, v, terms)       zeros beyond the token's end
//   kEveryShape                                    false: kernels for some lengths only, which are slower
// Sink says where codes go:
//   kSums, kCuts, kOutliers                        whether it takes sums, significant digits and outliers
//   vectors(cols)                                  of eight values in a row of the result
//   Place at(row, thread), int64_t step(threads)   a thread's first vector, and from one to the next
//   store(place, values, codes, grid, count, kept) eight codes, of which `count` are inputs; bits of `kept`:
//                                                  the outliers among them
//   keep(row, column, place, bits, Value{})        an outlier
//   end_outliers(row, count, thread, threads)      by all threads
//   end(row, grid, sum)                            by one thread; sum: of code - zero, if the task has it
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
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

inline constexpr int kMostTokenThreads = 1024;
// Where they keep values.
inline constexpr int kKeepingThreads = 512;

// The outliers of a batch on the device: index is an outlier_index(), of `count` columns or, if that is not
// null, *found.
struct OutlierList {
  const uint32_t* index = nullptr;  // null: none
  int64_t count = 0;
  const int32_t* found = nullptr;

  __device__ __forceinline__ int64_t size() const {
    return found == nullptr ? count : min(count, int64_t{*found});
  }
  // A bit for each of eight inputs.
  __device__ __forceinline__ uint32_t mask(int v) const { return reinterpret_cast<const uint8_t*>(index)[v]; }
  __device__ __forceinline__ bool has(int64_t column) const {
    return (index[column / 32] >> column % 32 & 1U) != 0;
  }
  __device__ __forceinline__ const int32_t* columns(int64_t cols) const {
    return reinterpret_cast<const int32_t*>(index) + (cols + 31) / 32;
  }
};

struct TokenTask {
  int64_t rows = 0;
  int64_t padded_rows = 0;  // with those that the sink pads
  int64_t cols = 0;
  GridRule rule;
  const uint32_t* range = nullptr;  // of all tokens: bits of the largest float32 below and above 0, and 1 if
                                    // any value is refused; or null: each token has its own
  OutlierList outliers;
  bool sums = false;
  int cut_bits = 0;   // significant digits of the integers; 0: all
  int cut_lanes = 1;  // vectors, of neighbouring threads, that share a shift
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

// The sum over the block, for the threads of the first warp.
__device__ __forceinline__ int block_total(int value) {
  __shared__ int parts[kMostTokenThreads / 32];
  value = __reduce_add_sync(~0U, value);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  return __reduce_add_sync(~0U, lane < blockDim.x / 32 ? parts[lane] : 0);
}

// Codes of integers that are cut to `bits` bits behind a shift that `lanes` neighbouring threads share, times
// two to the shift. By whole warps.
template <class Vector>
__device__ __noinline__ uint2 cut_codes(const Coder coder, const Vector values, int bits, int lanes) {
  int integers[kVectorValues];
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i) {
    integers[i] = coder.integer(values.value(i));
    any |= static_cast<uint32_t>(abs(integers[i]));
  }
  for (int step = lanes / 2; step > 0; step /= 2) any |= __shfl_xor_sync(~0U, any, step);
  const CutRule rule(any, bits);
  uint2 codes = {0, 0};
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i) {
    (i < 4 ? codes.x : codes.y) |= (static_cast<uint32_t>(rule.code(integers[i]) << rule.shift) & 0xFFU)
                                   << i % 4 * 8;
  }
  return codes;
}

// kVectors: those that a thread keeps; 0: rows of any length, which are read twice.
template <class Source, class Sink, int kVectors, bool kOutliers>
__global__ void __launch_bounds__(kVectors > 0 ? kKeepingThreads : kMostTokenThreads)
    round_tokens_kernel(const Source source, const Sink sink, const TokenTask task) {
  using T = typename Source::Value;
  let_next_begin();
  const int64_t row = blockIdx.x;
  if (row >= task.rows) {
    wait_for_previous();
    sink.pad(row);
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  const auto vectors = static_cast<int>(sink.vectors(task.cols));
  // Vectors that hold inputs.
  const auto filled = static_cast<int>((task.cols + kVectorValues - 1) / kVectorValues);

  // Where outliers are is no work of a kernel that lets this one begin before its end.
  [[maybe_unused]] uint32_t masks[kVectors > 0 ? kVectors : 1];
  [[maybe_unused]] int64_t outliers = 0;
  [[maybe_unused]] int column = -1;  // of this thread's first outlier
  if constexpr (kOutliers) {
    outliers = task.outliers.size();
    if (thread < outliers) column = task.outliers.columns(task.cols)[thread];
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = thread + i * threads;
        masks[i] = v < filled ? task.outliers.mask(v) : 0;
      }
    }
  }
  wait_for_previous();

  typename Source::Raw raw[kVectors > 0 ? kVectors : 1];
  if constexpr (kVectors > 0) source.load_all(row, thread, threads, raw);
  [[maybe_unused]] typename Source::Raw first_outlier;
  if (kOutliers && column >= 0) first_outlier = source.load(row, column / kVectorValues);
  const auto terms = source.measure(row, [&](const auto& visit) {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) visit(raw[i], thread + i * threads);
    } else {
      for (int v = thread; v < filled; v += threads) visit(source.load(row, v), v);
    }
  });
  TokenVector<T> values[kVectors > 0 ? kVectors : 1];
  if constexpr (kVectors > 0) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = thread + i * threads;
      values[i] = source.finish(raw[i], v, terms);
      if constexpr (kOutliers) values[i].clear(masks[i]);
    }
  }
  // Calls visit(values, v, i) for this thread's vectors, and in whole warps for some more of zeros.
  const auto each = [&](const auto& visit) {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) visit(values[i], thread + i * threads, i);
    } else {
      for (int v = thread; v - thread % 32 < vectors; v += threads) {
        TokenVector<T> found = TokenVector<T>::zeros();
        if (v < filled) {
          found = source.finish(source.load(row, v), v, terms);
          if (kOutliers) found.clear(task.outliers.mask(v));
        }
        visit(found, v, (v - thread) / threads);
      }
    }
  };
  if constexpr (kOutliers) {
    const auto keep = [&](const auto& of_outlier, int at, int64_t i) {
      const TokenVector<T> found = source.finish(of_outlier, at / kVectorValues, terms);
      sink.keep(row, at, i, found.pick(at % kVectorValues), T{});
    };
    if (column >= 0) keep(first_outlier, column, thread);
    for (int64_t i = int64_t{thread} + threads; i < outliers; i += threads) {
      const int at = task.outliers.columns(task.cols)[i];
      keep(source.load(row, at / kVectorValues), at, i);
    }
    sink.end_outliers(row, outliers, thread, threads);
  }

  TokenRange<T> range;
  each([&](const TokenVector<T>& found, int, int) { range.take(found); });
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

  const auto place = sink.at(row, thread);
  const int64_t step = sink.step(threads);
  int sum = 0;
  const auto store = [&](const TokenVector<T>& found, int v, int i, uint2 codes) {
    if (v >= vectors) return;
    int count = kVectorValues;
    if (v + 1 >= filled) {
      count = static_cast<int>(max(int64_t{0}, min(int64_t{8}, task.cols - int64_t{v} * kVectorValues)));
      codes = first_codes(codes, count);
    }
    if (Sink::kSums && task.sums) {
      sum = __dp4a(static_cast<int>(codes.x), 0x01010101, sum);
      sum = __dp4a(static_cast<int>(codes.y), 0x01010101, sum);
    }
    uint32_t kept = 0;
    if constexpr (kOutliers && kVectors > 0) kept = masks[i];
    if constexpr (kOutliers && kVectors == 0) kept = v < filled ? task.outliers.mask(v) : 0;
    sink.store(place + i * step, found, codes, grid, count, kept);
  };
  if (!good) {
    each([&](const TokenVector<T>& found, int v, int i) { store(found, v, i, {0, 0}); });
  } else if (Sink::kCuts && task.cut_bits > 0) {
    each([&](const TokenVector<T>& found, int v, int i) {
      store(found, v, i, cut_codes(coder, found, task.cut_bits, task.cut_lanes));
    });
  } else if (task.rule.symmetric && !task.rule.fixed) {
    each([&](const TokenVector<T>& found, int v, int i) { store(found, v, i, coder.codes_within(found)); });
  } else {
    each([&](const TokenVector<T>& found, int v, int i) { store(found, v, i, coder.codes(found)); });
  }
  if (Sink::kSums && task.sums) {
    sum = block_total(sum) - static_cast<int>(task.cols) * grid.zero;
  }
  if (thread == 0) sink.end(row, grid, sum);
}

// Threads of a block and vectors that each keeps, for rows of so many vectors.
struct TokenShape {
  int threads = 32;
  int vectors = 0;

  // few: kernels that keep 4 vectors or none. outliers: tokens have some, which take time of their own.
  TokenShape(int64_t row_vectors, int64_t rows, int processors, bool few, bool outliers) {
    const auto threads_for = [&](int64_t each) {
      return std::max<int64_t>(32, (row_vectors + 32 * each - 1) / (32 * each) * 32);
    };
    if (few) {
      vectors = threads_for(4) <= kKeepingThreads ? 4 : 0;
    } else {
      // Few tokens: more threads for each, so that all processors have enough to wait for.
      vectors = rows <= 4 * processors && threads_for(2) <= kKeepingThreads / 2                ? 2
                : rows <= (outliers ? 4 : 2) * processors && threads_for(4) <= kKeepingThreads ? 4
                : threads_for(4) <= kKeepingThreads / 2                                        ? 4
                : threads_for(8) <= kKeepingThreads                                            ? 8
                                                                                               : 0;
    }
    threads = static_cast<int>(vectors == 0 ? kMostTokenThreads : threads_for(vectors));
  }
};

// For rows of so many vectors on the current device. Throws InvalidArgument if there are too many.
inline TokenShape token_shape(int64_t row_vectors, const TokenTask& task, bool few) {
  // Numbers of vectors are ints, and blocks are counted in 31 bits.
  if (task.cols > (int64_t{1} << 31) || task.padded_rows >= (int64_t{1} << 31)) {
    throw InvalidArgument("x", text_of("shape [", task.rows, ", ", task.cols, "]"), "sizes below 2^31");
  }
  int device = 0;
  int processors = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "processors of the CUDA device");
  return {row_vectors, task.rows, processors, few, task.outliers.index != nullptr};
}

template <class Source, class Sink>
void launch_token_kernel(const Source& source, const Sink& sink, const TokenTask& task, cudaStream_t stream,
                         bool overlap) {
  if (task.padded_rows == 0) return;
  const TokenShape shape = token_shape(sink.vectors(task.cols), task, !Source::kEveryShape);
  const auto launch = [&](auto kernel) {
    const LaunchSettings settings(dim3(static_cast<unsigned>(task.padded_rows)),
                                  dim3(static_cast<unsigned>(shape.threads)), stream, overlap, 1);
    check_cuda(cudaLaunchKernelEx(&settings.config, kernel, source, sink, task), "rounding of tokens");
  };
  const auto launch_for = [&]<bool kOutliers>() {
    if constexpr (Source::kEveryShape) {
      if (shape.vectors == 2) return launch(round_tokens_kernel<Source, Sink, 2, kOutliers>);
      if (shape.vectors == 8) return launch(round_tokens_kernel<Source, Sink, 8, kOutliers>);
    }
    if (shape.vectors == 4) return launch(round_tokens_kernel<Source, Sink, 4, kOutliers>);
    launch(round_tokens_kernel<Source, Sink, 0, kOutliers>);
  };
  if constexpr (Sink::kOutliers) {
    if (task.outliers.index != nullptr) return launch_for.template operator()<true>();
  }
  launch_for.template operator()<false>();
}

}  // namespace quantloom::cuda
