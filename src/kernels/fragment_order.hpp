// "Fragment order": how the CUDA kernels read a matrix of scalar codes. The functions here are shared by the
// scalar reference on the CPU and the kernels.
//
// A block is 64 rows x 64 columns: four units of 16 rows x 64 columns. A lane of a warp holds 32 codes of
// each unit, in `bits` words: 16 pairs, pair j = 4*step + reg, where step counts the four products of
// 16 columns and reg the registers of the tensor core's A fragment (m16n8k16). The codes of a pair lie in
// the two halves of a word, at the same place of each, so that one operation decodes both.
//
// Columns change places within a block: a lane's columns of two steps are eight consecutive ones, so that it
// loads its activations 16 bytes at a time.
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
  const int step = pair / 4;
  return step / 2 * 32 + lane % 4 * 8 + step % 2 * 4 + (pair & 2) + half;
}

// Whole codes in 16 bits, and the bits left over. Left-over bits of all words hold the last codes.
template <int kBits>
struct Packing {
  static constexpr int kWhole = 16 / kBits;
  static constexpr int kLeft = 16 - kWhole * kBits;
  static constexpr int kWholePairs = kWhole * kBits;  // of the 16 pairs of a unit
};

// A run of bits of a code: bits [from, from + count) of the code lie at bit `position` of each half of
// word `word`.
struct BitRun {
  int word;
  int position;
  int from;
  int count;
};

// Run `index` of the code of `pair`; count = 0 past the last one.
QUANTLOOM_HOST_DEVICE constexpr BitRun bit_run(int bits, int pair, int index) {
  const int whole = 16 / bits;
  const int left = 16 - whole * bits;
  if (pair < whole * bits) {
    return index == 0 ? BitRun{pair / whole, pair % whole * bits, 0, bits} : BitRun{0, 0, bits, 0};
  }
  const int first = (pair - whole * bits) * bits;  // place in the string of left-over bits
  int from = 0;
  for (int i = 0; from < bits; ++i) {
    const int at = first + from;
    const int room = left - at % left;
    const int count = room < bits - from ? room : bits - from;
    if (i == index) return {at / left, whole * bits + at % left, from, count};
    from += count;
  }
  return {0, 0, bits, 0};
}

// The words of a unit of one lane, from its codes [pair][half].
QUANTLOOM_HOST_DEVICE void pack_unit(int bits, const uint8_t* codes, uint32_t* words) {
  for (int w = 0; w < bits; ++w) words[w] = 0;
  for (int pair = 0; pair < 16; ++pair) {
    for (int index = 0;; ++index) {
      const BitRun run = bit_run(bits, pair, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      words[run.word] |= ((codes[2 * pair] >> run.from) & mask) << run.position;
      words[run.word] |= ((codes[2 * pair + 1] >> run.from) & mask) << (run.position + 16);
    }
  }
}

QUANTLOOM_HOST_DEVICE void unpack_unit(int bits, const uint32_t* words, uint8_t* codes) {
  for (int pair = 0; pair < 16; ++pair) {
    uint32_t low = 0;
    uint32_t high = 0;
    for (int index = 0;; ++index) {
      const BitRun run = bit_run(bits, pair, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      low |= ((words[run.word] >> run.position) & mask) << run.from;
      high |= ((words[run.word] >> (run.position + 16)) & mask) << run.from;
    }
    codes[2 * pair] = static_cast<uint8_t>(low);
    codes[2 * pair + 1] = static_cast<uint8_t>(high);
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

}  // namespace quantloom::fragments
