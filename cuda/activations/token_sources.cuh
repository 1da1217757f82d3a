// Where the values of tokens come from.
#pragma once

#include <cstdint>

#include "activations/token_values.cuh"

namespace quantloom::cuda {

// A matrix in memory.
template <class T>
struct MatrixSource {
  using Value = T;
  using Raw = TokenVector<T>;
  struct Terms {};
  static constexpr bool kEveryShape = true;
  TokenMatrix<T> x;

  template <int kVectors>
  __device__ __forceinline__ void load_all(int64_t row, int thread, int threads,
                                           Raw (&found)[kVectors]) const {
    x.load_all(row, thread, threads, found);
  }
  __device__ __forceinline__ Raw load(int64_t row, int v) const { return x.load(row, v); }
  template <class Each>
  __device__ __forceinline__ Terms measure(int64_t, const Each&) const {
    return {};
  }
  __device__ __forceinline__ TokenVector<T> finish(const Raw& raw, int, Terms) const { return raw; }
};

}  // namespace quantloom::cuda
