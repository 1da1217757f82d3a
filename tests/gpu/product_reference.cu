#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/check.cuh"
#include "product_reference.hpp"

namespace quantloom {
namespace {

constexpr int kTile = 16;

__device__ float to_float(__half value) {
  return __half2float(value);
}
__device__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ float to_float(float value) {
  return value;
}
__device__ void round_to(float value, float& out) {
  out = value;
}
__device__ void round_to(float value, __half& out) {
  out = __float2half_rn(value);
}
__device__ void round_to(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}
__device__ void round_to(double value, double& out) {
  out = value;
}

// A thread computes one element; a block stages 16 columns of 16 tokens and 16 rows at a time.
template <class T, class Sum, class Out, bool kRoundWeights>
__global__ void multiply_slowly(const T* x, int64_t x_stride, const float* w, const T* bias, Out* y,
                                int64_t m, int64_t n, int64_t k) {
  __shared__ float x_tile[kTile][kTile + 1];
  __shared__ float w_tile[kTile][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x);
  const int ty = static_cast<int>(threadIdx.y);
  const int64_t token = static_cast<int64_t>(blockIdx.y) * kTile + ty;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile + tx;
  const int64_t loaded_row = static_cast<int64_t>(blockIdx.x) * kTile + ty;
  Sum sum = 0;
  for (int64_t first = 0; first < k; first += kTile) {
    const int64_t column = first + tx;
    float weight = loaded_row < n && column < k ? w[loaded_row * k + column] : 0.0F;
    if (kRoundWeights) {
      T rounded;
      round_to(weight, rounded);
      weight = to_float(rounded);
    }
    w_tile[ty][tx] = weight;
    x_tile[ty][tx] = token < m && column < k ? to_float(x[token * x_stride + column]) : 0.0F;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      sum += static_cast<Sum>(x_tile[ty][i]) * static_cast<Sum>(w_tile[tx][i]);
    }
    __syncthreads();
  }
  if (token >= m || row >= n) return;
  if (bias != nullptr) sum += static_cast<Sum>(to_float(bias[row]));
  round_to(sum, y[token * n + row]);
}

template <class T, class Sum, class Out, bool kRoundWeights>
void launch(const SlowProduct& p, Out* y) {
  if (p.m == 0 || p.n == 0) return;
  const dim3 grid(static_cast<unsigned>((p.n + kTile - 1) / kTile),
                  static_cast<unsigned>((p.m + kTile - 1) / kTile));
  multiply_slowly<T, Sum, Out, kRoundWeights><<<grid, dim3(kTile, kTile)>>>(
      static_cast<const T*>(p.x), p.x_stride, p.w, static_cast<const T*>(p.bias), y, p.m, p.n, p.k);
  check_cuda(cudaGetLastError(), "launch of multiply_slowly");
}

__global__ void hash_words(uint32_t* words, int64_t count, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    words[i] = hash_word(seed, static_cast<uint64_t>(i));
  }
}

__global__ void stir(uint32_t* words, int64_t count, int passes) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
      words[i] = words[i] * 1664525U + 1013904223U;
    }
  }
}

}  // namespace

void SlowProduct::in_float64(double* y) const {
  if (dtype == DType::f16) {
    launch<__half, double, double, false>(*this, y);
  } else if (dtype == DType::f32) {
    launch<float, double, double, false>(*this, y);
  } else {
    launch<__nv_bfloat16, double, double, false>(*this, y);
  }
}

void SlowProduct::in_dtype(void* y) const {
  if (dtype == DType::f16) {
    launch<__half, float, __half, true>(*this, static_cast<__half*>(y));
  } else if (dtype == DType::f32) {
    launch<float, float, float, true>(*this, static_cast<float*>(y));
  } else {
    launch<__nv_bfloat16, float, __nv_bfloat16, true>(*this, static_cast<__nv_bfloat16*>(y));
  }
}

void fill_with_hash(uint32_t* words, int64_t count, uint64_t seed) {
  hash_words<<<1024, 256>>>(words, count, seed);
  check_cuda(cudaGetLastError(), "launch of hash_words");
}

void keep_busy(uint32_t* words, int64_t count, int passes, void* stream) {
  stir<<<32, 256, 0, static_cast<cudaStream_t>(stream)>>>(words, count, passes);
  check_cuda(cudaGetLastError(), "launch of stir");
}

}  // namespace quantloom
