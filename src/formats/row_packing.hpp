// Packs a tile of rows at once: encoders keep their codes column by column, files row by row.
#pragma once

#include <cstdint>

namespace quantloom {

// Rows in a tile of working codes: one cache line of bytes.
inline constexpr int64_t kRowTile = 64;

// tile [columns, kRowTile]: row r of the matrix in lane r, each code below 2^bits (higher bits are
// ignored). Writes packed_words(columns, bits) words for each of the first `rows` rows, row r at
// words + r * stride: the same words as pack_bits() of that row.
void pack_row_tile(const uint8_t* tile, int64_t columns, int bits, int64_t rows, uint32_t* words,
                   int64_t stride);

}  // namespace quantloom
