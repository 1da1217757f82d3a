// The loops of products with binary coding.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_bcq.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include "kernels/decoders-inl.hpp"
#include "kernels/prepared_bcq.hpp"

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

constexpr int kNibbles = static_cast<int>(kNibblesPerDword);
constexpr int kBlockNibbles = static_cast<int>(kBlockColumns / kNibbleColumns);
constexpr int64_t kVectorBytes = kStripRows * 4;

// The 16 sums of 4 inputs.
class Table {
 public:
#if QUANTLOOM_AVX512 || HWY_TARGET == HWY_AVX2
  explicit HWY_INLINE Table(const float* HWY_RESTRICT entries) : entries_(hn::Load(DF(), entries)) {}
#else
  explicit HWY_INLINE Table(const float* HWY_RESTRICT entries) : entries_(entries) {}
#endif

  // The entries that the low 4 bits of each dword name; bits above them are arbitrary.
  HWY_INLINE VF look_up(VU index) const {
#if QUANTLOOM_AVX512
    return VF{_mm512_permutexvar_ps(index.raw, entries_.raw)};
#elif HWY_TARGET == HWY_AVX2
    // The first 8 entries: the others are these with the other sign.
    const VF entry{_mm256_permutevar8x32_ps(entries_.raw, index.raw)};
    const VU sign = hn::And(hn::ShiftLeft<28>(index), hn::Set(DU(), 0x80000000U));
    return hn::Xor(entry, hn::BitCast(DF(), sign));
#else
    const VU code = hn::And(index, hn::Set(DU(), 15U));
    return hn::GatherIndex(DF(), entries_, hn::BitCast(DI(), code));
#endif
  }

 private:
#if QUANTLOOM_AVX512 || HWY_TARGET == HWY_AVX2
  VF entries_;
#else
  const float* entries_;
#endif
};

template <int kNibble, int kTile, int kChains>
HWY_INLINE void add_nibble(VU words, const float* HWY_RESTRICT tables, VF (&sum)[kTile][kChains]) {
  const VU index = shift_right<4 * kNibble>(words);
  HWY_UNROLL(4)
  for (int t = 0; t < kTile; ++t) {
    VF& chain = sum[t][kNibble % kChains];
    chain = hn::Add(chain, Table(tables + (kNibble * kTile + t) * kTableEntries).look_up(index));
  }
}

template <int kTile, int kChains, int... kNibble>
HWY_INLINE void add_dword(const uint8_t* HWY_RESTRICT p, const float* HWY_RESTRICT tables,
                          VF (&sum)[kTile][kChains], std::integer_sequence<int, kNibble...> /*nibbles*/) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): as in decoders-inl.hpp
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 4096));
  const VU words = load_words(p);
  (add_nibble<kNibble>(words, tables, sum), ...);
}

// y[t] + scale * (the sum of one plane of a block). `at`: the plane's first nibble behind p.
template <int kTile>
HWY_INLINE void add_plane(const uint8_t* HWY_RESTRICT p, int at, int nibbles,
                          const float* HWY_RESTRICT tables, VF scale, VF (&y)[kTile]) {
  constexpr int kChains = 4 / kTile;
  VF sum[kTile][kChains];
  for (auto& token : sum) {
    for (VF& chain : token) chain = hn::Zero(DF());
  }
  if (nibbles == kBlockNibbles) {
    for (int dword = 0; dword < kBlockNibbles / kNibbles; ++dword) {
      add_dword<kTile>(p, tables, sum, std::make_integer_sequence<int, kNibbles>());
      p += kVectorBytes;
      tables += kNibbles * kTile * kTableEntries;
    }
  } else {
    for (int i = 0; i < nibbles; ++i) {
      const VU words = load_words(p + (at + i) / kNibbles * kVectorBytes);
      const VU index = hn::ShiftRightSame(words, 4 * ((at + i) % kNibbles));
      for (int t = 0; t < kTile; ++t) {
        sum[t][0] = hn::Add(sum[t][0], Table(tables + (i * kTile + t) * kTableEntries).look_up(index));
      }
    }
  }
  for (int t = 0; t < kTile; ++t) {
    VF total = sum[t][0];
    for (int c = 1; c < kChains; ++c) total = hn::Add(total, sum[t][c]);
    y[t] = hn::MulAdd(total, scale, y[t]);
  }
}

