// Where the codes of tokens go.
#pragma once

#include <cstdint>

#include "activations/integer_order.hpp"
#include "activations/token_grid.cuh"
#include "activations/token_rounding.hpp"
#include "activations/token_values.cuh"

namespace quantloom::cuda {

// Integer order, with outliers as a second matrix of float16 in that order. Threads of a block are a multiple
// of the vectors in a block of columns.
struct IntegerOrderSink {
  static constexpr bool kSums = true;
  static constexpr bool kCuts = true;
  static constexpr bool kOutliers = true;
  static constexpr int kBlockVectors = integers::kBlockBytes / kVectorValues;
  using Place = int8_t*;

  int8_t* codes;
  integers::TokenTerms* terms;
  uint16_t* outliers;
  int64_t outlier_columns;  // those that there is room for
  int64_t row_blocks;
  int64_t outlier_blocks;

  __host__ __device__ __forceinline__ int64_t vectors(int64_t cols) const {
    return (cols + integers::kBlockBytes - 1) / integers::kBlockBytes * kBlockVectors;
  }
  // integers::place_of() for bytes 8 v on, v not negative.
  __device__ __forceinline__ int64_t place_of(int64_t row, unsigned v) const {
    const unsigned in_slab = static_cast<unsigned>(row) % integers::kSlabRows;
    const unsigned piece = (v % kBlockVectors / 2) ^ (in_slab % 8);
    return (static_cast<int64_t>(static_cast<uint32_t>(row) / integers::kSlabRows) * row_blocks +
            v / kBlockVectors) *
               integers::kSlabBytes +
           (in_slab * integers::kBlockBytes + piece * 16 + v % 2 * 8);
  }
  __device__ __forceinline__ Place at(int64_t row, int thread) const {
    return codes + place_of(row, static_cast<unsigned>(thread));
  }
  __device__ __forceinline__ int64_t step(int threads) const {
    return int64_t{threads / kBlockVectors} * integers::kSlabBytes;
  }
  template <class Vector>
  __device__ __forceinline__ void store(Place place, const Vector&, uint2 eight, DeviceGrid, int,
                                        uint32_t) const {
    *reinterpret_cast<uint2*>(place) = eight;
  }
  template <class T>
  __device__ __forceinline__ void keep(int64_t row, int64_t, int64_t place, uint32_t bits, T) const {
    // What is multiplied with them is float16, whatever x is.
    if (place < outlier_columns)
      put_outlier(row, place, ValueBits<__half>::from_float(ValueBits<T>::to_float(bits)));
  }
  __device__ __forceinline__ void put_outlier(int64_t row, int64_t place, uint32_t bits) const {
    outliers[integers::place_of(row, 2 * place, outlier_blocks) / 2] = static_cast<uint16_t>(bits);
  }
  // Zeros to the end of the block of columns.
  __device__ __forceinline__ void end_outliers(int64_t row, int64_t count, int thread, int threads) const {
    constexpr int64_t kBlock = integers::kBlockBytes / 2;
    const int64_t end = (count + kBlock - 1) / kBlock * kBlock;
    for (int64_t i = count + thread; i < end; i += threads) put_outlier(row, i, 0);
  }
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int sum) const {
    const integers::TokenTerms found{grid.scale, grid.zero, sum, 0};
    *reinterpret_cast<int4*>(terms + row) = *reinterpret_cast<const int4*>(&found);
  }
  __device__ __forceinline__ void pad(int64_t row) const {
    const auto end = static_cast<unsigned>(row_blocks * kBlockVectors);
    for (unsigned v = threadIdx.x; v < end; v += blockDim.x) {
      *reinterpret_cast<uint2*>(codes + place_of(row, v)) = {0, 0};
    }
    const int64_t room = outlier_blocks * (integers::kBlockBytes / 2);
    for (int64_t i = threadIdx.x; i < room; i += blockDim.x) put_outlier(row, i, 0);
  }
};

inline IntegerOrderSink order_sink(const IntegerTokens& to, int64_t cols) {
  constexpr int64_t kBlock = integers::kBlockBytes;
  return {to.codes,
          to.terms,
          static_cast<uint16_t*>(to.outlier_values),
          to.outliers,
          (cols + kBlock - 1) / kBlock,
          (2 * to.outliers + kBlock - 1) / kBlock};
}

// The planes of QuantizedActivations. `scales` and `zeros` are null where one serves all tokens.
struct PlaneSink {
  static constexpr bool kSums = false;
  static constexpr bool kCuts = false;
  static constexpr bool kOutliers = true;
  using Place = int8_t*;

  int8_t* codes;
  float* scales;
  int8_t* zeros;
  float* outliers;
  int64_t outlier_columns;
  int64_t cols;
  bool wide;  // rows of codes begin at multiples of 8 bytes

