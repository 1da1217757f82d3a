#include "formats/entropy_rans_rows.hpp"

#include <bit>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/entropy_rans_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::entropy::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
// Up to eight lanes at a time: the order of their words comes from a table with an entry for each mask.
using DU = hn::CappedTag<uint32_t, 8>;
using DI = hn::RebindToSigned<DU>;
using DW = hn::Rebind<uint16_t, DU>;
using VU = hn::Vec<DU>;

constexpr int kGroup = static_cast<int>(hn::MaxLanes(DU()));
constexpr int kGroups = kLanes / kGroup;

// For each mask of lanes, how many of the lanes before each are in it.
struct Ranks {
  HWY_ALIGN uint32_t ranks[256][8];
};
constexpr Ranks make_ranks() {
  Ranks result{};
  for (uint32_t mask = 0; mask < 256; ++mask) {
    for (uint32_t lane = 0; lane < 8; ++lane) {
      result.ranks[mask][lane] = static_cast<uint32_t>(std::popcount(mask & ((1U << lane) - 1)));
    }
  }
  return result;
}
constexpr Ranks kRanks = make_ranks();

struct Spelling {
  uint32_t escape;
  uint32_t bits;
  uint32_t alphabet;
};

// The lanes of a step whose code is the escape read their codes. Rare: through memory.
HWY_NOINLINE bool spell(const Spelling& spelling, uint32_t* states, uint32_t* codes, int step,
                        const std::byte*& from) {
  bool beyond = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((codes[lane] >> (8 * step) & 0xffU) != spelling.escape) continue;
    const uint32_t code = states[lane] & ((1U << spelling.bits) - 1);
    beyond = beyond || code >= spelling.alphabet;
    codes[lane] = (codes[lane] & ~(0xffU << (8 * step))) | (code & 0xffU) << (8 * step);
    states[lane] >>= spelling.bits;
    if (states[lane] < kLowestState) {
      states[lane] = states[lane] << 16 | load_word(from, 0);
      from += 2;
    }
  }
  return beyond;
}

int64_t decode_rows(RansRows& rows, uint8_t* codes, int64_t count) {
  const DU du;
  const DI di;
  const DW dw;
  const EntropyTables& tables = *rows.tables;
  const auto* fused = reinterpret_cast<const int32_t*>(tables.fused.data());
  const auto mask = hn::Set(du, (1U << rows.bits) - 1);
  const auto low_byte = hn::Set(du, 0xffU);
  const auto frequency_mask = hn::Set(du, 0xfffU);
  const auto lowest = hn::Set(di, 1);  // of states divided by 2^16, which are no negative numbers
  const bool escapes = tables.escape >= 0;
  const Spelling spelling{static_cast<uint32_t>(tables.escape), static_cast<uint32_t>(tables.escape_bits),
                          static_cast<uint32_t>(tables.alphabet)};
  const auto escape = hn::Set(du, spelling.escape);

  VU states[kGroups];
  for (int g = 0; g < kGroups; ++g) states[g] = hn::LoadU(du, rows.states + g * kGroup);
  const std::byte* from = rows.words + 2 * rows.next;
  const std::byte* const end = rows.words + 2 * rows.word_count;
  int64_t row = 0;
  // A step takes at most two words per lane; a load reads eight.
  for (; row + kRow <= count && end - from >= 2 * (2 * kRow + 8) && !rows.beyond; row += kRow) {
    VU decoded[kGroups];
    for (int g = 0; g < kGroups; ++g) decoded[g] = hn::Zero(du);
    for (int step = 0; step < kRun; ++step) {
      auto any = hn::MaskFromVec(hn::Zero(du));
      for (int g = 0; g < kGroups; ++g) {
        const VU slot = hn::And(states[g], mask);
        const VU entry = hn::BitCast(du, hn::GatherIndex(di, fused, hn::BitCast(di, slot)));
        const VU code = hn::And(entry, low_byte);
        const VU frequency = hn::And(hn::ShiftRight<8>(entry), frequency_mask);
        const VU state =
            hn::Add(hn::Mul(frequency, hn::ShiftRightSame(states[g], rows.bits)), hn::ShiftRight<20>(entry));
        const auto low = hn::RebindMask(du, hn::Lt(hn::BitCast(di, hn::ShiftRight<16>(state)), lowest));
        uint8_t low_bits[8];
        hn::StoreMaskBits(du, low, low_bits);
        const uint32_t lanes = low_bits[0];
        const auto words = hn::PromoteTo(du, hn::LoadU(dw, reinterpret_cast<const uint16_t*>(from)));
        const auto order = hn::SetTableIndices(du, kRanks.ranks[lanes]);
        const VU word = hn::TableLookupLanes(words, order);
        states[g] = hn::IfThenElse(low, hn::Or(hn::ShiftLeft<16>(state), word), state);
        from += 2 * std::popcount(lanes);
        decoded[g] = hn::Or(decoded[g], hn::ShiftLeftSame(code, 8 * step));
        if (escapes) any = hn::Or(any, hn::Eq(code, escape));
      }
      if (escapes && !hn::AllFalse(du, any)) {
        HWY_ALIGN uint32_t spilled[kLanes];
        for (int g = 0; g < kGroups; ++g) {
          hn::StoreU(states[g], du, rows.states + g * kGroup);
          hn::StoreU(decoded[g], du, spilled + g * kGroup);
        }
        rows.beyond = spell(spelling, rows.states, spilled, step, from) || rows.beyond;
        for (int g = 0; g < kGroups; ++g) {
          states[g] = hn::LoadU(du, rows.states + g * kGroup);
          decoded[g] = hn::LoadU(du, spilled + g * kGroup);
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      uint32_t run[kGroup];
      hn::StoreU(decoded[g], du, run);
      std::memcpy(codes + row + kRun * kGroup * g, run, sizeof(run));
    }
  }
  for (int g = 0; g < kGroups; ++g) hn::StoreU(states[g], du, rows.states + g * kGroup);
  rows.next = (from - rows.words) / 2;
  return row;
}

}  // namespace quantloom::entropy::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::entropy {

HWY_EXPORT(decode_rows);

int64_t decode_rows(RansRows& rows, uint8_t* codes, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(decode_rows)(rows, codes, count);
}

}  // namespace quantloom::entropy
#endif  // HWY_ONCE
