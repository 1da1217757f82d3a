// A view of a matrix in memory of a CUDA device.
#pragma once

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom {

// A row-major matrix [rows, cols] of float32, float16 or bfloat16 on the current CUDA device; row r begins at
// element r * stride. The functions that take one check its fields.
struct CudaMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // at least cols
};

}  // namespace quantloom
