// How the codes of a unit lie in a lane's words in the format "spqr": the two codes of a pair at the same
// place of both halves of a word, 16 / bits pairs in a word; the bits left over in all words hold the last
// pairs. See fragment_order.hpp for what the rest of the order is.
#pragma once

#include "formats/fragment_order.hpp"

namespace quantloom::fragments {

// Pairs whose codes lie whole.
template <int kBits>
struct Halves {
  static constexpr int kWhole = 16 / kBits;  // in a word
  static constexpr int kWholePairs = kWhole * kBits < 16 ? kWhole * kBits : 16;
  static QUANTLOOM_HOST_DEVICE constexpr bool whole(int pair) { return pair < kWholePairs; }
  static QUANTLOOM_HOST_DEVICE constexpr int word(int pair) { return pair / kWhole; }
  static QUANTLOOM_HOST_DEVICE constexpr int position(int pair) { return pair % kWhole * kBits; }
};

// Run `index` of the codes of a pair, as its lower half has it; count = 0 past the last one.
QUANTLOOM_HOST_DEVICE constexpr BitRun half_run(int bits, int pair, int index) {
  const BitRun none{0, 0, bits, 0};
  const int whole = 16 / bits;
  const int left = 16 - whole * bits;
  if (pair < whole * bits) return index == 0 ? BitRun{pair / whole, pair % whole * bits, 0, bits} : none;
  const int first = (pair - whole * bits) * bits;  // place in the string of left-over bits
  int from = 0;
  for (int i = 0; from < bits; ++i) {
    const int at = first + from;
    const int room = left - at % left;
    const int count = room < bits - from ? room : bits - from;
    if (i == index) return {at / left, whole * bits + at % left, from, count};
    from += count;
  }
  return none;
}

// The words of a unit of one lane, from its codes [pair][half], and back.
QUANTLOOM_HOST_DEVICE void pack_halves(int bits, const uint8_t* codes, uint32_t* words) {
  for (int w = 0; w < bits; ++w) words[w] = 0;
  for (int i = 0; i < kUnitCodes; ++i) {
    for (int index = 0;; ++index) {
      const BitRun run = half_run(bits, i / 2, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      words[run.word] |= ((codes[i] >> run.from) & mask) << (run.position + i % 2 * 16);
    }
  }
}

QUANTLOOM_HOST_DEVICE void unpack_halves(int bits, const uint32_t* words, uint8_t* codes) {
  for (int i = 0; i < kUnitCodes; ++i) {
    uint32_t code = 0;
    for (int index = 0;; ++index) {
      const BitRun run = half_run(bits, i / 2, index);
      if (run.count == 0) break;
      const uint32_t mask = (1U << run.count) - 1U;
      code |= ((words[run.word] >> (run.position + i % 2 * 16)) & mask) << run.from;
    }
    codes[i] = static_cast<uint8_t>(code);
  }
}

}  // namespace quantloom::fragments
