// How the CUDA kernels read codes of one large table of vectors (format "additive"), in parts of the table
// that shared memory holds. Shared by the scalar reference on the CPU and the kernels.
//
// Blocks of a row come in slices of kSliceBlocks. For each row and slice there is a list for each part of
// the table: the blocks whose code lies in it. Lists follow each other; each begins at a multiple of
// kPieceEntries entries. Within a list entries lie such that lanes that read at the same time meet in few
// banks of shared memory (Octets). An entry is 24 bits: in 16 of them the code's low bits, without those
// that name the part, and above them the low bits of the block's place in its slice; in 8 the others.
#pragma once

#include <cstdint>

#include "formats/fragment_order.hpp"

namespace quantloom::additive {

constexpr int kSliceBlocks = 2048;
constexpr int kPlaceBits = 11;
constexpr int kPieceEntries = 4;
constexpr int kPartBytes = 128 << 10;  // of a part of the table
static_assert(1 << kPlaceBits == kSliceBlocks);

// Bits of a code that count within a part: entries of `dim` float16.
QUANTLOOM_HOST_DEVICE constexpr int part_bits(int dim) {
  return dim == 8 ? 13 : 12;
}

// Where a list lies in its row and slice, in one word: its first entry / kPieceEntries, and its length.
struct PartList {
  int first;
  int count;

  QUANTLOOM_HOST_DEVICE constexpr uint32_t packed() const {
    return static_cast<uint32_t>(first / kPieceEntries) | static_cast<uint32_t>(count) << 16;
  }
  static QUANTLOOM_HOST_DEVICE constexpr PartList from(uint32_t packed) {
    return {static_cast<int>(packed & 0xFFFFU) * kPieceEntries, static_cast<int>(packed >> 16)};
  }
};

struct PartEntry {
  uint32_t code;   // within its part
  uint32_t place;  // of the block in its slice

  // `bits`: part_bits().
  QUANTLOOM_HOST_DEVICE constexpr uint32_t low(int bits) const { return (code | place << bits) & 0xFFFFU; }
  QUANTLOOM_HOST_DEVICE constexpr uint32_t high(int bits) const { return place >> (16 - bits); }
  static QUANTLOOM_HOST_DEVICE constexpr PartEntry from(int bits, uint32_t low, uint32_t high) {
    return {low & ((1U << bits) - 1U), low >> bits | high << (16 - bits)};
  }
};

// A list is dealt to the lanes of a warp in pieces, so that entry i goes to lane i / kPieceEntries % 32, and
// eight neighbouring lanes read shared memory at the same time: an octet of entries, kPieceEntries apart.
// Vectors of 8 lie in 8 groups of banks by the low bits of code and place; where those of an octet differ,
// none waits for another. Entries are dealt in turn, each to the first octet with room that has met its
// banks least.
constexpr int kMostOctets = kSliceBlocks / 8;

QUANTLOOM_HOST_DEVICE constexpr int octets_of(int count) {
  return (count + 127) / 128 * 16;
}
// Place in its list of member `j` of octet `octet`.
QUANTLOOM_HOST_DEVICE constexpr int octet_entry(int octet, int j) {
  return octet / 16 * 128 + octet / 4 % 4 * 32 + j * kPieceEntries + octet % 4;
}

// An octet while entries are dealt: the groups of banks met, 8 bits of codes and 8 of places, and how many
// entries it has.
using Octet = uint32_t;

// The group of banks, of eight, that member `member` of an octet meets with vector `index`.
QUANTLOOM_HOST_DEVICE constexpr uint32_t group_of(int bits, int member, uint32_t index) {
  return bits == part_bits(8) ? 1U << index % 8 : 1U << (2 * (index % 4) + static_cast<uint32_t>(member) % 2);
}

// Deals an entry of a list of `count` entries, and returns its place in the list. octets(i): octet i of
// octets_of(count), all 0 at first.
template <class Octets>
QUANTLOOM_HOST_DEVICE int deal_entry(const Octets& octets, int count, int bits, PartEntry entry) {
  int best = -1;
  int least = 3;
  for (int i = 0; i < octets_of(count) && least > 0; ++i) {
    const Octet octet = octets(i);
    const auto members = static_cast<int>(octet >> 16);
    if (members == 8 || octet_entry(i, members) >= count) continue;
    // Vectors of 16 take two groups of banks, of which neighbouring lanes read different ones first.
    const uint32_t code_group = group_of(bits, members, entry.code);
    const uint32_t place_group = group_of(bits, members, entry.place) << 8;
    const int met = ((octet & code_group) != 0 ? 1 : 0) + ((octet & place_group) != 0 ? 1 : 0);
    if (met >= least) continue;
    least = met;
    best = i;
  }
  Octet& chosen = octets(best);
  const auto member = static_cast<int>(chosen >> 16);
  chosen |= group_of(bits, member, entry.code) | group_of(bits, member, entry.place) << 8;
  chosen += 0x10000U;
  return octet_entry(best, member);
}

}  // namespace quantloom::additive
