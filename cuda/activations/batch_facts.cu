#include <algorithm>

#include "activations/batch_facts.hpp"
#include "activations/token_values.cuh"
#include "common/check.cuh"
#include "quantloom/checked_math.hpp"

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
__global__ void __launch_bounds__(kThreads)
    range_kernel(const TokenMatrix<T> x, const int64_t rows, const uint8_t* const outliers,
                 uint32_t* const range) {
  TokenRange<T> found;
  each_vector(x, rows, [&](TokenVector<T> values, int64_t, int64_t v) {
    if (outliers != nullptr) values.clear(outliers[v]);
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

// Bits of columns that reach the threshold.
template <class T>
__global__ void __launch_bounds__(kThreads)
    reach_kernel(const TokenMatrix<T> x, const int64_t rows, const float threshold, uint32_t* const words) {
  each_vector(x, rows, [&](const TokenVector<T>& values, int64_t, int64_t v) {
    uint32_t reached = 0;
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      // Values of padding are 0, and the threshold is not.
      if (fabsf(values.value(i)) >= threshold) reached |= 1U << i;
    }
    reached <<= v % 4 * 8;
    if ((reached & ~words[v / 4]) != 0) atomicOr(words + v / 4, reached);
  });
}

// The columns that have bits, in order, and their number. One block.
__global__ void __launch_bounds__(kScanThreads)
    list_kernel(const uint32_t* const words, const int64_t word_count, int32_t* const columns,
                int32_t* const count) {
  __shared__ int32_t sums[kScanThreads];
  const int64_t each = (word_count + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(word_count, threadIdx.x * each);
  const int64_t end = min(word_count, begin + each);
  int32_t own = 0;
  for (int64_t w = begin; w < end; ++w) own += __popc(words[w]);
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kScanThreads; step *= 2) {
    const int32_t before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  int32_t next = sums[threadIdx.x] - own;
  for (int64_t w = begin; w < end; ++w) {
    for (uint32_t bits = words[w]; bits != 0; bits &= bits - 1) {
      columns[next++] = static_cast<int32_t>(32 * w + __ffs(static_cast<int>(bits)) - 1);
    }
  }
  if (threadIdx.x == kScanThreads - 1) *count = sums[kScanThreads - 1];
}

unsigned blocks_for(const CudaMatrix& x) {
  const int64_t vectors = x.rows * ((x.cols + kVectorValues - 1) / kVectorValues);
  return static_cast<unsigned>(std::clamp<int64_t>((vectors + kThreads - 1) / kThreads, 1, kMostBlocks));
}

}  // namespace

void find_range(const CudaMatrix& x, const void* outlier_index, uint32_t* range, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(range, 0, kRangeWords * sizeof(uint32_t), stream), "range of activations");
  if (x.rows == 0 || x.cols == 0) return;
  with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
    range_kernel<T><<<blocks_for(x), kThreads, 0, stream>>>(
        matrix, x.rows, static_cast<const uint8_t*>(outlier_index), range);
  });
  check_cuda(cudaGetLastError(), "range of activations");
}

void find_outliers(const CudaMatrix& x, float threshold, int32_t* index, int32_t* count,
                   cudaStream_t stream) {
  const int64_t words = ceil_div(x.cols, int64_t{32});
  auto* const bits = reinterpret_cast<uint32_t*>(index);
  if (words > 0) {
    check_cuda(cudaMemsetAsync(bits, 0, static_cast<size_t>(words) * sizeof(uint32_t), stream),
               "outlier columns");
  }
  if (x.rows > 0 && x.cols > 0) {
    with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
      reach_kernel<T><<<blocks_for(x), kThreads, 0, stream>>>(matrix, x.rows, threshold, bits);
    });
    check_cuda(cudaGetLastError(), "outlier columns");
  }
  list_kernel<<<1, kScanThreads, 0, stream>>>(bits, words, index + words, count);
  check_cuda(cudaGetLastError(), "outlier columns");
}

}  // namespace quantloom::cuda
