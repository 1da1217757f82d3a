// What the product loops get: a matrix in fragment order, activations, and where the result goes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/stream_deal.hpp"
#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

// Weights beside the codes, as rows of (column, value); all null if there are none.
struct OutlierEntries {
  const int32_t* offsets = nullptr;  // [n + 1]
  const void* columns = nullptr;     // uint16, or int32 if wide_columns
  const void* values = nullptr;      // float16
  const int32_t* places = nullptr;   // [k] of inputs among the padded columns, or null: columns in place
  bool wide_columns = false;
};

// A matrix in fragment order; see PreparedPlanes for the shapes.
struct FragmentMatrix {
  const uint4* codes = nullptr;
  const void* scales = nullptr;     // format spqr: codes of scales and zero points, else scales
  const uint8_t* zeros = nullptr;   // or null
  const void* table = nullptr;      // float16 [table_entries], or null; format spqr: grids
  const int32_t* source = nullptr;  // [64 * column_blocks], or null
  int64_t n = 0;
  int64_t k = 0;
  int row_blocks = 0;
  int column_blocks = 0;
  int group_count = 1;
  int group_steps = 1;  // steps of 16 columns in a group
  int table_entries = 0;
  int grid_rows = 0;  // format spqr: rows whose scales, and zero points, lie on one grid; else 0
  DType scale_dtype = DType::f16;
  OutlierEntries outliers;
};

struct ProductArguments {
  FragmentMatrix w;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  int m = 0;
  // True if rows of x can be read in pieces of 16 bytes: base, stride and k are multiples of 8 elements,
  // and columns stay in place.
  bool x_in_pieces = false;
  bool overlap = false;      // launched before the previous kernel has ended
  float* partial = nullptr;  // for parts of sums, or null: they meet in shared memory
};

// How to launch a product.
struct ProductLaunch {
  ProductArguments arguments;
  DType dtype = DType::f16;
  int splits = 1;     // of the tile loops
  StreamDeal deal{};  // of the streaming loop
  bool overlap = false;
  cudaStream_t stream = nullptr;
};

}  // namespace quantloom::cuda
