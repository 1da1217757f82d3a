// Where the codes of tokens go.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activations/integer_order.hpp"
#include "activations/token_grid.cuh"
#include "activations/token_values.cuh"

namespace quantloom::cuda {

// Integer order, with outliers as a second matrix of float16 in that order.
template <class T>
struct IntegerOrderSink {
  int8_t* codes;
  integers::TokenTerms* terms;
  uint16_t* outliers;
  const int32_t* outlier_count;  // or null: outlier_columns
  int64_t outlier_columns;       // those that there is room for
  int64_t row_blocks;
  int64_t outlier_blocks;

  __host__ __device__ __forceinline__ int64_t vectors(int64_t cols) const {
    return (cols + integers::kBlockBytes - 1) / integers::kBlockBytes *
           (integers::kBlockBytes / kVectorValues);
  }

  __device__ __forceinline__ void put(int64_t row, int v, uint2 eight) const {
    *reinterpret_cast<uint2*>(codes + integers::place_of(row, int64_t{v} * kVectorValues, row_blocks)) =
        eight;
  }
  __device__ __forceinline__ void store(int64_t row, int v, const TokenVector<T>&, uint2 eight, DeviceGrid,
                                        int, uint32_t) const {
    put(row, v, eight);
  }
  __device__ __forceinline__ void keep(int64_t row, int64_t, int64_t place, uint32_t bits) const {
    // What is multiplied with them is float16, whatever x is.
    if constexpr (!std::is_same_v<T, __half>) {
      bits = ValueBits<__half>::from_float(ValueBits<T>::to_float(bits));
    }
    if (place < outlier_columns) put_outlier(row, place, static_cast<uint16_t>(bits));
  }
  __device__ __forceinline__ void put_outlier(int64_t row, int64_t place, uint16_t bits) const {
    outliers[integers::place_of(row, 2 * place, outlier_blocks) / 2] = bits;
  }
  // Zeros from outlier `from` to the end of the block.
  __device__ __forceinline__ void pad_outliers(int64_t row, int64_t from) const {
    constexpr int64_t kBlock = integers::kBlockBytes / 2;
    const int64_t used = outlier_count == nullptr ? outlier_columns : *outlier_count;
    const int64_t end = (used + kBlock - 1) / kBlock * kBlock;
    for (int64_t i = (from < 0 ? used : from) + threadIdx.x; i < end; i += blockDim.x) put_outlier(row, i, 0);
  }
  __device__ __forceinline__ void begin(int64_t row) const {
    if (outliers != nullptr) pad_outliers(row, -1);
  }
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int sum) const {
    const integers::TokenTerms found{grid.scale, grid.zero, sum, 0};
    *reinterpret_cast<int4*>(terms + row) = *reinterpret_cast<const int4*>(&found);
  }
  __device__ __forceinline__ void pad(int64_t row) const {
    const auto end = static_cast<int>(vectors(row_blocks * integers::kBlockBytes));
    for (auto v = static_cast<int>(threadIdx.x); v < end; v += static_cast<int>(blockDim.x)) {
      put(row, v, {0, 0});
    }
    if (outliers != nullptr) pad_outliers(row, 0);
  }
};

// The planes of QuantizedActivations. `scales` and `zeros` are null where one serves all tokens.
template <class T>
struct PlaneSink {
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
  __device__ __forceinline__ void begin(int64_t) const {}
  __device__ __forceinline__ void store(int64_t row, int v, const TokenVector<T>&, uint2 eight, DeviceGrid,
                                        int count, uint32_t) const {
    store_bytes(codes + row * cols + int64_t{v} * kVectorValues, eight, count, wide);
  }
  __device__ __forceinline__ void keep(int64_t row, int64_t, int64_t place, uint32_t bits) const {
    if (place < outlier_columns) outliers[row * outlier_columns + place] = ValueBits<T>::to_float(bits);
  }
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

// What the codes stand for, in the dtype of the values.
template <class T>
struct ValueSink {
  T* out;
  int64_t stride;
  bool wide;  // rows begin at multiples of 16 bytes

  __host__ __device__ __forceinline__ int64_t vectors(int64_t width) const {
    return (width + kVectorValues - 1) / kVectorValues;
  }
  __device__ __forceinline__ void begin(int64_t) const {}
  __device__ __forceinline__ void store(int64_t row, int v, const TokenVector<T>&, uint2 eight,
                                        DeviceGrid grid, int count, uint32_t kept) const {
    TokenVector<T> values = TokenVector<T>::zeros();
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      const int code = static_cast<int8_t>((i < 4 ? eight.x : eight.y) >> i % 4 * 8);
      values.put(i, ValueBits<T>::from_float(__fmul_rn(grid.scale, static_cast<float>(code - grid.zero))));
    }
    values.store(out + row * stride + int64_t{v} * kVectorValues, count, wide, kept);
  }
  __device__ __forceinline__ void keep(int64_t row, int64_t column, int64_t, uint32_t bits) const {
    put_value(out + row * stride + column, bits);
  }
  __device__ __forceinline__ void end(int64_t, DeviceGrid, int) const {}
  __device__ __forceinline__ void pad(int64_t) const {}
};

// The scales of tokens alone.
struct ScaleSink {
  float* scales;

  __host__ __device__ __forceinline__ int64_t vectors(int64_t width) const {
    return (width + kVectorValues - 1) / kVectorValues;
  }
  __device__ __forceinline__ void begin(int64_t) const {}
  template <class Vector>
  __device__ __forceinline__ void store(int64_t, int, const Vector&, uint2, DeviceGrid, int, uint32_t) const {
  }
  __device__ __forceinline__ void keep(int64_t, int64_t, int64_t, uint32_t) const {}
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int) const { scales[row] = grid.scale; }
  __device__ __forceinline__ void pad(int64_t) const {}
};

}  // namespace quantloom::cuda
