// Products of many tokens with trellis codes: activations are scaled, rotated and put in the order of the
// decoder, tiles are multiplied on warpgroup products, and sums are rotated and scaled.
#pragma once

#include <cstdint>

#include "kernels/tile_products.cuh"
#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

// float16 in and out. Defined for each number of bits in a translation unit of its own.
template <int kBits, TrellisHash kHash>
void launch_trellis_tiles(const ProductLaunch& launch, void* workspace);

// Where things lie in the workspace.
struct TrellisTileWork {
  int64_t activations = 0;  // float16 [m, 64 * column_blocks]
  int64_t sums = 0;         // float16 [m, 64 * row_blocks]
  int64_t ones = 0;         // float16 [64 * row_blocks]: the scales of the tile loop
  int64_t factors = 0;      // float [m]: what the sums of a token are worth
  int64_t tiles = 0;        // the tile loop's own
  int64_t bytes = 0;
};

// Activations into the workspace, in the order of trellis_column(), and ones for the tile loop; sums out of
// it.
void launch_trellis_rotate_in(const TrellisProduct& p, int row_blocks, const TrellisTileWork& work,
                              unsigned char* workspace, cudaStream_t stream);
void launch_trellis_rotate_out(const TrellisProduct& p, int row_blocks, const TrellisTileWork& work,
                               const unsigned char* workspace, cudaStream_t stream);

}  // namespace quantloom::cuda
