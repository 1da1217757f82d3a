// What the SIMD loops of trellis products get: a range of tiles of one strip against a batch of tokens.
//
// Kernel order: kTrellisLanes tiles next to each other along the outputs form a strip, whose words lie
// interleaved, so that a vector holds the same word of each tile, and windows are cut out of all of them by
// the same shifts:
//   for each strip, for each 16 inputs, for each word of a ring: that word of the strip's tiles
// Tiles that the last strip lacks are rings of zeros; their outputs are dropped.
#pragma once

#include <cstdint>

#include "quantloom/formats/trellis_shape.hpp"

namespace quantloom::kernels {

inline constexpr int kTrellisLanes = 16;
inline constexpr int64_t kTrellisOutputs = int64_t{16} * kTrellisLanes;  // of a strip

struct TrellisMatrix {
  const uint32_t* words = nullptr;
  int64_t tile_columns = 0;  // tiles along the inputs
  TrellisCode code = TrellisCode::mul1;
  uint32_t multiplier = 0;
  // Of hyb and table: the weights of an entry, or pairs of float16 numbers, the first one in the low half.
  const float* table = nullptr;
  const uint32_t* pairs = nullptr;
  TrellisShape ring;
};

// Tiles of a block of inputs that share a scale when they are int8 codes.
inline constexpr int64_t kTrellisBlockTiles = 8;

struct TrellisJob {
  int64_t strip = 0;
  int64_t first_tile = 0;  // along the inputs, a multiple of kTrellisBlockTiles
  int64_t tiles = 0;
  // Of all inputs of the matrix:
  const float* x = nullptr;  // [tokens, 16 * tile_columns]
  // Or, for int8 activations: the code of each input in all bytes of a dword, and of each block of inputs the
  // scale and the sum of the codes.
  const int32_t* codes = nullptr;     // [tokens, 16 * tile_columns]
  const float* code_scale = nullptr;  // [tokens, blocks]
  const int32_t* code_sum = nullptr;  // [tokens, blocks]
  int64_t tokens = 0;
  float* workspace = nullptr;  // trellis_workspace(tokens) numbers, aligned to 64 bytes
  float* y = nullptr;          // [tokens, kTrellisOutputs]
  int64_t y_stride = 0;
  bool add = false;  // to y, once all tiles are summed up; else y is overwritten
};

int64_t trellis_workspace(int64_t tokens);

// Each output sums its inputs in an order of its own tiles alone: y does not depend on the other tokens.
void multiply_trellis_tiles(const TrellisMatrix& w, const TrellisJob& job);

// The same with codes: of mul1 and one_mad the sum of scale * (code * (sum of the hash's bytes - 510)), which
// is not brought to the weights' own scale and offset. The same numbers on every instruction set.
void multiply_trellis_tiles_int8(const TrellisMatrix& w, const TrellisJob& job);

}  // namespace quantloom::kernels
