// How the CUDA kernels read vectors that several tables add up to: fragment order of vectors
// (vector_order.hpp), where a field holds the codes of a vector for all tables, that for the first in its
// lowest bits, as packed planes have them: one code of up to 32 bits. Shared by the scalar reference on the
// CPU and the kernels.
#pragma once

#include "formats/vector_order.hpp"

namespace quantloom::fragments {

// Bits of a weight that hold the codes of a vector, of `codes_bits` bits together; 0: no decoder takes them.
QUANTLOOM_HOST_DEVICE constexpr int sum_bits(int dim, int codes_bits) {
  const int bits = (codes_bits + dim - 1) / dim;
  if (bits > 4) return 0;
  const int least = dim == 2 ? 4 : 2;
  return bits < least ? least : bits;
}

// field_of() for fields of up to 32 bits.
QUANTLOOM_HOST_DEVICE uint32_t wide_field_of(const uint32_t* words, int width, int field) {
  return width == 32 ? words[field] : field_of(words, width, field);
}

// What a decoder is told of the tables, in one number.
struct TableSizes {
  int tables;     // 2 to 8
  int entries;    // of a table: up to 65536
  int code_bits;  // of a table: up to 16

  QUANTLOOM_HOST_DEVICE constexpr int packed() const { return code_bits << 24 | tables << 20 | entries; }
  static QUANTLOOM_HOST_DEVICE constexpr TableSizes from(int packed) {
    return {packed >> 20 & 15, packed & ((1 << 20) - 1), packed >> 24};
  }
};

}  // namespace quantloom::fragments
