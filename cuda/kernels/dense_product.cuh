// The product of a dense matrix, by cuBLASLt.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

constexpr int64_t kLibraryBytes = int64_t{32} << 20;  // of workspace for cuBLASLt

// y [m, n] = x [m, k] W[n, k]^T + bias; rows follow each other at the strides.
struct DenseProduct {
  int64_t n;
  int64_t k;
  int64_t m;
  const void* w;
  int64_t w_stride;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* y;
  int64_t y_stride;
  DType dtype;
};

// `workspace` of kLibraryBytes. float32 sums; throws Unsupported where cuBLASLt has no algorithm.
void multiply_dense(const DenseProduct& product, void* workspace, cudaStream_t stream);

}  // namespace quantloom::cuda
