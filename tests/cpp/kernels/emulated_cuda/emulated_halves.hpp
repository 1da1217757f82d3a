// Pairs of float16 and bfloat16 on the CPU under the names that CUDA gives them, so that device decoders
// compile as host code. Counts the operations whose result was rounded.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "quantloom/dtype.hpp"

#define __host__
#define __device__
#define __forceinline__ inline

struct ThreadPlace {
  unsigned x;
};
inline ThreadPlace threadIdx{0};
inline ThreadPlace blockDim{1};

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
struct float2 {
  float x, y;
};
template <class Value>
Value __ldg(const Value* from) {
  return *from;
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

// Bytes of the eight of a (0 to 3) and b (4 to 7), by the digits of `selector`.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 7U;
    result |= static_cast<uint32_t>(bytes >> (8 * digit) & 0xFFU) << (8 * i);
  }
  return result;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31U));
}

namespace emulated {

// Lanes run one after the other, twice: first they leave what they shuffle, then they get it. One list for
// each lane of a warp.
inline std::vector<std::vector<uint32_t>> shuffled;
inline bool shuffles_replayed = false;
inline size_t next_shuffle = 0;

}  // namespace emulated

inline uint32_t __shfl_xor_sync(uint32_t /*mask*/, uint32_t value, int lanes) {
  if (!emulated::shuffles_replayed) {
    emulated::shuffled[threadIdx.x].push_back(value);
    return 0;
  }
  return emulated::shuffled[threadIdx.x ^ static_cast<unsigned>(lanes)][emulated::next_shuffle++];
}

namespace emulated {

inline int rounded_operations = 0;

struct Float16 {
  static uint16_t from(float value) { return quantloom::f16_from_float(value); }
  static float to(uint16_t bits) { return quantloom::float_from_f16(bits); }
};
struct Bfloat16 {
  static uint16_t from(float value) { return quantloom::bf16_from_float(value); }
  static float to(uint16_t bits) { return quantloom::float_from_bf16(bits); }
};

template <class Type>
struct Half {
  uint16_t bits;
};

template <class Type>
struct Pair {
  uint16_t low;
  uint16_t high;
};

// The double must be the exact result; sums and products of the decoders' numbers are.
template <class Type>
uint16_t rounded(double exact) {
  const uint16_t bits = Type::from(static_cast<float>(exact));
  if (static_cast<double>(Type::to(bits)) != exact) ++rounded_operations;
  return bits;
}

template <class Type, class Operation, class... Pairs>
Pair<Type> each(const Operation& operation, Pairs... pairs) {
  return {rounded<Type>(operation(static_cast<double>(Type::to(pairs.low))...)),
          rounded<Type>(operation(static_cast<double>(Type::to(pairs.high))...))};
}

template <class Type>
Pair<Type> multiply_add(Pair<Type> a, Pair<Type> b, Pair<Type> c) {
  return each<Type>([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
template <class Type>
Pair<Type> add(Pair<Type> a, Pair<Type> b) {
  return each<Type>([](double x, double y) { return x + y; }, a, b);
}
template <class Type>
Pair<Type> multiply(Pair<Type> a, Pair<Type> b) {
  return each<Type>([](double x, double y) { return x * y; }, a, b);
}

}  // namespace emulated

using __half = emulated::Half<emulated::Float16>;
using __half2 = emulated::Pair<emulated::Float16>;
using __nv_bfloat16 = emulated::Half<emulated::Bfloat16>;
using __nv_bfloat162 = emulated::Pair<emulated::Bfloat16>;

inline __half __float2half_rn(float value) {
  return {emulated::rounded<emulated::Float16>(static_cast<double>(value))};
}
inline __half2 __float2half2_rn(float value) {
  const __half half = __float2half_rn(value);
  return {half.bits, half.bits};
}
inline float __half2float(__half value) {
  return emulated::Float16::to(value.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {emulated::rounded<emulated::Bfloat16>(static_cast<double>(value))};
}
inline __nv_bfloat162 __float2bfloat162_rn(float value) {
  const __nv_bfloat16 half = __float2bfloat16_rn(value);
  return {half.bits, half.bits};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  return emulated::Bfloat16::to(value.bits);
}

inline __half2 __floats2half2_rn(float low, float high) {
  return {emulated::rounded<emulated::Float16>(static_cast<double>(low)),
          emulated::rounded<emulated::Float16>(static_cast<double>(high))};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {emulated::rounded<emulated::Bfloat16>(static_cast<double>(low)),
          emulated::rounded<emulated::Bfloat16>(static_cast<double>(high))};
}

template <class Type>
emulated::Pair<Type> __hadd2_rn(emulated::Pair<Type> a, emulated::Pair<Type> b) {
  return emulated::add(a, b);
}
template <class Type>
emulated::Pair<Type> __hadd2(emulated::Pair<Type> a, emulated::Pair<Type> b) {
  return emulated::add(a, b);
}
template <class Type>
emulated::Pair<Type> __hmul2_rn(emulated::Pair<Type> a, emulated::Pair<Type> b) {
  return emulated::multiply(a, b);
}
template <class Type>
emulated::Pair<Type> __hmul2(emulated::Pair<Type> a, emulated::Pair<Type> b) {
  return emulated::multiply(a, b);
}
template <class Type>
emulated::Pair<Type> __hfma2(emulated::Pair<Type> a, emulated::Pair<Type> b, emulated::Pair<Type> c) {
  return emulated::multiply_add(a, b, c);
}
