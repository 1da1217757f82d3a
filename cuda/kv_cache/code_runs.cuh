// Codes that lanes take in runs of channels (fragments.cuh), as attend_codes() uses them.
#pragma once

#include "kv_cache/code_matrices.cuh"

namespace quantloom::kv_cache {

template <class Fragments, int kDim>
struct RunKeys {
  static constexpr float kProduct = 1;
  static constexpr int kPairDistance = kDim / 2;
  static constexpr bool kTakesRest = false;
  static constexpr int kUnitBytes = 0;              // depends on the layout
  static constexpr int kQueryWords = kDim / 2 + 4;  // of a row

  Fragments fragments;
  int slot;
  std::byte* unit;
  const uint32_t* queries;

  __device__ __forceinline__ RunKeys(const KVView& view, int slot_, std::byte* unit_, const uint32_t* words,
                                     Lane lane, uint32_t mark)
      : fragments(view, lane, mark), slot(slot_), unit(unit_), queries(words + lane.t * (kDim / 8)) {}

  static __device__ __forceinline__ int place(int word) { return word; }
  static __device__ __forceinline__ int channel(int word) { return word; }
  static __host__ __device__ int unit_bytes(const KVLayout& layout) { return Fragments::unit_bytes(layout); }
  __device__ __forceinline__ void fetch(int offset, const std::byte* record, bool exists) const {
    if (exists) fragments.fetch(unit + offset, record, slot);
  }
  __device__ __forceinline__ void multiply(int offset, float (&products)[2][4], float (&)[2]) {
    fragments.load(unit + offset);
    fragments.multiply(queries, products);
  }
};

// Adds to the outputs the values of a tile with their weights.
template <int kDim, class Fragments>
__device__ __forceinline__ void multiply_values(const Fragments& values, const uint32_t (&weights)[2],
                                                float (&outputs)[kDim / 16][4]) {
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    uint32_t a[4];
    values.step(j, a);
    cuda::multiply_accumulate<__half>(outputs[j], a, weights[0], weights[1]);
  }
}

// Calls emit(channel, column c, sums of two neighbouring channels).
template <int kDim, class Emit>
__device__ __forceinline__ void for_run_sums(const float (&outputs)[kDim / 16][4], Lane lane, Emit emit) {
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      emit(lane.g * (kDim / 8) + 2 * j, c, float2{outputs[j][c], outputs[j][2 + c]});
  }
}

template <class Fragments, int kDim>
struct RunValues {
  struct Loaded {};
  static constexpr bool kDividesGroups = false;
  static constexpr int kParts = 1;
  static constexpr int kUnitBytes = 0;

  Fragments fragments;
  int slot;
  std::byte* unit;

  __device__ __forceinline__ RunValues(const KVView& view, int slot_, std::byte* unit_, int, Lane lane,
                                       uint32_t mark)
      : fragments(view, lane, mark), slot(slot_), unit(unit_) {}

  static __host__ __device__ int unit_bytes(const KVLayout& layout) { return Fragments::unit_bytes(layout); }
  __device__ __forceinline__ void fetch(int offset, const std::byte* record, bool exists) const {
    if (exists) fragments.fetch(unit + offset, record, slot);
  }
  __device__ __forceinline__ uint32_t load(int, Lane, Loaded&) const { return 0; }
  static __device__ __forceinline__ void prepare(std::byte*) {}
  __device__ __forceinline__ void multiply(int offset, const Loaded&, const uint32_t (&weights)[2][2],
                                           float (&outputs)[kDim / 16][4], float (&parts)[1][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      sum_weights(weights[tile], parts[0]);
      fragments.load(unit + offset, 16 * tile);
      multiply_values<kDim>(fragments, weights[tile], outputs);
    }
  }
  template <class Emit>
  __device__ __forceinline__ void for_sums(const float (&outputs)[kDim / 16][4], const float (&)[1][4], int,
                                           Lane lane, Emit emit) const {
    for_run_sums<kDim>(outputs, lane, emit);
  }
};

}  // namespace quantloom::kv_cache
