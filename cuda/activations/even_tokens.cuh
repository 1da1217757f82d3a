// The kernel that rounds tokens of the common kind to integer order: rows of two-byte values at multiples of
// 16 bytes, whole blocks of columns, a symmetric scale for each token and no sums. Its vectors are rounded
// without a branch between them; those in doubt are divided afterwards.
#pragma once

#include "activations/token_kernel.cuh"
#include "activations/token_sinks.cuh"

namespace quantloom::cuda {

// The largest over the block, for every thread. All threads of a block.
__device__ __forceinline__ uint32_t block_largest(uint32_t value) {
  __shared__ uint32_t parts[kMostTokenThreads / 32];
  value = __reduce_max_sync(~0U, value);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(~0U, lane < blockDim.x / 32 ? parts[lane] : 0);
}

template <class T>
bool takes_even_tokens(const TokenMatrix<T>& x, const TokenTask& task) {
  return sizeof(T) == 2 && x.wide && task.cols > 0 && task.cols % integers::kBlockBytes == 0 &&
         task.rule.symmetric && !task.rule.fixed && task.range == nullptr && task.cut_bits == 0 && !task.sums;
}

template <class T, int kVectors, bool kOutliers>
__global__ void __launch_bounds__(kKeepingThreads, 2)
    round_even_tokens_kernel(const TokenMatrix<T> x, const IntegerOrderSink sink, const TokenTask task) {
  let_next_begin();
  const int64_t row = blockIdx.x;
  if (row >= task.rows) {
    wait_for_previous();
    sink.pad(row);
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  const auto vectors = static_cast<int>(task.cols / kVectorValues);
  // Of this thread: the next are 32 on, so that their places are at constant distances.
  const int first = thread / 32 * (32 * kVectors) + thread % 32;
  // Where outliers are is no work of a kernel that lets this one begin before its end.
  [[maybe_unused]] uint32_t masks[kVectors];
  [[maybe_unused]] const int64_t outliers = kOutliers ? task.outliers.size() : 0;
  [[maybe_unused]] int column = -1;  // of this thread's first outlier
  if constexpr (kOutliers) {
    if (thread < outliers) column = task.outliers.columns(task.cols)[thread];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      masks[i] = first + 32 * i < vectors ? task.outliers.mask(first + 32 * i) : 0;
    }
  }
  wait_for_previous();

  const T* const token = x.data + row * x.stride;
  const T* const from = token + first * kVectorValues;
  TokenVector<T> values[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    values[i] = TokenVector<T>::zeros();
    if (first + 32 * i < vectors) values[i] = TokenMatrix<T>::load_wide(from + 32 * i * kVectorValues);
  }
  if constexpr (kOutliers) {
    if (column >= 0) sink.keep(row, column, thread, get_bits(token + column), T{});
    for (int64_t i = int64_t{thread} + threads; i < outliers; i += threads) {
      const int32_t at = task.outliers.columns(task.cols)[i];
      sink.keep(row, at, i, get_bits(token + at), T{});
    }
    sink.end_outliers(row, outliers, thread, threads);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) values[i].clear(masks[i]);
  }

  uint32_t largest = 0;  // two of them
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto& words = values[i].words;
    largest = __vimax3_u16x2(largest, words[0] & 0x7FFF7FFFU, words[1] & 0x7FFF7FFFU);
    largest = __vimax3_u16x2(largest, words[2] & 0x7FFF7FFFU, words[3] & 0x7FFF7FFFU);
  }
  largest = block_largest(max(largest & 0xFFFFU, largest >> 16));

  int8_t* const to = sink.at(row, first);
  const auto store = [&](int i, uint2 codes) {
    constexpr int kStep = 32 / IntegerOrderSink::kBlockVectors * integers::kSlabBytes;
    if (first + 32 * i < vectors) *reinterpret_cast<uint2*>(to + i * kStep) = codes;
  };
  DeviceGrid grid{1.0F, 0};
  if (largest < ValueBits<T>::kRefused) {
    const GridRule rule{task.rule.bits, true, false, 1.0F, 0};
    grid = grid_between(rule, 0.0F, ValueBits<T>::to_float(largest));
    const Coder coder(rule, grid);
    uint32_t doubts = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      bool doubtful;
      store(i, coder.likely_codes(values[i], doubtful));
      doubts |= doubtful ? 1U << i : 0U;
    }
    if (doubts != 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if ((doubts >> i & 1U) != 0) store(i, coder.divided_within(values[i]));
      }
    }
  } else {
    grid.scale = __uint_as_float(kRefusedScale);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store(i, {0, 0});
  }
  if (thread == 0) sink.end(row, grid, 0);
}

// False if the tokens are too long for that.
template <class T>
bool launch_even_tokens(const TokenMatrix<T>& x, const IntegerOrderSink& sink, const TokenTask& task,
                        cudaStream_t stream, bool overlap) {
  const bool outliers = task.outliers.index != nullptr;
  const TokenShape shape = token_shape(sink.vectors(task.cols), task, false);
  if (shape.vectors == 0) return false;
  const auto launch = [&](auto kernel) {
    const LaunchSettings settings(dim3(static_cast<unsigned>(task.padded_rows)),
                                  dim3(static_cast<unsigned>(shape.threads)), stream, overlap, 1);
    check_cuda(cudaLaunchKernelEx(&settings.config, kernel, x, sink, task), "rounding of tokens");
  };
  const auto launch_for = [&]<bool kOutliers>() {
    if (shape.vectors == 2) return launch(round_even_tokens_kernel<T, 2, kOutliers>);
    if (shape.vectors == 4) return launch(round_even_tokens_kernel<T, 4, kOutliers>);
    launch(round_even_tokens_kernel<T, 8, kOutliers>);
  };
  if (outliers) {
    launch_for.template operator()<true>();
  } else {
    launch_for.template operator()<false>();
  }
  return true;
}

}  // namespace quantloom::cuda
