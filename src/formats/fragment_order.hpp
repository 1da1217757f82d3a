// "Fragment order": how the CUDA kernels read a matrix of scalar codes. The functions here are shared by the
// scalar reference on the CPU and the kernels.
//
// A block is 64 rows x 64 columns: four units of 16 rows x 64 columns. A lane of a warp holds 32 codes of
// each unit, in `bits` words: 16 pairs, pair j = 4*step + reg, where step counts the four products of
// 16 columns and reg the registers of the tensor core's A fragment (m16n8k16). CodeOrder says how the pairs
// lie in the words.
//
// Columns change places within a step: the four that a lane holds follow each other, so that it reads its
// activations 8 bytes at a time. A group of 16 columns is a whole step.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUANTLOOM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUANTLOOM_HOST_DEVICE inline
#endif

namespace quantloom::fragments {

constexpr int kBlockRows = 64;
constexpr int kBlockColumns = 64;
constexpr int kUnits = 4;       // units of 16 rows in a block
constexpr int kUnitCodes = 32;  // codes of one lane in a unit
constexpr int kStepColumns = 16;
constexpr int kLanes = 32;

// Row in its unit, and column in its block, of code (pair, half) of a lane.
QUANTLOOM_HOST_DEVICE constexpr int row_of(int lane, int pair) {
  return lane / 4 + 8 * (pair & 1);
}
QUANTLOOM_HOST_DEVICE constexpr int column_of(int lane, int pair, int half) {
  return pair / 4 * kStepColumns + lane % 4 * 4 + (pair & 2) + half;
}

// A quad: the four codes of a lane in a row and a step, in the four bytes of a word. Pairs 4*step + {0, 2}
// make that of row lane / 4, pairs 4*step + {1, 3} that of the row 8 further.
QUANTLOOM_HOST_DEVICE constexpr int quad_of(int pair) {
  return pair / 4 * 2 + (pair & 1);
}
// The byte of code (pair, half): the codes of a pair lie 16 bits apart.
QUANTLOOM_HOST_DEVICE constexpr int byte_of(int pair, int half) {
  return 2 * half + (pair >> 1 & 1);
}

// How the codes of a unit lie in its words.
enum class CodeOrder : uint8_t {
  // The codes of a quad at the same place of the four bytes of a word: one operation takes all out as bytes,
  // or two as halves. 8 / bits quads in a word; the bits left over in all words hold the last quads.
  bytes,
  // A dense stream, lowest bits first: the codes of a pair side by side, as one index into a table of pairs.
  dense,
};

// Order `bytes`: whole codes in 8 bits, and quads in a unit that are not in left-over bits.
template <int kBits>
struct Bytes {
  static constexpr int kWhole = 8 / kBits;
  static constexpr int kWholeQuads = kWhole * kBits;
  static QUANTLOOM_HOST_DEVICE constexpr bool whole(int quad) { return quad < kWholeQuads; }
  static QUANTLOOM_HOST_DEVICE constexpr int word(int quad) { return quad / kWhole; }
  static QUANTLOOM_HOST_DEVICE constexpr int position(int quad) { return quad % kWhole * kBits; }
};

// A run of bits of a code: bits [from, from + count) of the code lie at bit `position` of word `word`.
struct BitRun {
  int word;
  int position;
  int from;
  int count;
};

// Run `index` of code (pair, half); count = 0 past the last one.
QUANTLOOM_HOST_DEVICE constexpr BitRun bit_run(CodeOrder order, int bits, int pair, int half, int index) {
  const BitRun none{0, 0, bits, 0};
  if (order == CodeOrder::dense) {
    const int bit = (2 * pair + half) * bits;
    const int first = bits < 32 - bit % 32 ? bits : 32 - bit % 32;
    if (index == 0) return {bit / 32, bit % 32, 0, first};
    return index == 1 && first < bits ? BitRun{bit / 32 + 1, 0, first, bits - first} : none;
  }
  const int quad = quad_of(pair);
  const int byte = 8 * byte_of(pair, half);
  const int whole = 8 / bits;
  const int left = 8 - whole * bits;
  if (quad < whole * bits) {
    return index == 0 ? BitRun{quad / whole, byte + quad % whole * bits, 0, bits} : none;
  }
  const int first = (quad - whole * bits) * bits;  // place in the string of left-over bits
  int from = 0;
  for (int i = 0; from < bits; ++i) {
    const int at = first + from;
    const int room = left - at % left;
    const int count = room < bits - from ? room : bits - from;
    if (i == index) return {at / left, byte + whole * bits + at % left, from, count};
    from += count;
  }
  return none;
}

// The words of a unit of one lane, from its codes [pair][half], and back.
QUANTLOOM_HOST_DEVICE void pack_unit(CodeOrder order, int bits, const uint8_t* codes, uint32_t* words) {
  for (int w = 0; w < bits; ++w) words[w] = 0;
  for (int i = 0; i < kUnitCodes; ++i) {
    for (int index = 0;; ++index) {
      const BitRun run = bit_run(order, bits, i / 2, i % 2, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      words[run.word] |= ((codes[i] >> run.from) & mask) << run.position;
    }
  }
}

QUANTLOOM_HOST_DEVICE void unpack_unit(CodeOrder order, int bits, const uint32_t* words, uint8_t* codes) {
  for (int i = 0; i < kUnitCodes; ++i) {
    uint32_t code = 0;
    for (int index = 0;; ++index) {
      const BitRun run = bit_run(order, bits, i / 2, i % 2, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      code |= ((words[run.word] >> run.position) & mask) << run.from;
    }
    codes[i] = static_cast<uint8_t>(code);
  }
}

// Place of word `word` of unit `unit` of a lane in its block: a lane's words of all units follow each other
// in pieces of 16 bytes, and the pieces of the 32 lanes lie side by side.
QUANTLOOM_HOST_DEVICE constexpr int word_in_block(int bits, int unit, int word, int lane) {
  const int at = unit * bits + word;
  return (at / 4 * kLanes + lane) * 4 + at % 4;
}

// Place of a row's scale or zero point among the 64 of its block and group: a lane reads those of its eight
// rows, lane / 4 + {0, 8} of each unit, as one piece.
QUANTLOOM_HOST_DEVICE constexpr int parameter_in_block(int row) {
  return row % 8 * 8 + row / 8;
}
// The row at a place: the inverse.
QUANTLOOM_HOST_DEVICE constexpr int block_row_of(int place) {
  return place % 8 * 8 + place / 8;
}

}  // namespace quantloom::fragments
