// Stands in for the header of the same name: its functions on the CPU, and names of CUDA that the trellis
// search uses. A double holds the square of a float16 and its sum with another but for cases of 2^-30.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "quantloom/dtype.hpp"

#define __forceinline__ inline

struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct EmulatedHalf {
  uint16_t bits;
};
inline EmulatedHalf __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline float __half2float(EmulatedHalf half) {
  return quantloom::float_from_f16(half.bits);
}
inline uint32_t __float_as_uint(float value) {
  return std::bit_cast<uint32_t>(value);
}
inline float __shfl_xor_sync(unsigned /*mask*/, float value, int lanes) {
  const auto all = emulated::exchange(std::bit_cast<uint32_t>(value));
  return std::bit_cast<float>(all[static_cast<size_t>(emulated::lane ^ lanes)]);
}
inline uint32_t __shfl_xor_sync(unsigned /*mask*/, uint32_t value, int lanes) {
  return emulated::exchange(value)[static_cast<size_t>(emulated::lane ^ lanes)];
}
inline uint32_t __reduce_min_sync(unsigned /*mask*/, uint32_t value) {
  const auto all = emulated::exchange(value);
  return *std::min_element(all.begin(), all.end());
}
inline int atomicAdd(int* at, int value) {
  return std::atomic_ref<int>(*at).fetch_add(value);
}
using std::fmaf;

namespace quantloom::cuda {

inline float half_value(uint32_t bits) {
  return float_from_f16(static_cast<uint16_t>(bits));
}
template <class Operation, class... Pairs>
uint32_t on_halves(const Operation& operation, Pairs... pairs) {
  const uint32_t low = f16_from_float(operation(half_value(pairs & 0xFFFFU)...));
  const uint32_t high = f16_from_float(operation(half_value(pairs >> 16)...));
  return high << 16 | low;
}

// A float holds the sum of two float16 of the magnitudes here.
inline uint32_t pair_subtract(uint32_t a, uint32_t b) {
  return on_halves([](float x, float y) { return x - y; }, a, b);
}
inline uint32_t pair_add(uint32_t a, uint32_t b) {
  return on_halves([](float x, float y) { return x + y; }, a, b);
}
inline uint32_t pair_subtract_low(uint32_t a, uint32_t b) {
  return pair_subtract(a, (b & 0xFFFFU) * 0x10001U);
}
inline uint32_t pair_subtract_high(uint32_t a, uint32_t b) {
  return pair_subtract(a, (b >> 16) * 0x10001U);
}
inline uint32_t pair_square_add(uint32_t d, uint32_t c) {
  return on_halves(
      [](float x, float y) {
        const double exact = static_cast<double>(x) * x + y;
        // To odd, so that rounding once more is rounding once.
        float narrow = static_cast<float>(exact);
        if (static_cast<double>(narrow) != exact && std::isfinite(narrow)) {
          const uint32_t bits = std::bit_cast<uint32_t>(narrow);
          const bool above = static_cast<double>(narrow) > exact;
          narrow = std::bit_cast<float>((above ? bits - 1 : bits) | 1U);
        }
        return narrow;
      },
      d, c);
}
inline void prefetch_to_level_2(const void* /*from*/, uint32_t /*bytes*/) {}
inline uint32_t pair_min(uint32_t a, uint32_t b) {
  return std::min(a & 0xFFFFU, b & 0xFFFFU) | std::min(a >> 16, b >> 16) << 16;
}
inline uint32_t pair_min(uint32_t a, uint32_t b, uint32_t c) {
  return pair_min(pair_min(a, b), c);
}
inline uint32_t low_halves(uint32_t a, uint32_t b) {
  return (a & 0xFFFFU) | b << 16;
}
inline uint32_t high_halves(uint32_t a, uint32_t b) {
  return a >> 16 | (b & 0xFFFF0000U);
}

}  // namespace quantloom::cuda
