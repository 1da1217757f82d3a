// A linear layer for the benchmarks of roundings, and times of calls that wait for the device.
//
// Weights are random, inputs have a few strong features and depend on one another.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "common/device_buffer.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom::bench {

// A number in [0, 1) that depends on (seed, i) alone.
__device__ __forceinline__ float uniform_at(uint64_t seed, uint64_t i) {
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-24F;
}

__device__ __forceinline__ float normal_at(uint64_t seed, uint64_t i) {
  const float radius = sqrtf(-2.0F * logf(1.0F - uniform_at(seed, 2 * i)));
  return radius * cospif(2.0F * uniform_at(seed, 2 * i + 1));
}

__global__ void fill_normal(__half* out, int64_t count, float scale, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    out[i] = __float2half_rn(scale * normal_at(seed, static_cast<uint64_t>(i)));
  }
}

// Features share 32 hidden factors, differ in energy, and one in 200 is ten times as strong.
__global__ void fill_inputs(__half* out, int64_t first_token, int64_t tokens, int64_t k) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * k; i += step) {
    const auto token = static_cast<uint64_t>(first_token + i / k);
    const auto feature = static_cast<uint64_t>(i % k);
    float value = normal_at(1, token * static_cast<uint64_t>(k) + feature);
    for (uint64_t f = 0; f < 32; f += 8) {
      value += 0.5F * normal_at(2, token * 32 + f + feature % 8) * normal_at(3, feature * 32 + f);
    }
    const float energy =
        expf(0.5F * normal_at(4, feature)) * (uniform_at(5, feature) < 0.005F ? 10.0F : 1.0F);
    out[i] = __float2half_rn(0.1F * energy * value);
  }
}

// Seconds of one call, the best of the repeats; the first call warms up.
template <class Run>
double seconds_of(int repeats, const Run& run) {
  using Clock = std::chrono::steady_clock;
  double best = std::numeric_limits<double>::infinity();
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    check_cuda(cudaDeviceSynchronize(), "synchronize");
    const Clock::time_point begin = Clock::now();
    run();
    check_cuda(cudaDeviceSynchronize(), "synchronize");
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (repeat > 0) best = std::min(best, seconds);
  }
  return best;
}

class Layer {
 public:
  Layer(int64_t n, int64_t k, int64_t tokens) : n_(n), weights_(n * k, nullptr), hessian_(k) {
    fill_normal<<<4096, 256>>>(weights_.data(), n * k, 0.02F, 7);
    check_cuda(cudaGetLastError(), "launch");
    constexpr int64_t kBatch = 4096;
    const cuda::DeviceBuffer<__half> inputs(kBatch * k, nullptr);
    double seconds = 0;
    for (int64_t token = 0; token < tokens; token += kBatch) {
      fill_inputs<<<4096, 256>>>(inputs.data(), token, kBatch, k);
      check_cuda(cudaDeviceSynchronize(), "inputs");
      const auto begin = std::chrono::steady_clock::now();
      hessian_.add({inputs.data(), DType::f16, kBatch, k, k}, nullptr);
      check_cuda(cudaDeviceSynchronize(), "Hessian");
      if (token > 0) {
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      }
    }
    tokens_per_second_ = static_cast<double>(tokens - kBatch) / std::max(seconds, 1e-9);
  }
  CudaMatrix w() const { return {weights_.data(), DType::f16, n_, hessian_.k(), hessian_.k()}; }
  const CudaHessian& hessian() const { return hessian_; }
  double tokens_per_second() const { return tokens_per_second_; }  // of the Hessian

 private:
  int64_t n_;
  cuda::DeviceBuffer<__half> weights_;
  CudaHessian hessian_;
  double tokens_per_second_ = 0;
};

}  // namespace quantloom::bench
