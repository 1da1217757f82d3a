// Trellis codes decoded to rows of float16, in the basis of the codes, for products of many tokens by
// cuBLASLt. Bound by the memory that it writes.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "kernels/trellis_operands.cuh"
#include "kernels/trellis_panel_launch.hpp"

namespace quantloom::cuda {

constexpr int kDenseThreads = 256;

// Sixteen columns of a row: words kFirst + 4 a and the next.
template <class Decoder, int kFirst>
__device__ __forceinline__ void store_columns(const typename Decoder::Windows& windows, const TrellisMap& map,
                                              __half* to) {
  auto* const pieces = reinterpret_cast<uint4*>(to);
  pieces[0] = make_uint4(
      Decoder::template word<kFirst>(windows, map), Decoder::template word<kFirst + 4>(windows, map),
      Decoder::template word<kFirst + 8>(windows, map), Decoder::template word<kFirst + 12>(windows, map));
  pieces[1] = make_uint4(
      Decoder::template word<kFirst + 1>(windows, map), Decoder::template word<kFirst + 5>(windows, map),
      Decoder::template word<kFirst + 9>(windows, map), Decoder::template word<kFirst + 13>(windows, map));
}

// A warp for each block of 64 x 64. A lane has 16 columns of two rows of each unit.
template <class Decoder>
__global__ void __launch_bounds__(kDenseThreads)
    decode_dense(const uint4* codes, int64_t blocks, int column_blocks, const TrellisMap map, __half* out) {
  constexpr int kBits = Decoder::kBits;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t stride = int64_t{64} * column_blocks;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kDenseThreads / 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kDenseThreads / 32) + threadIdx.x / 32; i < blocks;
       i += warps) {
    uint4 pieces[kBits];
#pragma unroll
    for (int c = 0; c < kBits; ++c) pieces[c] = __ldcs(codes + (i * kBits + c) * 32 + lane);
    const int64_t row_block = i / column_blocks;
    const int64_t column_block = i - row_block * column_blocks;
    __half* const to = out + (row_block * 64 + lane / 4) * stride + column_block * 64 + lane % 4 * 16;
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      uint32_t words[kBits];
#pragma unroll
      for (int w = 0; w < kBits; ++w) {
        const int at = unit * kBits + w;
        const uint4& piece = pieces[at / 4];
        words[w] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
      }
      const typename Decoder::Windows windows(words);
      // Of each eight positions, the first four are of row lane / 4: columns 2 a and 2 a + 8 of the tile.
      store_columns<Decoder, 0>(windows, map, to + (16 * unit) * stride);
      store_columns<Decoder, 2>(windows, map, to + (16 * unit + 8) * stride);
    }
  }
}

template <int kBits, TrellisHash kHash>
void launch_trellis_dense(const TrellisDense& dense, cudaStream_t stream) {
  if (dense.blocks == 0) return;
  constexpr int64_t kMostGrid = int64_t{1} << 20;
  const int64_t grid = std::min((dense.blocks + kDenseThreads / 32 - 1) / (kDenseThreads / 32), kMostGrid);
  decode_dense<TrellisExact<kBits, kHash>><<<static_cast<unsigned>(grid), kDenseThreads, 0, stream>>>(
      dense.codes, dense.blocks, dense.column_blocks, dense.map, dense.out);
  check_cuda(cudaGetLastError(), "matmul_cuda: launch of decode_dense");
}

}  // namespace quantloom::cuda
