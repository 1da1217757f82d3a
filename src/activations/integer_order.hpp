// Integers in the order that the tensor cores of a CUDA device read ("integer order"): slabs of 64 rows
// (tokens, or outputs of a matrix of weights) and blocks of 128 bytes along the columns.
//
// A matrix of bytes [rows, columns] is stored as [ceil(rows/64), ceil(columns/128), 64, 128], rows and
// columns padded; in row r of a block, the 16 bytes of piece p lie at place p ^ (r % 8), which is the
// 128-byte swizzle of wgmma. Elements of two bytes are stored likewise, 64 to a block.
#pragma once

#include <cstdint>

#include "quantloom/checked_math.hpp"

#ifdef __CUDACC__
#define QUANTLOOM_BOTH __host__ __device__
#else
#define QUANTLOOM_BOTH
#endif

namespace quantloom::integers {

inline constexpr int kSlabRows = 64;
inline constexpr int kBlockBytes = 128;  // of one row
inline constexpr int kSlabBytes = kSlabRows * kBlockBytes;

// Where byte `byte` of a row of row_blocks * 128 bytes lies.
QUANTLOOM_BOTH constexpr int64_t place_of(int64_t row, int64_t byte, int64_t row_blocks) {
  const int64_t in_slab = row % kSlabRows;
  const int64_t piece = byte % kBlockBytes / 16 ^ in_slab % 8;
  return (row / kSlabRows * row_blocks + byte / kBlockBytes) * kSlabBytes + in_slab * kBlockBytes +
         piece * 16 + byte % 16;
}

// Bytes of a matrix with rows of `row_bytes`.
inline int64_t order_bytes(int64_t rows, int64_t row_bytes) {
  return checked_mul(
      checked_mul(ceil_div(rows, int64_t{kSlabRows}), ceil_div(row_bytes, int64_t{kBlockBytes})), kSlabBytes);
}

// What a product needs of each token beside its codes.
struct TokenTerms {
  float scale;   // NaN if a value of the token is not finite
  int32_t zero;  // a code; 0 for symmetric grids
  int32_t sum;   // of code - zero over the inputs
  int32_t unused;
};

}  // namespace quantloom::integers

#undef QUANTLOOM_BOTH
