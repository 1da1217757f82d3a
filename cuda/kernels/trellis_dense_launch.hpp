// What a trellis matrix is decoded with for products of many tokens.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

// Bands of 128 rows of a matrix in fragment order, to float16 or bfloat16 [128 * bands, 64 * column_blocks].
// Rows from n on and columns from k on are zero.
struct TrellisDense {
  const uint4* codes = nullptr;
  const __half* input_scales = nullptr;
  const __half* output_scales = nullptr;
  TrellisMap map;
  int bands = 0;
  int column_blocks = 0;  // even
  int n = 0;
  int k = 0;
  bool rotated = false;
  bool bfloat16 = false;
  uint16_t* out = nullptr;
};

// Weights as the format defines them, but for a rounding to float16 between the rotations. Defined for each
// number of bits in a translation unit of its own.
template <int kBits, TrellisHash kHash>
void launch_trellis_dense(const TrellisDense& dense, cudaStream_t stream);

}  // namespace quantloom::cuda
