// Sizes and facts of a trellis matrix as the CUDA kernels read it; see PreparedPlanes.
#pragma once

#include "formats/fragment_order.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

struct TrellisLayout {
  TrellisShape ring;
  TrellisCode code = TrellisCode::mul1;
  uint32_t multiplier = 0;
  bool rotated = false;
  // Words lie in fragment order, which takes whole bits; else rings lie whole.
  bool fragments = false;
  int64_t n = 0;
  int64_t k = 0;
  int64_t row_blocks = 0;     // of 64 rows, an even number
  int64_t column_blocks = 0;  // of 64 columns, an even number
  int64_t row_tiles = 0;      // of 16 rows, in the packed tensor
  int64_t column_tiles = 0;   // of 16 columns, in the packed tensor

  int bits() const { return ring.half_bits / 2; }
  int64_t words() const {
    return checked_mul(checked_mul(row_blocks, column_blocks), int64_t{16} * ring.words());
  }
};

// The trellis of a format, or null.
inline const Trellis* as_trellis(const Format& format) {
  return dynamic_cast<const Trellis*>(&format);
}

// Throws Unsupported for a matrix too large for the kernels.
TrellisLayout trellis_layout(const Trellis& format, int64_t n, int64_t k);
std::vector<PlaneSpec> trellis_planes(const TrellisLayout& layout, const Trellis& format);

// Where word `index` of the prepared plane comes from: its tile and its place in the ring.
struct TrellisWord {
  int64_t row_tile;
  int64_t column_tile;
  int word;
};

// ring_words: of a ring. whole bits in fragment order: word w of lane (g, t) in unit u of block (r, c) is
// word g * bits + w of the ring of tile (4 r + u, 4 c + t).
QUANTLOOM_HOST_DEVICE TrellisWord trellis_word(bool fragments, int ring_words, int64_t column_blocks,
                                               int64_t index) {
  const int block_words = 16 * ring_words;
  const int64_t block = index / block_words;
  const int at = static_cast<int>(index - block * block_words);
  const int64_t row_block = block / column_blocks;
  const int64_t column_block = block - row_block * column_blocks;
  if (!fragments) {
    const int tile = at / ring_words;
    return {4 * row_block + tile / 4, 4 * column_block + tile % 4, at - tile * ring_words};
  }
  const int bits = ring_words / 8;
  const int lane = at / 4 % 32;
  const int place = at / 128 * 4 + at % 4;  // of the lane's words
  const int unit = place / bits;
  return {4 * row_block + unit, 4 * column_block + lane % 4, lane / 4 * bits + place - unit * bits};
}

// The inverse: where word `word` of the ring of a tile lies.
QUANTLOOM_HOST_DEVICE int64_t trellis_place(bool fragments, int ring_words, int64_t column_blocks,
                                            int64_t row_tile, int64_t column_tile, int word) {
  const int64_t block = row_tile / 4 * column_blocks + column_tile / 4;
  const int unit = static_cast<int>(row_tile % 4);
  const int t = static_cast<int>(column_tile % 4);
  const int64_t first = block * 16 * ring_words;
  if (!fragments) return first + (unit * 4 + t) * ring_words + word;
  const int bits = ring_words / 8;
  const int place = unit * bits + word % bits;
  const int lane = word / bits * 4 + t;
  return first + (place / 4 * 32 + lane) * 4 + place % 4;
}

// The scalar reference of the order, and its inverse.
PreparedPlanes prepare_trellis(const PackedTensor& packed);
PackedTensor unprepare_trellis(const PreparedPlanes& prepared);

}  // namespace quantloom