template <int kTile>
void slab_of_tile(const BcqMatrix& w, const BcqTile& tile, int64_t slab) {
  const DF df;
  const int64_t first_strip = slab * kSlabStrips;
  const int64_t strips = HWY_MIN(kSlabStrips, ceil_div(w.rows, kStripRows) - first_strip);
  const uint8_t* HWY_RESTRICT p = w.stream + slab * w.slab_bytes;
  const float* HWY_RESTRICT tables = tile.tables;
  const int64_t scale_bytes = kStripRows * size_of(w.scale_dtype);
  const int64_t header = (w.bits + (w.offset ? 1 : 0)) * scale_bytes;
  VF y[kSlabStrips][kParts][kTile];
  for (auto& strip : y) {
    for (auto& part : strip) {
      for (VF& value : part) value = hn::Zero(df);
    }
  }
  for (int64_t g = 0; g < w.group_count; ++g) {
    const uint8_t* HWY_RESTRICT headers = p;
    p += strips * header;
    for (int64_t strip = 0; w.offset && strip < strips; ++strip) {
      for (int part = 0; part < kParts; ++part) {
        const VF offsets = load_scales(headers + strip * header + w.bits * scale_bytes, w.scale_dtype, part);
        for (int t = 0; t < kTile; ++t) {
          VF& value = y[strip][part][t];
          value = hn::MulAdd(offsets, hn::Set(df, tile.group_sum[g * kTile + t]), value);
        }
      }
    }
    const GroupPlan plan = w.groups[g];
    for (int b = 0; b <= plan.full_blocks; ++b) {
      const int nibbles = b < plan.full_blocks ? kBlockNibbles : plan.tail_steps;
      if (nibbles == 0) break;
      for (int64_t strip = 0; strip < strips; ++strip) {
        for (int plane = 0; plane < w.bits; ++plane) {
          const int at = plane * nibbles;
          const uint8_t* HWY_RESTRICT words = p + at / kNibbles * kVectorBytes;
          const uint8_t* HWY_RESTRICT scales = headers + strip * header + plane * scale_bytes;
          for (int part = 0; part < kParts; ++part) {
            add_plane<kTile>(words + part * kLanes * 4, at % kNibbles, nibbles, tables,
                             load_scales(scales, w.scale_dtype, part), y[strip][part]);
          }
        }
        p += dwords_of(nibbles, w.bits) * kVectorBytes;
      }
      tables += int64_t{nibbles} * kTile * kTableEntries;
    }
  }
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int t = 0; t < tile.tokens; ++t) {
      VF rows[kParts];
      for (int part = 0; part < kParts; ++part) rows[part] = y[strip][part][t];
      store_rows(rows, tile.y + t * tile.y_stride, (first_strip + strip) * kStripRows, w.rows);
    }
  }
}

void multiply_slab(const BcqMatrix& w, const BcqTile& tile, int64_t slab) {
  if (tile.tile == 1) return slab_of_tile<1>(w, tile, slab);
  return slab_of_tile<kTableTokens>(w, tile, slab);
}

void fill_sum_tables(const float* x, int tile, int64_t first, int64_t last, float* tables) {
  const DF df;
  constexpr int kParts16 = static_cast<int>(kTableEntries) / kLanes;
  // For each entry whether a column is taken off, as a sign bit.
  VU minus[4][kParts16];
  for (int c = 0; c < 4; ++c) {
    HWY_ALIGN uint32_t signs[kTableEntries];
    for (uint32_t i = 0; i < kTableEntries; ++i) {
      const bool turned = (i & 8U) != 0;
      const bool alike = c == 3 || (i >> c & 1U) != 0;
      signs[i] = turned == alike ? 0x80000000U : 0U;
    }
    for (int part = 0; part < kParts16; ++part) minus[c][part] = hn::Load(DU(), signs + part * kLanes);
  }
  for (int64_t i = first; i < last; ++i) {
    for (int t = 0; t < tile; ++t) {
      const float* const values = x + i * kNibbleColumns * tile + t;
      for (int part = 0; part < kParts16; ++part) {
        const auto signed_value = [&](int c) {
          return hn::Xor(hn::Set(df, values[c * tile]), hn::BitCast(df, minus[c][part]));
        };
        const VF sum =
            hn::Add(hn::Add(signed_value(0), signed_value(1)), hn::Add(signed_value(2), signed_value(3)));
        hn::Store(sum, df, tables + (i * tile + t) * kTableEntries + part * kLanes);
      }
    }
  }
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(multiply_slab);
HWY_EXPORT(fill_sum_tables);

void multiply_slab(const BcqMatrix& w, const BcqTile& tile, int64_t slab) {
  HWY_DYNAMIC_DISPATCH(multiply_slab)(w, tile, slab);
}

void fill_sum_tables(const float* x, int tile, int64_t first, int64_t last, float* tables) {
  HWY_DYNAMIC_DISPATCH(fill_sum_tables)(x, tile, first, last, tables);
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
