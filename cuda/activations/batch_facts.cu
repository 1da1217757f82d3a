#include <algorithm>

#include "activations/batch_facts.hpp"
#include "activations/token_values.cuh"
#include "common/check.cuh"
#include "quantloom/error.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
// Blocks enough for any device; each takes vectors in turns.
constexpr int64_t kMostBlocks = 2048;

// Calls visit(values, row, v) for this thread's vectors.
template <class T, class Visit>
__device__ __forceinline__ void each_vector(const TokenMatrix<T>& x, int64_t rows, const Visit& visit) {
  const int64_t per_row = (x.cols + kVectorValues - 1) / kVectorValues;
  const int64_t turn = int64_t{gridDim.x} * kThreads;
  int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int64_t row = at / per_row;
  int64_t v = at - row * per_row;
  const int64_t rows_of_turn = turn / per_row;
  const int64_t rest_of_turn = turn - rows_of_turn * per_row;
  while (row < rows) {
    visit(x.load(row, static_cast<int>(v)), row, v);
    row += rows_of_turn;
    v += rest_of_turn;
    if (v >= per_row) {
      v -= per_row;
      ++row;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) range_kernel(const TokenMatrix<T> x, const int64_t rows,
                                                         const int32_t* const places, uint32_t* const range) {
  TokenRange<T> found;
  each_vector(x, rows, [&](TokenVector<T> values, int64_t, int64_t v) {
    if (places != nullptr) {
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) {
        const int64_t c = v * kVectorValues + i;
        if (c < x.cols && places[c] >= 0) values.put(i, 0);
      }
    }
    found.take(values);
  });
  found.fold();
  const uint32_t low = __reduce_max_sync(~0U, found.low);
  const uint32_t high = __reduce_max_sync(~0U, found.high);
  if (threadIdx.x % 32 != 0) return;
  // The largest of all, whatever the order.
  if (max(low, high) >= ValueBits<T>::kRefused) {
    atomicMax(range + 2, 1U);
    return;
  }
  if (low > 0) atomicMax(range, __float_as_uint(ValueBits<T>::to_float(low)));
  if (high > 0) atomicMax(range + 1, __float_as_uint(ValueBits<T>::to_float(high)));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    reach_kernel(const TokenMatrix<T> x, const int64_t rows, const float threshold, int32_t* const reached) {
  each_vector(x, rows, [&](const TokenVector<T>& values, int64_t, int64_t v) {
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      // Values of padding are 0, and the threshold is not.
      if (fabsf(values.value(i)) >= threshold) reached[v * kVectorValues + i] = 1;
    }
  });
}

// Numbers for the columns that were reached, in order. One block.
__global__ void __launch_bounds__(kScanThreads)
    number_kernel(int32_t* const places, const int64_t cols, int32_t* const count) {
  __shared__ int32_t sums[kScanThreads];
  const int64_t each = (cols + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(cols, threadIdx.x * each);
  const int64_t end = min(cols, begin + each);
  int32_t own = 0;
  for (int64_t c = begin; c < end; ++c) own += places[c];
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kScanThreads; step *= 2) {
    const int32_t before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  int32_t next = sums[threadIdx.x] - own;
  for (int64_t c = begin; c < end; ++c) places[c] = places[c] != 0 ? next++ : -1;
  if (threadIdx.x == kScanThreads - 1) *count = sums[kScanThreads - 1];
}

unsigned blocks_for(const CudaMatrix& x) {
  const int64_t vectors = x.rows * ((x.cols + kVectorValues - 1) / kVectorValues);
  return static_cast<unsigned>(std::clamp<int64_t>((vectors + kThreads - 1) / kThreads, 1, kMostBlocks));
}

}  // namespace

void find_range(const CudaMatrix& x, const int32_t* places, uint32_t* range, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(range, 0, kRangeWords * sizeof(uint32_t), stream), "range of activations");
  if (x.rows == 0 || x.cols == 0) return;
  with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
    range_kernel<T><<<blocks_for(x), kThreads, 0, stream>>>(matrix, x.rows, places, range);
  });
  check_cuda(cudaGetLastError(), "range of activations");
}

void find_outliers(const CudaMatrix& x, float threshold, int32_t* places, int32_t* count,
                   cudaStream_t stream) {
  if (x.cols > 0)
    check_cuda(cudaMemsetAsync(places, 0, static_cast<size_t>(x.cols) * sizeof(int32_t), stream),
               "outlier columns");
  if (x.rows > 0 && x.cols > 0) {
    with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
      reach_kernel<T><<<blocks_for(x), kThreads, 0, stream>>>(matrix, x.rows, threshold, places);
    });
    check_cuda(cudaGetLastError(), "outlier columns");
  }
  number_kernel<<<1, kScanThreads, 0, stream>>>(places, x.cols, count);
  check_cuda(cudaGetLastError(), "outlier columns");
}

}  // namespace quantloom::cuda
