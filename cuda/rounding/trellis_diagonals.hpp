// The steps of error feedback along rows and columns at once: tiles of 16 x 16 on a diagonal, which do not
// depend on each other. The walk and its notation are those of rounding/trellis_two_sided.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace quantloom::cuda {

// One side: the order of its positions, by tiles, and the factor U [size, stride] in that order.
struct DiagonalSide {
  const int32_t* order = nullptr;
  const float* upper = nullptr;
  int64_t stride = 0;
};

// What the walk works on. weights [n, k], in their own order; along_rows, along_columns [n, k] by positions.
struct DiagonalWalk {
  const float* weights = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  DiagonalSide input;
  DiagonalSide output;
  float* along_rows = nullptr;
  float* along_columns = nullptr;
};

// The tiles `first`, ... of a diagonal: tile i is at rows 16 (first + i), columns 16 (diagonal - first - i).
struct Diagonal {
  int64_t diagonal = 0;
  int64_t first = 0;
  int64_t count = 0;
};

// left, targets [16 count, 16]: what tiles before leave of each tile of weights, those of its rows alone, and
// those of its columns too.
void gather_diagonal(const DiagonalWalk& walk, const Diagonal& which, float* left, float* targets,
                     cudaStream_t stream);
// The errors of tiles that were decoded to `decoded` [16 count, 16], and their rings' words [count,
// ring_words] to their places in all_words [k / 16, n / 16, ring_words].
void finish_diagonal(const DiagonalWalk& walk, const Diagonal& which, const float* left, const float* targets,
                     const float* decoded, const uint32_t* words, int64_t ring_words, uint32_t* all_words,
                     cudaStream_t stream);

}  // namespace quantloom::cuda
