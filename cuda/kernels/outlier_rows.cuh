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

__device__ __forceinline__ float load_staged(const __half* from) {
  unsigned short bits;
  asm volatile("ld.shared.u16 %0, [%1];"
               : "=h"(bits)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ float load_staged(const __nv_bfloat16* from) {
  unsigned short bits;
  asm volatile("ld.shared.u16 %0, [%1];"
               : "=h"(bits)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Activations that outliers meet, of `count` tokens from `first` on: rows in memory or, if kStaged, in shared
// memory.
template <class T, bool kStaged>
struct OutlierTokens {
  const T* x;
  int64_t stride;
  int first;
  int count;

  // Of a token; those past the last are others' copies.
  __device__ __forceinline__ float load(int token, int column) const {
    const T* const from = x + min(token - first, count - 1) * stride + column;
    if constexpr (kStaged) {
      return load_staged(from);
    } else {
      return load_activation(from);
    }
  }
};

// Elements from one token to the next where they are staged.
QUANTLOOM_HOST_DEVICE constexpr int64_t staged_stride(int64_t k) {
  return (k + 7) / 8 * 8;
}

// Asks for the activations of `count` tokens from `first` on, of rows aligned to 16 bytes. cp.async.wait_all
// and a barrier come before they are read.
template <class T>
__device__ __forceinline__ void stage_activations(const ProductArguments& p, T* to, int first, int count) {
  const int pieces = static_cast<int>(p.w.k / 8);
  for (int token = 0; token < count; ++token) {
    const T* const from = static_cast<const T*>(p.x) + (first + token) * p.x_stride;
    T* const row = to + token * staged_stride(p.w.k);
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += static_cast<int>(blockDim.x)) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(row + 8 * i))),
                   "l"(from + 8 * i)
                   : "memory");
    }
    for (int64_t i = 8 * pieces + static_cast<int>(threadIdx.x); i < p.w.k; i += blockDim.x) {
      row[i] = HalfPair<T>::from_float(load_activation(from + i));
    }
  }
}

// sums += value * activations of kTokens tokens from `token` on.
template <class T, bool kStaged, int kTokens>
__device__ __forceinline__ void multiply_outlier(const OutlierTokens<T, kStaged>& tokens, int column,
                                                 float value, int token, float (&sums)[kTokens]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = fmaf(value, tokens.load(token + t, column), sums[t]);
}

// The columns and values of entries 4 * at ... of all.
struct FourOutliers {
  int columns[4];
  float values[4];

  __device__ __forceinline__ FourOutliers(const OutlierEntries& outliers, int at) {
    if (outliers.wide_columns) {
      const int4 four = __ldg(static_cast<const int4*>(outliers.columns) + at);
      columns[0] = four.x;
      columns[1] = four.y;
      columns[2] = four.z;
      columns[3] = four.w;
    } else {
      const uint2 four = __ldg(static_cast<const uint2*>(outliers.columns) + at);
      columns[0] = static_cast<int>(four.x & 0xFFFFU);
      columns[1] = static_cast<int>(four.x >> 16);
      columns[2] = static_cast<int>(four.y & 0xFFFFU);
      columns[3] = static_cast<int>(four.y >> 16);
    }
    const uint2 four = __ldg(static_cast<const uint2*>(outliers.values) + at);
    values[0] = HalfPair<__half>::low(four.x);
    values[1] = HalfPair<__half>::high(four.x);
    values[2] = HalfPair<__half>::low(four.y);
    values[3] = HalfPair<__half>::high(four.y);
  }
};

// A lane's share of the products of a row's outliers [begin, end): kSharers lanes take four entries at a time
// in turn, where four lie together in memory, and the entries before and after one by one.
template <int kSharers, class T, bool kStaged, int kTokens>
__device__ __forceinline__ void multiply_outliers(const OutlierEntries& outliers,
                                                  const OutlierTokens<T, kStaged>& tokens, int begin, int end,
                                                  int sharer, int token, float (&sums)[kTokens]) {
  static_assert(kSharers == 1 || kSharers >= 8);
  const int first = (begin + 3) / 4;
  const int last = end / 4;
#pragma unroll 4
  for (int at = first + sharer; at < last; at += kSharers) {
    const FourOutliers four(outliers, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_outlier(tokens, four.columns[i], four.values[i], token, sums);
  }
  const int head = min(4 * first, end);
  const int tail = max(4 * last, head);
#pragma unroll 1
  for (int i = sharer; i < 8; i += kSharers) {
    const int at = i < 4 ? begin + i : tail + i - 4;
    if (at < (i < 4 ? head : end)) {
      multiply_outlier(tokens, outlier_column(outliers, at), outlier_value(outliers, at), token, sums);
    }
  }
}

// Asks the second-level cache for the outliers of row blocks first_row + rank, + stride, ... of a block of
// threads, `count` of them; of many the first.
__device__ __forceinline__ void prefetch_outliers(const ProductArguments& p, int first_row, int rank,
                                                  int stride, int count) {
  constexpr int kLine = 128;
  constexpr int64_t kMost = 512 * kLine;
  const auto ask = [](const void* entries, int64_t first, int64_t last) {
    const char* const from = static_cast<const char*>(entries) + first / kLine * kLine;
    const int lines = static_cast<int>((min(last - first, kMost) + kLine - 1) / kLine);
    for (int i = static_cast<int>(threadIdx.x); i < lines; i += static_cast<int>(blockDim.x)) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i * kLine));
    }
  };
  const int column_bytes = p.w.outliers.wide_columns ? 4 : 2;
  for (int i = 0; i < count; ++i) {
    const int64_t row = static_cast<int64_t>(first_row + i * stride + rank) * fragments::kBlockRows;
    if (row >= p.w.n) break;
    const int64_t begin = __ldg(p.w.outliers.offsets + row);
    const int64_t end = __ldg(p.w.outliers.offsets + min(row + fragments::kBlockRows, p.w.n));
    ask(p.w.outliers.columns, begin * column_bytes, end * column_bytes);
    ask(p.w.outliers.values, begin * 2, end * 2);
  }
}

// Calls add(row, place, token, sum) once for each row (counted among the block's own), place and token that
// has outliers: eight lanes share a row and add up in a fixed order, kBatch tokens at a time.
template <int kBatch, class T, bool kStaged, class Add>
__device__ __forceinline__ void for_each_outlier_sum(const ProductArguments& p,
                                                     const OutlierTokens<T, kStaged>& tokens, int first_row,
                                                     int rank, int stride, int count, Add add) {
  constexpr int kSharers = 8;
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
    for (int token = tokens.first; token < tokens.first + tokens.count; token += kBatch) {
      float sums[kBatch] = {};
      multiply_outliers<kSharers>(p.w.outliers, tokens, begin, end, lane % kSharers, token, sums);
#pragma unroll
      for (int distance = 1; distance < kSharers; distance *= 2) {
#pragma unroll
        for (int t = 0; t < kBatch; ++t) sums[t] += __shfl_xor_sync(~0U, sums[t], distance);
      }
      if (lane % kSharers != 0 || begin == end) continue;
#pragma unroll
      for (int t = 0; t < kBatch; ++t) {
        if (token + t < tokens.first + tokens.count) add(own_row, place, token + t, sums[t]);
      }
    }
  }
}

// Adds a matrix's outliers to its decoded values, which lie as launch_decode_fragments() leaves them: each
// sum is rounded to `dtype` again.
void add_outliers_to_decoded(const FragmentMatrix& w, void* out, int64_t stride, DType dtype,
                             cudaStream_t stream);

}  // namespace quantloom::cuda
