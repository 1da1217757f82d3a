// A block of CUDA threads on the CPU: one thread of the processor for each, barriers where device code waits,
// and the names of CUDA that the Hadamard kernels use. Shared memory begins as NaN.
#pragma once

#include <array>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "quantloom/dtype.hpp"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Of this file's own, because other tests and the CUDA runtime have the same names.
namespace {

struct EmulatedPlace {
  unsigned x = 0;
};
thread_local EmulatedPlace threadIdx;
thread_local EmulatedPlace blockIdx;
thread_local EmulatedPlace blockDim;
thread_local EmulatedPlace gridDim;

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
float2 make_float2(float x, float y) {
  return {x, y};
}

struct __half {
  uint16_t bits;
};
struct __half2 {
  uint16_t low, high;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  uint16_t low, high;
};
__half __float2half_rn(float value) {
  return {quantloom::f16_from_float(value)};
}
float __half2float(__half value) {
  return quantloom::float_from_f16(value.bits);
}
float2 __half22float2(__half2 value) {
  return {quantloom::float_from_f16(value.low), quantloom::float_from_f16(value.high)};
}
__half2 __halves2half2(__half low, __half high) {
  return {low.bits, high.bits};
}
__nv_bfloat16 __float2bfloat16_rn(float value) {
  return {quantloom::bf16_from_float(value)};
}
float __bfloat162float(__nv_bfloat16 value) {
  return quantloom::float_from_bf16(value.bits);
}
__nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
  return {low.bits, high.bits};
}
__half2 __floats2half2_rn(float low, float high) {
  return {quantloom::f16_from_float(low), quantloom::f16_from_float(high)};
}
__nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {quantloom::bf16_from_float(low), quantloom::bf16_from_float(high)};
}
float __uint_as_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
uint32_t __float_as_uint(float value) {
  return std::bit_cast<uint32_t>(value);
}
float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
using std::isfinite;

namespace emulated {

// What the threads of a block share.
class Block {
 public:
  Block(int threads, int64_t shared_bytes)
      : all(threads),
        values(static_cast<size_t>(threads)),
        words(static_cast<size_t>(threads)),
        rows(static_cast<size_t>(threads)),
        memory(static_cast<size_t>(shared_bytes / 16 + 1), float4{NAN, NAN, NAN, NAN}) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
  }

  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  // By thread, for exchanges within a warp.
  std::vector<float> values;
  std::vector<std::array<uint32_t, 6>> words;
  std::vector<const void*> rows;
  std::vector<float4> memory;
};
thread_local Block* block = nullptr;

// Runs `kernel` in every thread of `blocks` blocks, one block after the other.
template <class Kernel>
void launch(int blocks, int threads, int64_t shared_bytes, const Kernel& kernel) {
  for (int index = 0; index < blocks; ++index) {
    Block shared(threads, shared_bytes);
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([&, thread] {
        block = &shared;
        threadIdx.x = static_cast<unsigned>(thread);
        blockIdx.x = static_cast<unsigned>(index);
        blockDim.x = static_cast<unsigned>(threads);
        gridDim.x = static_cast<unsigned>(blocks);
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulated

void __syncthreads() {
  emulated::block->all.arrive_and_wait();
}
void __syncwarp() {
  emulated::block->warps[threadIdx.x / 32]->arrive_and_wait();
}
float __shfl_xor_sync(uint32_t /*mask*/, float value, int lanes) {
  emulated::block->values[threadIdx.x] = value;
  __syncwarp();
  const float other = emulated::block->values[threadIdx.x ^ static_cast<unsigned>(lanes)];
  __syncwarp();
  return other;
}

}  // namespace
