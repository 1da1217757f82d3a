// Single codes of the dense bit streams of packed planes.
#pragma once

#include <cstdint>

namespace quantloom::cuda {

__device__ __forceinline__ uint32_t read_code(const uint32_t* words, int bits, int64_t index) {
  const int64_t bit = index * bits;
  const auto shift = static_cast<int>(bit % 32);
  uint64_t window = words[bit / 32];
  if (shift + bits > 32) window |= static_cast<uint64_t>(words[bit / 32 + 1]) << 32;
  return static_cast<uint32_t>(window >> shift) & (~0U >> (32 - bits));
}

// Into words that were zeroed before; other threads put codes into them too.
__device__ __forceinline__ void put_code(uint32_t* words, int bits, int64_t index, uint32_t code) {
  const int64_t bit = index * bits;
  const uint64_t field = static_cast<uint64_t>(code) << (bit % 32);
  atomicOr(words + bit / 32, static_cast<uint32_t>(field));
  if ((field >> 32) != 0) atomicOr(words + bit / 32 + 1, static_cast<uint32_t>(field >> 32));
}

}  // namespace quantloom::cuda
