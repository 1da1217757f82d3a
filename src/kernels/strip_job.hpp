// What the SIMD loops of matmul get: one tile of tokens against a range of strips.
#pragma once

#include <cstdint>

#include "kernels/prepared_strips.hpp"

namespace quantloom::kernels {

inline constexpr int kMaxTileTokens = 8;

// The matrix, as the loops see it.
struct StripMatrix {
  const uint8_t* stream = nullptr;
  int64_t strip_bytes = 0;
  int64_t rows = 0;
  const GroupPlan* groups = nullptr;
  int64_t group_count = 0;
  int block_columns = kBlockColumns;  // of the plan's full blocks, a multiple of the columns of a step
  int container_bits = 0;
  DType scale_dtype = DType::f16;
  bool has_zeros = false;
  bool real_zeros = false;  // float32, else uint8
  float center = 0.0F;
  const float* table = nullptr;  // of a codebook: the value of each code of the container
};

// Activations of `tokens` tokens in a tile of 1, 2, 4 or 8 (the missing ones are 0), interleaved: the value
// of token t for item i lies at i * tile + t, so that one pointer serves all tokens.
struct ExactTile {
  int tile = 1;
  int tokens = 1;
  const float* x = nullptr;          // items: prepared columns
  const float* group_sum = nullptr;  // items: groups; sums of x, read only if the matrix has zero points
  float* y = nullptr;
  int64_t y_stride = 0;
};

struct Int8Tile {
  int tile = 1;
  int tokens = 1;
  const int32_t* x = nullptr;       // items: dwords of four int8 codes of consecutive prepared columns
  const float* scale = nullptr;     // items: blocks
  const int32_t* start = nullptr;   // items: blocks; -zero * (sum of codes) for symmetric grids, else 0
  const float* code_sum = nullptr;  // items: blocks; sums of codes, read only if the matrix has zero points
  float* y = nullptr;
  int64_t y_stride = 0;
};

// Write y for the rows of strips [first, last).
void multiply_strips_exact(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last);
void multiply_strips_int8(const StripMatrix& w, const Int8Tile& tile, int64_t first, int64_t last);

// Rounds one token's inputs x [padded columns] to int8 codes, block by block: scale = max|x| / 127,
// code = x * (127 / max|x|) rounded half to even. The same result on every instruction set. Returns the
// index of the first input that is not finite, -1 if all are.
int64_t quantize_token(const float* x, const GroupPlan* groups, int64_t group_count, int step_columns,
                       int8_t* codes, float* scales, int32_t* sums);

// The instruction set that the three functions above run on.
const char* strip_target();

}  // namespace quantloom::kernels
