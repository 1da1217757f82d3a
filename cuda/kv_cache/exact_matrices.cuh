// Tokens that are kept exact as matrices of float16 in a warp's part of shared memory, for operands of
// mma.m16n8k16: 32 rows, each 16 bytes further apart than it is long, so that the rows of a matrix begin in
// different banks.
#pragma once

#include "kv_cache/code_matrices.cuh"
#include "kv_cache/staged_rows.cuh"

namespace quantloom::kv_cache {

template <int kDim>
struct ExactMatrices {
  static constexpr int kRowBytes = kDim * 2 + 16;
  static constexpr int kBytes = kUnitTokens * kRowBytes;
  static constexpr int kPieces = kDim / 8;  // of 16 bytes of float16, of a row

  // Reads the rows of a unit, zeros where row_at(token of the unit) is null. Of keys as they are, of values
  // with the channels of 16 in the order 0, 2, ... 14, 1, 3, ... 15, so that neighbours are rows g and g + 8
  // of an operand. All lanes together.
  template <bool kSplit, class RowAt>
  static __device__ __forceinline__ void load(std::byte* rows, DType dtype, RowAt row_at) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int kAtOnce = 8;
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < kPieces; first += kAtOnce) {
      uint32_t pairs[kAtOnce][4] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = (first + i) * 32 + lane;
        const int row = piece / kPieces;
        const std::byte* const from = row_at(row);
        if (first + i < kPieces && from != nullptr) exact_halves(from, dtype, piece % kPieces * 8, pairs[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= kPieces) continue;
        const int piece = (first + i) * 32 + lane;
        std::byte* const to = rows + piece / kPieces * kRowBytes;
        const int at = piece % kPieces;
        const auto& p = pairs[i];
        if constexpr (kSplit) {
          auto* const even = reinterpret_cast<uint2*>(to + at / 2 * 32 + at % 2 * 8);
          even[0] = {low_halves(p[0], p[1]), low_halves(p[2], p[3])};
          even[2] = {high_halves(p[0], p[1]), high_halves(p[2], p[3])};
        } else {
          *reinterpret_cast<uint4*>(to + at * 16) = {p[0], p[1], p[2], p[3]};
        }
      }
    }
    __syncwarp();
  }

  // Adds products with a row of queries: word i is channels 2 i and 2 i + 1.
  static __device__ __forceinline__ void multiply_keys(const std::byte* rows, const uint32_t* queries,
                                                       Lane lane, float (&products)[2][4]) {
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    // Matrices: rows 0 ... 7 and 8 ... 15 of a tile, of eight channels and the next eight.
    const std::byte* const row = rows + in_warp % 16 * kRowBytes + in_warp / 16 * 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint32_t first = queries[k * 8 + lane.t];
      const uint32_t second = queries[k * 8 + 4 + lane.t];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
        cuda::load_matrices(a, row + tile * 16 * kRowBytes + k * 32);
        cuda::multiply_accumulate<__half>(products[tile], a, first, second);
      }
    }
  }

  // Adds values with their weights: rows g and g + 8 of outputs[j] are channels 16 j + 2 g and the next one.
  static __device__ __forceinline__ void multiply_values(const std::byte* rows,
                                                         const uint32_t (&weights)[2][2],
                                                         float (&outputs)[kDim / 16][4]) {
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    // Matrices: eight tokens of even channels, of odd channels, and the same of the next eight tokens.
    const std::byte* const row = rows + (in_warp / 16 * 8 + in_warp % 8) * kRowBytes + in_warp / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
        cuda::load_transposed(a, row + tile * 16 * kRowBytes + j * 32);
        cuda::multiply_accumulate<__half>(outputs[j], a, weights[tile][0], weights[tile][1]);
      }
    }
  }

  // Calls emit(channel, column c, sums of two neighbouring channels).
  template <class Emit>
  static __device__ __forceinline__ void for_sums(const float (&outputs)[kDim / 16][4], Lane lane,
                                                  Emit emit) {
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) emit(16 * j + 2 * lane.g, c, float2{outputs[j][c], outputs[j][2 + c]});
    }
  }
};

}  // namespace quantloom::kv_cache
