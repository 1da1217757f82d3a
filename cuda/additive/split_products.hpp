// Products of float32 matrices by tensor cores: each matrix is the sum of two of TF32, and three of their
// four products are taken, so that about 21 bits of each value count.
#pragma once

#include "common/math_handles.hpp"

namespace quantloom::cuda {

// high + low = from, but for the last bits of low; high is of TF32. `from` may be `low`.
void split(const float* from, float* high, float* low, int64_t count, cudaStream_t stream);

#ifdef __CUDACC__
__device__ __forceinline__ float tf32_part(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x1000U) & 0xffffe000U);
}
#endif

struct SplitMatrix {
  const float* high;
  const float* low;
  int stride;
};

// products [m, n] = a h, with h [k, n], row-major; those of `products` are `product_stride` apart.
void multiply(const BlasScope& blas, int m, int n, int k, const SplitMatrix& a, const SplitMatrix& h,
              float* products, int product_stride);

}  // namespace quantloom::cuda
