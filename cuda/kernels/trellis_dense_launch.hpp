// What a trellis matrix is decoded with, row by row.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/trellis_launch.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/formats/trellis_shape.hpp"

namespace quantloom::cuda {

// Bands of 128 rows of a matrix, to rows of `dtype`.
struct TrellisDense {
  const uint4* codes = nullptr;  // as prepared
  const uint16_t* table = nullptr;
  const __half* input_scales = nullptr;
  const __half* output_scales = nullptr;
  TrellisMap map;
  TrellisShape ring;
  TrellisCode code = TrellisCode::mul1;
  bool fragments = false;
  bool rotated = false;
  int bands = 0;
  int column_blocks = 0;  // of 64 columns; even
  int n = 0;
  int k = 0;
  DType dtype = DType::f16;
  void* out = nullptr;  // aligned to 16 bytes
  int64_t stride = 0;   // elements, a multiple of 8, at least 64 * column_blocks
};

// To the values that the format defines: n rows of 64 * column_blocks, those from k on zero. Defined for each
// number of bits in a translation unit of its own; whole bits in fragment order, windows of 16.
template <int kBits, TrellisHash kHash>
void launch_trellis_decode(const TrellisDense& dense, cudaStream_t stream);
// The same of any codes.
void launch_trellis_decode_any(const TrellisDense& dense, cudaStream_t stream);

// To float16 or bfloat16 with one more rounding, to float16 between the rotations: 128 * bands rows, those
// from n on and columns from k on zero.
template <int kBits, TrellisHash kHash>
void launch_trellis_dense(const TrellisDense& dense, cudaStream_t stream);
void launch_trellis_dense_any(const TrellisDense& dense, cudaStream_t stream);

}  // namespace quantloom::cuda
