// The arithmetic of producers.hpp, the same operations in the same order on the CPU and on CUDA devices. Both
// are compiled without contraction of products and sums.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define QUANTLOOM_BOTH __host__ __device__ __forceinline__
#else
#define QUANTLOOM_BOTH inline
#endif

namespace quantloom::producers {

inline constexpr int kNeighbours = 8;

QUANTLOOM_BOTH float sum_of_neighbours(const float (&v)[kNeighbours]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
// Of the first `count`.
QUANTLOOM_BOTH float squares_of_neighbours(const float (&v)[kNeighbours], float mean, int count) {
  float squares[kNeighbours];
  for (int i = 0; i < kNeighbours; ++i) {
    const float d = v[i] - mean;
    squares[i] = i < count ? d * d : 0.0F;
  }
  return sum_of_neighbours(squares);
}

QUANTLOOM_BOTH float mean_of(double sum, int64_t k) {
  return static_cast<float>(sum / static_cast<double>(k));
}
QUANTLOOM_BOTH float norm_factor(double squares, int64_t k, float epsilon) {
  return static_cast<float>(1.0 / sqrt(squares / static_cast<double>(k) + static_cast<double>(epsilon)));
}

struct NormTerms {
  float mean;  // 0 for rms_norm
  float factor;
};
QUANTLOOM_BOTH float normalized(float x, NormTerms terms, float weight, float bias) {
  return (x - terms.mean) * terms.factor * weight + bias;
}

QUANTLOOM_BOTH float silu(float x) {
  // exp(-x) = 2^t; beyond these t, 1 + 2^t is 1 or x / 2^t below all but the least float32.
  const float scaled = x * -0x1.715476p+0F;
  const float t = scaled > 127.0F ? 127.0F : scaled < -125.0F ? -125.0F : scaled;
  const float shifted = t + 0x1.8p23F;
  const float f = t - (shifted - 0x1.8p23F);
  float p = 0x1.5bba14p-10F;
  p = fmaf(p, f, 0x1.3cea88p-7F);
  p = fmaf(p, f, 0x1.c6b752p-5F);
  p = fmaf(p, f, 0x1.ebf9bcp-3F);
  p = fmaf(p, f, 0x1.62e42ap-1F);
  p = fmaf(p, f, 1.0F);
  // The low bits of `shifted` are the integer part of t.
  const uint32_t bits = __builtin_bit_cast(uint32_t, p) + (__builtin_bit_cast(uint32_t, shifted) << 23);
  return x * (1.0F / (1.0F + __builtin_bit_cast(float, bits)));
}

}  // namespace quantloom::producers

#undef QUANTLOOM_BOTH
