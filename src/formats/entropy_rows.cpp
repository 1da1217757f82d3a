#include "formats/entropy_rows.hpp"

#include <bit>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/entropy_rows.cpp"
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

// A word for each lane of the mask, in order; `from` moves behind them.
HWY_INLINE VU take_words(hn::Mask<DU> need, const std::byte*& from) {
  const DU du;
  uint8_t bits[8];
  hn::StoreMaskBits(du, need, bits);
  const uint32_t lanes = bits[0];
  const auto words = hn::PromoteTo(du, hn::LoadU(DW(), reinterpret_cast<const uint16_t*>(from)));
  from += 2 * std::popcount(lanes);
  return hn::TableLookupLanes(words, hn::SetTableIndices(du, kRanks.ranks[lanes]));
}

HWY_INLINE VU gather(const uint32_t* from, VU index) {
  const DI di;
  return hn::BitCast(DU(),
                     hn::GatherIndex(di, reinterpret_cast<const int32_t*>(from), hn::BitCast(di, index)));
}

// The runs of a row: four codes of each lane.
HWY_INLINE void store_runs(const VU* runs, uint8_t* codes) {
  for (int g = 0; g < kGroups; ++g) {
    uint32_t run[kGroup];
    hn::StoreU(runs[g], DU(), run);
    std::memcpy(codes + kRun * kGroup * g, run, sizeof(run));
  }
}

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

int64_t decode_rans_rows(RansRows& rows, uint8_t* codes, int64_t count) {
  const DU du;
  const DI di;
  const EntropyTables& tables = *rows.tables;
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
        const VU entry = gather(tables.fused.data(), slot);
        const VU code = hn::And(entry, low_byte);
        const VU frequency = hn::And(hn::ShiftRight<8>(entry), frequency_mask);
        const VU state =
            hn::Add(hn::Mul(frequency, hn::ShiftRightSame(states[g], rows.bits)), hn::ShiftRight<20>(entry));
        const auto low = hn::RebindMask(du, hn::Lt(hn::BitCast(di, hn::ShiftRight<16>(state)), lowest));
        const VU word = take_words(low, from);
        states[g] = hn::IfThenElse(low, hn::Or(hn::ShiftLeft<16>(state), word), state);
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
    store_runs(decoded, codes + row);
  }
  for (int g = 0; g < kGroups; ++g) hn::StoreU(states[g], du, rows.states + g * kGroup);
  rows.next = (from - rows.words) / 2;
  return row;
}

int64_t decode_huffman_rows(HuffmanRows& rows, uint8_t* codes, int64_t count) {
  const DU du;
  const DI di;
  const uint32_t* prefixes = rows.tables->prefixes.data();
  const auto mask = hn::Set(du, (1U << rows.bits) - 1);
  const auto least = hn::Set(du, static_cast<uint32_t>(rows.bits));
  const auto word_bits = hn::Set(du, 16U);
  const auto low_byte = hn::Set(du, 0xffU);
  VU windows[kGroups];
  VU held[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    windows[g] = hn::LoadU(du, rows.windows + g * kGroup);
    held[g] = hn::LoadU(du, rows.held + g * kGroup);
  }
  const std::byte* from = rows.words + 2 * rows.next;
  const std::byte* const end = rows.words + 2 * rows.word_count;
  int64_t row = 0;
  // A step takes at most one word per lane; a load reads eight.
  for (; row + kRow <= count && end - from >= 2 * (kRow + 8); row += kRow) {
    VU decoded[kGroups];
    for (int g = 0; g < kGroups; ++g) decoded[g] = hn::Zero(du);
    for (int step = 0; step < kRun; ++step) {
      for (int g = 0; g < kGroups; ++g) {
        const auto low = hn::RebindMask(du, hn::Lt(hn::BitCast(di, held[g]), hn::BitCast(di, least)));
        const VU word = take_words(low, from);
        windows[g] = hn::IfThenElse(low, hn::Or(hn::ShiftLeft<16>(windows[g]), word), windows[g]);
        held[g] = hn::Add(held[g], hn::IfThenElseZero(low, word_bits));
        const VU entry = gather(prefixes, hn::And(hn::Shr(windows[g], hn::Sub(held[g], least)), mask));
        held[g] = hn::Sub(held[g], hn::And(entry, low_byte));
        decoded[g] = hn::Or(decoded[g], hn::ShiftLeftSame(hn::ShiftRight<8>(entry), 8 * step));
      }
    }
    store_runs(decoded, codes + row);
  }
  for (int g = 0; g < kGroups; ++g) {
    hn::StoreU(windows[g], du, rows.windows + g * kGroup);
    hn::StoreU(held[g], du, rows.held + g * kGroup);
  }
  rows.next = (from - rows.words) / 2;
  return row;
}

}  // namespace quantloom::entropy::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::entropy {

HWY_EXPORT(decode_rans_rows);
HWY_EXPORT(decode_huffman_rows);

int64_t decode_rans_rows(RansRows& rows, uint8_t* codes, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(decode_rans_rows)(rows, codes, count);
}
int64_t decode_huffman_rows(HuffmanRows& rows, uint8_t* codes, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(decode_huffman_rows)(rows, codes, count);
}

}  // namespace quantloom::entropy
#endif  // HWY_ONCE
