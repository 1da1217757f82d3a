// "Bit-plane order": how the CUDA kernels read a matrix of binary coding. The functions here are shared by
// the scalar reference on the CPU and the kernels.
//
// A block is 64 rows x 128 columns of all planes. In it, a plane is 8 words for each lane of a warp, four
// next to each other: lane 4 g + t has the signs of columns 32 t ... 32 t + 31, column 32 t + b in bit b, of
// the rows g + 8 i; word i of the lane is that of row g + 8 i. So words 2 u and 2 u + 1 are the lane's
// operand of the tensor core's product of 16 rows x 128 columns of single bits (m16n8k128).
#pragma once

#include "formats/fragment_order.hpp"

namespace quantloom::bit_planes {

constexpr int kBlockRows = 64;
constexpr int kBlockColumns = 128;
constexpr int kWordColumns = 32;
constexpr int kPlaneWords = 256;  // of a plane of a block

// The word of a plane of a block with column `column` of row `row`.
QUANTLOOM_HOST_DEVICE constexpr int word_of(int row, int column) {
  const int lane = row % 8 * 4 + column / kWordColumns;
  const int i = row / 8;
  return i / 4 * 128 + lane * 4 + i % 4;
}

// Row of word `at` of a plane of a block, and its first column.
QUANTLOOM_HOST_DEVICE constexpr int row_of(int at) {
  return at % 128 / 16 + 8 * (at / 128 * 4 + at % 4);
}
QUANTLOOM_HOST_DEVICE constexpr int column_of(int at) {
  return at / 4 % 4 * kWordColumns;
}

}  // namespace quantloom::bit_planes
