// Products of many tokens with trellis codes: activations are scaled, rotated and put in the order of the
// decoder, tiles are multiplied on warpgroup products, and sums are added, rotated and scaled.
#pragma once

#include <cstdint>

#include "kernels/tile_support.cuh"
#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

// The loop alone: float16 activations in work.tokens, sums of tiles that lie in one part to
// launch.arguments.y as float16, others to work.partials. Defined for each number of bits in a translation
// unit of its own.
template <int kBits, TrellisHash kHash>
void launch_trellis_tiles(const ProductLaunch& launch, const TileWork& work);

// Where things lie in the workspace.
struct TrellisTileWork {
  TileWork tiles;
  __half* sums = nullptr;    // [m, 64 * row_blocks], of the tiles that lie in one part
  float* factors = nullptr;  // [m]: what the sums of a token are worth
  int row_blocks = 0;
};

// Activations into the workspace; sums out of it. overlap: launched before the previous kernel has ended.
void launch_trellis_rotate_in(const TrellisProduct& p, const TrellisTileWork& work, bool overlap,
                              cudaStream_t stream);
void launch_trellis_rotate_out(const TrellisProduct& p, const TrellisTileWork& work, cudaStream_t stream);

}  // namespace quantloom::cuda
