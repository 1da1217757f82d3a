// Outliers on the device (format "outliers"): their part of a product, and of a decoded matrix.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// Entry `at` of all: its column and its value.
__device__ __forceinline__ int outlier_column(const OutlierEntries& outliers, int at) {
  return outliers.wide_columns ? __ldg(static_cast<const int32_t*>(outliers.columns) + at)
                               : __ldg(static_cast<const unsigned short*>(outliers.columns) + at);
}
__device__ __forceinline__ float outlier_value(const OutlierEntries& outliers, int at) {
  return __half2float(__ushort_as_half(__ldg(static_cast<const unsigned short*>(outliers.values) + at)));
}

// Not through the read-only path, which may be read before wait_for_previous().
__device__ __forceinline__ float load_activation(const __half* from) {
  unsigned short bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ float load_activation(const __nv_bfloat16* from) {
  unsigned short bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// The products of a row's outliers [begin, end) from entry `first` on, every `step`-th, with kTokens tokens
// from `token` on; tokens past the last are others' copies.
template <class T, int kTokens>
__device__ __forceinline__ void multiply_outliers(const ProductArguments& p, int first, int end, int step,
                                                  int token, float (&sums)[kTokens]) {
  const T* const x = static_cast<const T*>(p.x);
#pragma unroll 2
  for (int at = first; at < end; at += step) {
    const int column = outlier_column(p.w.outliers, at);
    const float value = outlier_value(p.w.outliers, at);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      sums[t] = fmaf(value, load_activation(x + min(token + t, p.m - 1) * p.x_stride + column), sums[t]);
    }
  }
}

// Asks the second-level cache for the outliers of row blocks first_row + rank, + stride, ... of a block of
// threads, `count` of them.
__device__ __forceinline__ void prefetch_outliers(const ProductArguments& p, int first_row, int rank,
                                                  int stride, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count * fragments::kBlockRows;
       i += static_cast<int>(blockDim.x)) {
    const int64_t row =
        static_cast<int64_t>(first_row + i / fragments::kBlockRows * stride + rank) * fragments::kBlockRows +
        i % fragments::kBlockRows;
    if (row >= p.w.n) continue;
    const int at = __ldg(p.w.outliers.offsets + row);
    const auto* const columns =
        static_cast<const char*>(p.w.outliers.columns) + int64_t{at} * (p.w.outliers.wide_columns ? 4 : 2);
    const auto* const values = static_cast<const char*>(p.w.outliers.values) + int64_t{at} * 2;
    if (at < __ldg(p.w.outliers.offsets + row + 1)) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(columns));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(values));
    }
  }
}

// Calls add(row, place, token, sum) once for each row (counted among the block's own), place and token that
// has outliers: eight lanes share a row and add up in a fixed order.
template <class T, int kTokens, class Add>
__device__ __forceinline__ void for_each_outlier_sum(const ProductArguments& p, int first_row, int rank,
                                                     int stride, int count, Add add) {
  constexpr int kSharers = 8;
  constexpr int kBatch = kTokens == 1 ? 1 : 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = count * fragments::kBlockRows;
  const int step = static_cast<int>(blockDim.x) / kSharers;
  // A warp goes on as long as one of its rows is left.
  for (int first = static_cast<int>(threadIdx.x) / 32 * (32 / kSharers); first < rows; first += step) {
    const int i = first + lane / kSharers;
    const int own_row = i / fragments::kBlockRows;
    const int place = i % fragments::kBlockRows;
    const int64_t row = static_cast<int64_t>(first_row + own_row * stride + rank) * fragments::kBlockRows +
                        fragments::block_row_of(place);
    const bool inside = i < rows && row < p.w.n;
    const int begin = inside ? __ldg(p.w.outliers.offsets + row) : 0;
    const int end = inside ? __ldg(p.w.outliers.offsets + row + 1) : 0;
    for (int token = 0; token < p.m; token += kBatch) {
      float sums[kBatch] = {};
      multiply_outliers<T>(p, begin + lane % kSharers, end, kSharers, token, sums);
#pragma unroll
      for (int distance = 1; distance < kSharers; distance *= 2) {
#pragma unroll
        for (int t = 0; t < kBatch; ++t) sums[t] += __shfl_xor_sync(~0U, sums[t], distance);
      }
      if (lane % kSharers != 0 || begin == end) continue;
#pragma unroll
      for (int t = 0; t < kBatch; ++t) {
        if (token + t < p.m) add(own_row, place, token + t, sums[t]);
      }
    }
  }
}

// Adds a matrix's outliers to its decoded values, which lie as launch_decode_fragments() leaves them: each
// sum is rounded to `dtype` again.
void add_outliers_to_decoded(const FragmentMatrix& w, void* out, int64_t stride, DType dtype,
                             cudaStream_t stream);

}  // namespace quantloom::cuda
