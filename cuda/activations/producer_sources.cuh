// The sources of producers.hpp: norms and the gated activation, whose results are rounded to the dtype of x
// before they are rounded to integers.
#pragma once

#include <cstdint>

#include "activations/producer_arithmetic.hpp"
#include "activations/token_kernel.cuh"
#include "activations/token_values.cuh"

namespace quantloom::cuda {

// The sum over the block, for every thread. `parts`: shared memory for kMostTokenThreads / 32 sums, that
// nothing else uses until the next __syncthreads().
__device__ __forceinline__ double block_sum_of(double value, double* parts) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? parts[lane] : 0.0;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

// A vector of parameters in float32 or the dtype of the values; neither: all `missing`.
template <class T>
struct NormVector {
  TokenMatrix<T> own;
  TokenMatrix<float> wide;
  float missing;
  float added;

  __device__ __forceinline__ void load(int v, float (&found)[kVectorValues]) const {
    if (wide.data != nullptr) {
      const TokenVector<float> values = wide.load(0, v);
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) found[i] = values.value(i) + added;
    } else if (own.data != nullptr) {
      const TokenVector<T> values = own.load(0, v);
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) found[i] = values.value(i) + added;
    } else {
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) found[i] = missing;
    }
  }
};

template <class T>
struct NormSource {
  using Value = T;
  using Raw = TokenVector<T>;
  using Terms = producers::NormTerms;
  static constexpr bool kEveryShape = false;

  TokenMatrix<T> x;
  NormVector<T> weight;
  NormVector<T> bias;
  float epsilon;
  bool centred;

  template <int kVectors>
  __device__ __forceinline__ void load_all(int64_t row, int thread, int threads,
                                           Raw (&found)[kVectors]) const {
    x.load_all(row, thread, threads, found);
  }
  __device__ __forceinline__ Raw load(int64_t row, int v) const { return x.load(row, v); }

  template <class Each>
  __device__ __forceinline__ Terms measure(int64_t, const Each& each) const {
    __shared__ double parts[2][kMostTokenThreads / 32];
    Terms terms{0.0F, 0.0F};
    if (centred) {
      double sum = 0;
      each([&](const Raw& raw, int) {
        float values[kVectorValues];
        floats(raw, values);
        sum += static_cast<double>(producers::sum_of_neighbours(values));
      });
      terms.mean = producers::mean_of(block_sum_of(sum, parts[0]), x.cols);
    }
    double squares = 0;
    each([&](const Raw& raw, int v) {
      float values[kVectorValues];
      floats(raw, values);
      const int64_t left = x.cols - int64_t{v} * kVectorValues;
      const int count = left >= kVectorValues ? kVectorValues : static_cast<int>(left);
      squares += static_cast<double>(producers::squares_of_neighbours(values, terms.mean, count));
    });
    terms.factor = producers::norm_factor(block_sum_of(squares, parts[1]), x.cols, epsilon);
    return terms;
  }

  __device__ __forceinline__ TokenVector<T> finish(const Raw& raw, int v, Terms terms) const {
    TokenVector<T> found = TokenVector<T>::zeros();
    const int64_t left = x.cols - int64_t{v} * kVectorValues;
    if (left <= 0) return found;
    float weights[kVectorValues];
    float offsets[kVectorValues];
    weight.load(v, weights);
    bias.load(v, offsets);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      const float value = producers::normalized(raw.value(i), terms, weights[i], offsets[i]);
      if (i < left) found.put(i, ValueBits<T>::from_float(value));
    }
    return found;
  }

 private:
  static __device__ __forceinline__ void floats(const Raw& raw, float (&values)[kVectorValues]) {
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) values[i] = raw.value(i);
  }
};

template <class T>
struct SiluSource {
  struct Raw {
    TokenVector<T> gate;
    TokenVector<T> up;
  };
  struct Terms {};
  using Value = T;
  static constexpr bool kEveryShape = false;

  TokenMatrix<T> gate;
  TokenMatrix<T> up;

  template <int kVectors>
  __device__ __forceinline__ void load_all(int64_t row, int thread, int threads,
                                           Raw (&found)[kVectors]) const {
    TokenVector<T> gates[kVectors];
    TokenVector<T> ups[kVectors];
    gate.load_all(row, thread, threads, gates);
    up.load_all(row, thread, threads, ups);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) found[i] = {gates[i], ups[i]};
  }
  __device__ __forceinline__ Raw load(int64_t row, int v) const {
    return {gate.load(row, v), up.load(row, v)};
  }
  template <class Each>
  __device__ __forceinline__ Terms measure(int64_t, const Each&) const {
    return {};
  }
  __device__ __forceinline__ TokenVector<T> finish(const Raw& raw, int, Terms) const {
    TokenVector<T> found = TokenVector<T>::zeros();
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      const uint32_t gated = ValueBits<T>::from_float(producers::silu(raw.gate.value(i)));
      found.put(i, ValueBits<T>::from_float(ValueBits<T>::to_float(gated) * raw.up.value(i)));
    }
    return found;
  }
};

}  // namespace quantloom::cuda