  __host__ __device__ __forceinline__ int64_t vectors(int64_t width) const {
    return (width + kVectorValues - 1) / kVectorValues;
  }
  __device__ __forceinline__ Place at(int64_t row, int thread) const {
    return codes + row * cols + thread * kVectorValues;
  }
  __device__ __forceinline__ int64_t step(int threads) const { return threads * kVectorValues; }
  template <class Vector>
  __device__ __forceinline__ void store(Place place, const Vector&, uint2 eight, DeviceGrid, int count,
                                        uint32_t) const {
    store_bytes(place, eight, count, wide);
  }
  template <class T>
  __device__ __forceinline__ void keep(int64_t row, int64_t, int64_t place, uint32_t bits, T) const {
    if (place < outlier_columns) outliers[row * outlier_columns + place] = ValueBits<T>::to_float(bits);
  }
  __device__ __forceinline__ void end_outliers(int64_t, int64_t, int, int) const {}
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int) const {
    if (scales != nullptr) scales[row] = grid.scale;
    if (zeros != nullptr) zeros[row] = static_cast<int8_t>(grid.zero);
  }
  __device__ __forceinline__ void pad(int64_t) const {}

  static __device__ __forceinline__ void store_bytes(int8_t* to, uint2 eight, int count, bool wide) {
    if (wide && count == kVectorValues) {
      *reinterpret_cast<uint2*>(to) = eight;
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if (i < count) to[i] = static_cast<int8_t>((i < 4 ? eight.x : eight.y) >> i % 4 * 8);
    }
  }
};

// Where sinks of values put them: rows of vectors.
template <class T>
struct ValueRows {
  using Place = T*;

  T* out;
  int64_t stride;
  bool wide;  // rows begin at multiples of 16 bytes

  __host__ __device__ __forceinline__ int64_t vectors(int64_t width) const {
    return (width + kVectorValues - 1) / kVectorValues;
  }
  __device__ __forceinline__ Place at(int64_t row, int thread) const {
    return out + row * stride + thread * kVectorValues;
  }
  __device__ __forceinline__ int64_t step(int threads) const { return threads * kVectorValues; }
};

// What the codes stand for, in the dtype of the values.
template <class T>
struct RoundedSink : ValueRows<T> {
  using typename ValueRows<T>::Place;

  static constexpr bool kSums = false;
  static constexpr bool kCuts = false;
  static constexpr bool kOutliers = true;

  __device__ __forceinline__ void store(Place place, const TokenVector<T>&, uint2 eight, DeviceGrid grid,
                                        int count, uint32_t kept) const {
    TokenVector<T> values = TokenVector<T>::zeros();
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      const int code = static_cast<int8_t>((i < 4 ? eight.x : eight.y) >> i % 4 * 8);
      values.put(i, ValueBits<T>::from_float(__fmul_rn(grid.scale, static_cast<float>(code - grid.zero))));
    }
    values.store(place, count, this->wide, kept);
  }
  __device__ __forceinline__ void keep(int64_t row, int64_t column, int64_t, uint32_t bits, T) const {
    put_value(this->out + row * this->stride + column, bits);
  }
  __device__ __forceinline__ void end_outliers(int64_t, int64_t, int, int) const {}
  __device__ __forceinline__ void end(int64_t, DeviceGrid, int) const {}
  __device__ __forceinline__ void pad(int64_t) const {}
};

// The scales of tokens alone.
struct ScaleSink {
  static constexpr bool kSums = false;
  static constexpr bool kCuts = false;
  static constexpr bool kOutliers = true;
  using Place = int64_t;

  float* scales;

  __host__ __device__ __forceinline__ int64_t vectors(int64_t width) const {
    return (width + kVectorValues - 1) / kVectorValues;
  }
  __device__ __forceinline__ Place at(int64_t, int) const { return 0; }
  __device__ __forceinline__ int64_t step(int) const { return 0; }
  template <class Vector>
  __device__ __forceinline__ void store(Place, const Vector&, uint2, DeviceGrid, int, uint32_t) const {}
  template <class T>
  __device__ __forceinline__ void keep(int64_t, int64_t, int64_t, uint32_t, T) const {}
  __device__ __forceinline__ void end_outliers(int64_t, int64_t, int, int) const {}
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int) const { scales[row] = grid.scale; }
  __device__ __forceinline__ void pad(int64_t) const {}
};

// The values themselves, not rounded to integers.
template <class T>
struct CopySink : ValueRows<T> {
  using typename ValueRows<T>::Place;

  static constexpr bool kSums = false;
  static constexpr bool kCuts = false;
  static constexpr bool kOutliers = false;

  __device__ __forceinline__ void store(Place place, const TokenVector<T>& values, uint2, DeviceGrid,
                                        int count, uint32_t) const {
    values.store(place, count, this->wide, 0);
  }
  __device__ __forceinline__ void keep(int64_t, int64_t, int64_t, uint32_t, T) const {}
  __device__ __forceinline__ void end_outliers(int64_t, int64_t, int, int) const {}
  __device__ __forceinline__ void end(int64_t, DeviceGrid, int) const {}
  __device__ __forceinline__ void pad(int64_t) const {}
};

}  // namespace quantloom::cuda
