// Reading one element of a float32, float16 or bfloat16 array as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f16) return __half2float(static_cast<const __half*>(data)[i]);
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

}  // namespace quantloom::cuda
