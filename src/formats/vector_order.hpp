// How the CUDA kernels read the codes of short vectors: fragment order (fragment_order.hpp), with vectors in
// the place of scalars. Shared by the scalar reference on the CPU and the kernels.
//
// A lane's 32 weights of a unit (16 rows x 64 columns) are 32 / dim vectors, each a field of dim * bits bits
// in a dense stream of `bits` words, lowest bits first: in a wider field than it needs, a code's high bits
// are 0.
//   dim 2   field j: the columns of pair j
//   dim 4   field 2 * step + i: the lane's four columns of a step in row lane / 4 + 8 * i
//   dim 8   eight columns belong to two neighbouring lanes, which need the same codes: the even lane has
//   those
//           of row lane / 4, the odd one those of row lane / 4 + 8, field `step` each; they exchange them
#pragma once

#include "formats/fragment_order.hpp"

namespace quantloom::fragments {

QUANTLOOM_HOST_DEVICE constexpr bool is_vector_dim(int64_t dim) {
  return dim == 2 || dim == 4 || dim == 8;
}

// Bits of a weight that hold a vector's code.
QUANTLOOM_HOST_DEVICE constexpr int vector_bits(int dim, int code_bits) {
  const int bits = (code_bits + dim - 1) / dim;
  return dim == 2 && bits < 2 ? 2 : bits;
}

// Row in its unit, and first column in its block, of the vector in a lane's field.
QUANTLOOM_HOST_DEVICE constexpr int vector_row(int dim, int lane, int field) {
  if (dim == 2) return row_of(lane, field);
  return lane / 4 + 8 * (dim == 4 ? field % 2 : lane % 2);
}
QUANTLOOM_HOST_DEVICE constexpr int vector_column(int dim, int lane, int field) {
  if (dim == 2) return column_of(lane, field, 0);
  if (dim == 4) return column_of(lane, 4 * (field / 2), 0);
  return field * kStepColumns + lane % 4 / 2 * 8;
}

// Field `field` of width `width` (up to 16 bits) of a dense stream, and the same with a code put in.
QUANTLOOM_HOST_DEVICE uint32_t field_of(const uint32_t* words, int width, int field) {
  const int bit = field * width;
  const int shift = bit % 32;
  uint32_t code = words[bit / 32] >> shift;
  if (shift + width > 32) code |= words[bit / 32 + 1] << (32 - shift);
  return code & ((1U << width) - 1U);
}
QUANTLOOM_HOST_DEVICE void put_field(uint32_t* words, int width, int field, uint32_t code) {
  const int bit = field * width;
  const int shift = bit % 32;
  words[bit / 32] |= code << shift;
  if (shift + width > 32) words[bit / 32 + 1] |= code >> (32 - shift);
}

}  // namespace quantloom::fragments
