// Slow products on the device, with which the kernels are compared, and words that both sides can compute.
#pragma once

#include <cstdint>

#include "quantloom/dtype.hpp"

#ifdef __CUDACC__
#define QUANTLOOM_TEST_BOTH __host__ __device__
#else
#define QUANTLOOM_TEST_BOTH
#endif

namespace quantloom {

// Activations and bias of dtype (float16, bfloat16 or float32), weights float32 [n, k]; all on the device,
// rows of x `x_stride` elements apart, the results next to each other. bias may be null. They do not
// synchronize.
struct SlowProduct {
  const void* x = nullptr;
  int64_t x_stride = 0;
  const float* w = nullptr;
  const void* bias = nullptr;
  DType dtype = DType::f16;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;

  // y [m, n]: sums in float64, one term after the other.
  void in_float64(double* y) const;
  // y [m, n] of dtype: weights rounded to dtype first, sums in float32, the result rounded to dtype.
  void in_dtype(void* y) const;
};

// A word that looks random: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
QUANTLOOM_TEST_BOTH inline uint32_t hash_word(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

// words[i] = hash_word(seed, i) on the device.
void fill_with_hash(uint32_t* words, int64_t count, uint64_t seed);

// Keeps the device busy on `stream` for a while: `passes` passes over `count` words.
void keep_busy(uint32_t* words, int64_t count, int passes, void* stream);

}  // namespace quantloom
