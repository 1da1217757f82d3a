// How one value becomes a code once its group is fitted, for each kind of format that is rounded column by
// column on the device: the arithmetic of the CPU's encoders, operation by operation (-fmad=false). Each has
//   Column               what a lane keeps of the group of its row
//   column(row, group)   reads it
//   encode(column, x)    the nearest code, and the value that it decodes to
//   decode(column, code) that value
#pragma once

#include <variant>

#include "formats/bcq_arithmetic.hpp"
#include "formats/scalar_planes.hpp"

namespace quantloom::cuda {

// Uniform grids and codebooks.
struct ScalarRounder {
  ScalarGrid grid;
  GroupParameters parameters;

#ifdef __CUDACC__
  struct Column {
    float scale;
    float zero;
  };
  __device__ __forceinline__ Column column(int64_t row, int64_t group) const {
    const int64_t index = row * parameters.row_stride + group * parameters.group_stride;
    return {parameters.scales[index], parameters.zeros[index]};
  }
  __device__ __forceinline__ EncodedValue encode(const Column& column, float value) const {
    return encode_value(grid, value, column.scale, column.zero);
  }
  __device__ __forceinline__ float decode(const Column& column, uint32_t code) const {
    if (grid.table != nullptr) return column.scale * grid.table[code];
    if (grid.is_sign()) return column.scale * (code != 0 ? 0.5F : -0.5F);
    return column.scale * (static_cast<float>(code) - column.zero);
  }
#endif
};

// Grids with real zero points, as "spqr" has them.
struct SpqrRounder {
  float levels = 0;  // the largest code
  GroupParameters parameters;

#ifdef __CUDACC__
  using Column = ScalarRounder::Column;
  __device__ __forceinline__ Column column(int64_t row, int64_t group) const {
    const int64_t index = row * parameters.row_stride + group * parameters.group_stride;
    return {parameters.scales[index], parameters.zeros[index]};
  }
  __device__ __forceinline__ EncodedValue encode(const Column& column, float value) const {
    constexpr float kRoundingShift = 0x1.8p23F;
    float steps = value / column.scale + column.zero;
    steps = steps > 0.0F ? steps : 0.0F;  // in this order a NaN becomes 0
    steps = steps < levels ? steps : levels;
    const float level = (steps + kRoundingShift) - kRoundingShift;
    return {column.scale * (level - column.zero), static_cast<uint32_t>(static_cast<int32_t>(level))};
  }
  __device__ __forceinline__ float decode(const Column& column, uint32_t code) const {
    return column.scale * (static_cast<float>(code) - column.zero);
  }
#endif
};

// Binary coding: of each row and group the values in rising order, and their codes.
struct BcqRounder {
  int bits = 1;
  int64_t n = 0;
  const bcq::Grid* grids = nullptr;  // [groups, n]
  const float* values = nullptr;     // [groups, n, 2^bits]
  const uint8_t* codes = nullptr;    // [groups, n, 2^bits]

#ifdef __CUDACC__
  struct Column {
    int64_t cell;
  };
  __device__ __forceinline__ Column column(int64_t row, int64_t group) const {
    return {group * n + row};
  }
  __device__ __forceinline__ EncodedValue encode(const Column& column, float value) const {
    const int64_t first = column.cell << bits;
    const int position = bcq::position_of(values + first, bits, value);
    return {values[first + position], codes[first + position]};
  }
  __device__ __forceinline__ float decode(const Column& column, uint32_t code) const {
    return bcq::value_of(grids[column.cell], static_cast<int>(code));
  }
#endif
};

using Rounder = std::variant<ScalarRounder, SpqrRounder, BcqRounder>;

}  // namespace quantloom::cuda
