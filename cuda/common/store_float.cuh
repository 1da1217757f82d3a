// The counterpart of common/load_float.cuh: one element, rounded to the nearest, ties to even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::f16) {
    static_cast<__half*>(data)[i] = __float2half_rn(value);
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

}  // namespace quantloom::cuda
