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
                                        int, bool) const {
    put(row, v, eight);
  }
  __device__ __forceinline__ void keep(int64_t row, int64_t place, uint32_t bits) const {
    // What is multiplied with them is float16, whatever x is.
    if constexpr (!std::is_same_v<T, __half>) {
      bits = ValueBits<__half>::from_float(ValueBits<T>::to_float(bits));
    }
    put_outlier(row, place, static_cast<uint16_t>(bits));
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
  __device__ __forceinline__ void end(int64_t row, DeviceGrid grid, int sum, bool good) const {
    const integers::TokenTerms found{good ? grid.scale : __uint_as_float(0x7FC00000U), grid.zero, sum, 0};
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

}  // namespace quantloom::cuda
