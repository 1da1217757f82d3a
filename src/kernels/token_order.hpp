// "Token order": how the tile loop reads activations. The tokens of a block of 64 columns lie below each
// other, 128 bytes each, with the columns in the order in which the tensor core meets those of a matrix in
// fragment order. The eight 16-byte pieces of a row change places with the token, so that eight tokens'
// pieces of the same columns lie in different banks of shared memory; the same is the 128-byte swizzle of
// wgmma.
#pragma once

#include "formats/fragment_order.hpp"

namespace quantloom::fragments {

constexpr int kTokenBytes = 128;  // of a token in a block of columns
constexpr int kTokenPieces = 8;   // of 16 bytes

// Column in its block at place `position` of a row, before pieces change places: positions 16 * step + i
// are what the tensor core takes for its 16 columns i.
QUANTLOOM_HOST_DEVICE constexpr int column_at(int position) {
  const int i = position % kStepColumns;
  const int pair = position / kStepColumns * 4 + i / 8 * 2;
  return column_of(i % 8 / 2, pair, i % 2);
}

// Where piece `piece` (positions 8 * piece to 8 * piece + 7) of a token lies in its row.
QUANTLOOM_HOST_DEVICE constexpr int place_of_piece(int token, int piece) {
  return piece ^ (token & 7);
}

}  // namespace quantloom::fragments
