#include "kv_cache/kv_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv_cache/kv_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::kv_cache::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
using DBytes = hn::CappedTag<uint8_t, 16>;

// How eight codes of other sizes than 2, 4 and 8 bits are taken apart: each gets the two bytes that it
// begins in, is moved to the upper one by a product with a power of two, and down again.
struct EightCodes {
  explicit EightCodes(int bits) {
    for (int j = 0; j < 8; ++j) {
      places[2 * j] = static_cast<uint8_t>(j * bits / 8);
      places[2 * j + 1] = static_cast<uint8_t>(j * bits / 8 + 1);
      factors[j] = static_cast<uint16_t>(1 << (8 - j * bits % 8));
    }
  }
  alignas(16) uint8_t places[16];
  alignas(16) uint16_t factors[8];
};

// The codes of a row as bytes; reads up to 15 bytes beyond it and writes up to 63 codes more.
void unpack_row(int bits, [[maybe_unused]] const EightCodes& eight, const std::byte* row, int64_t head_dim,
                uint8_t* HWY_RESTRICT codes) {
  const DBytes d;
  const auto step = static_cast<int64_t>(hn::Lanes(d));
  const auto* bytes = reinterpret_cast<const uint8_t*>(row);
  if (bits == 8) {
    std::memcpy(codes, bytes, static_cast<size_t>(head_dim));
  } else if (bits == 4) {
    const auto mask = hn::Set(d, 0xf);
    for (int64_t i = 0; i < head_dim / 2; i += step) {
      const auto v = hn::LoadU(d, bytes + i);
      hn::StoreInterleaved2(hn::And(v, mask), hn::ShiftRight<4>(v), d, codes + 2 * i);
    }
  } else if (bits == 2) {
    const auto mask = hn::Set(d, 3);
    for (int64_t i = 0; i < head_dim / 4; i += step) {
      const auto v = hn::LoadU(d, bytes + i);
      hn::StoreInterleaved4(hn::And(v, mask), hn::And(hn::ShiftRight<2>(v), mask),
                            hn::And(hn::ShiftRight<4>(v), mask), hn::ShiftRight<6>(v), d, codes + 4 * i);
    }
  } else {
#if HWY_TARGET == HWY_SCALAR
    for (int64_t i = 0; i < head_dim; ++i) {
      const int64_t bit = i * bits;
      const int pair = bytes[bit / 8] | bytes[bit / 8 + 1] << 8;
      codes[i] = static_cast<uint8_t>((pair >> (bit % 8)) & ((1 << bits) - 1));
    }
#else
    const hn::Repartition<uint16_t, DBytes> dw;
    const hn::Rebind<uint8_t, decltype(dw)> dhalf;
    const auto place = hn::Load(d, eight.places);
    const auto factor = hn::Load(dw, eight.factors);
    const auto mask = hn::Set(dw, static_cast<uint16_t>((1 << bits) - 1));
    for (int64_t i = 0; i < head_dim; i += 8) {
      const auto pairs = hn::BitCast(dw, hn::TableLookupBytes(hn::LoadU(d, bytes + i / 8 * bits), place));
      const auto code = hn::And(hn::ShiftRight<8>(hn::Mul(pairs, factor)), mask);
      const hn::RebindToSigned<decltype(dw)> ds;
      hn::StoreU(hn::DemoteTo(dhalf, hn::BitCast(ds, code)), dhalf, codes + i);
    }
#endif
  }
}

HWY_INLINE VF load_codes(const uint8_t* codes) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const hn::Rebind<uint8_t, DF> db;
  return hn::ConvertTo(df, hn::PromoteTo(di, hn::LoadU(db, codes)));
}

// Splits `count` pairs of float16 into two rows of float32.
void load_pairs(const std::byte* from, int64_t count, float* scales, float* least) {
  const DF df;
  const hn::Rebind<uint16_t, DF> dh;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    hn::Vec<decltype(dh)> a, b;
    hn::LoadInterleaved2(dh, reinterpret_cast<const uint16_t*>(from) + 2 * i, a, b);
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, a)), df, scales + i);
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, b)), df, least + i);
  }
  for (; i < count; ++i) {
    uint16_t pair[2];
    std::memcpy(pair, from + i * 4, sizeof pair);
    scales[i] = float_from_f16(pair[0]);
    least[i] = float_from_f16(pair[1]);
  }
}

// Scales and least values of the channels of a group.
void load_channels(int bits, int64_t head_dim, const std::byte* from, float* scales, float* least) {
  if (!has_code_windows(bits, head_dim)) return load_pairs(from, head_dim, scales, least);
  alignas(64) float even[1024 + kRowPadding];
  alignas(64) float odd[1024 + kRowPadding];
  load_pairs(from, head_dim, even, odd);
  // Pairs now are channels of the two windows of a word.
  const int64_t window = 16 / bits;
  for (int64_t first = 0; first < head_dim; first += 2 * window) {
    for (int64_t i = 0; i < window; ++i) {
      scales[first + i] = even[first + i];
      scales[first + window + i] = odd[first + i];
      least[first + i] = even[first + window + i];
      least[first + window + i] = odd[first + window + i];
    }
  }
}

void decode_rows(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                 float* HWY_RESTRICT out, const HeadTables& tables) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  alignas(64) uint8_t codes[1024 + 64] = {};
  alignas(64) float scales[1024 + kRowPadding] = {};
  alignas(64) float least[1024 + kRowPadding] = {};
  const EightCodes eight(part.bits);
  int64_t loaded = -1;
  float* const begin = out;
  for (int64_t t = slot; t < slot + count; ++t, out += head_dim) {
    unpack_row(part.bits, eight, record + part.codes + t * part.row_bytes, head_dim, codes);
    if (part.codec == KVCodec::channel_grid) {
      const int64_t group = t / part.group;
      if (group != loaded) {
        load_channels(part.bits, head_dim, record + part.parameters + group * head_dim * 4, scales, least);
        loaded = group;
      }
      for (int64_t d = 0; d < head_dim; d += step) {
        const VF value =
            hn::MulAdd(hn::LoadU(df, scales + d), load_codes(codes + d), hn::LoadU(df, least + d));
        hn::StoreU(value, df, out + d);
      }
      continue;
    }
    if (part.codec == KVCodec::digits) {
      uint16_t stored = 0;
      std::memcpy(&stored, record + part.parameters + t * 2, sizeof stored);
      const VF half = hn::Set(df, static_cast<float>(1 << (part.bits - 1)));
      const VF all = hn::Add(half, half);
      const auto* shifts = reinterpret_cast<const uint8_t*>(record + part.shifts + t * part.shift_bytes);
      for (int64_t g = 0; g < part.groups; ++g) {
        const int64_t bit = g * part.shift_bits;
        const int pair = shifts[bit / 8] | (bit % 8 + part.shift_bits > 8 ? shifts[bit / 8 + 1] << 8 : 0);
        const int shift = (pair >> (bit % 8)) & ((1 << part.shift_bits) - 1);
        // Exact, as scale * (code * 2^shift) is.
        const VF scale = hn::Set(df, float_from_f16(stored) * static_cast<float>(1 << shift));
        const int64_t end = std::min((g + 1) * part.group, head_dim);
        for (int64_t d = g * part.group; d < end; d += step) {
          const VF code = load_codes(codes + d);
          const VF value = hn::Sub(code, hn::IfThenElseZero(hn::Ge(code, half), all));  // two's complement
          hn::StoreU(hn::Mul(scale, value), df, out + d);
        }
      }
      continue;
    }
    if (part.has_table()) {
      // Of values, one pair for all channels.
      const bool by_channel = part.codec == KVCodec::channel_table;
      if (!by_channel) load_pairs(record + part.parameters + t * 4, 1, scales, least);
      const hn::Rebind<int32_t, DF> di;
      const hn::Rebind<uint8_t, DF> db;
      int64_t d = 0;
      for (; d + step <= head_dim; d += step) {
        const auto index = hn::PromoteTo(di, hn::LoadU(db, codes + d));
        const VF value = hn::GatherIndex(df, tables.values, index);
        const VF scale = by_channel ? hn::LoadU(df, tables.scale + d) : hn::Set(df, scales[0]);
        const VF middle = by_channel ? hn::LoadU(df, tables.middle + d) : hn::Set(df, least[0]);
        hn::StoreU(hn::MulAdd(value, scale, middle), df, out + d);
      }
      for (; d < head_dim; ++d) {
        out[d] = tables.values[codes[d]] * (by_channel ? tables.scale[d] : scales[0]) +
                 (by_channel ? tables.middle[d] : least[0]);
      }
      continue;
    }
    load_pairs(record + part.parameters + t * part.groups * 4, part.groups, scales, least);
    for (int64_t g = 0; g < part.groups; ++g) {
      const VF scale = hn::Set(df, scales[g]);
      const VF low = hn::Set(df, least[g]);
      const int64_t end = std::min((g + 1) * part.group, head_dim);
      // The last vector reaches into the next group, which overwrites it.
      for (int64_t d = g * part.group; d < end; d += step) {
        hn::StoreU(hn::MulAdd(scale, load_codes(codes + d), low), df, out + d);
      }
    }
  }
  if (part.has_table()) add_outliers(part, head_dim, record, slot, count, begin);
}

void rotate_rows(float* HWY_RESTRICT rows, int64_t count, int64_t head_dim, const float* HWY_RESTRICT cosines,
                 const float* HWY_RESTRICT sines, int64_t half) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  for (int64_t t = 0; t < count; ++t, rows += head_dim, cosines += half, sines += half) {
    int64_t i = 0;
    // No fused operations: every instruction set gives the same bits.
    for (; i + step <= half; i += step) {
      const VF a = hn::LoadU(df, rows + i);
      const VF b = hn::LoadU(df, rows + half + i);
      const VF c = hn::LoadU(df, cosines + i);
      const VF s = hn::LoadU(df, sines + i);
      hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), df, rows + i);
      hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), df, rows + half + i);
    }
    for (; i < half; ++i) {
      const float a = rows[i];
      const float b = rows[half + i];
      rows[i] = a * cosines[i] - b * sines[i];
      rows[half + i] = b * cosines[i] + a * sines[i];
    }
  }
}

void widen_row(DType dtype, const std::byte* from, int64_t count, float* HWY_RESTRICT out) {
  const DF df;
  const hn::Rebind<uint16_t, DF> dh;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  if (dtype == DType::f32) {
    std::memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == DType::f16) {
    const hn::Rebind<hwy::float16_t, DF> df16;
    for (; i + step <= count; i += step) {
      hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(dh, bits + i))), df, out + i);
    }
    for (; i < count; ++i) out[i] = float_from_f16(bits[i]);
    return;
  }
  const hn::Rebind<hwy::bfloat16_t, DF> dbf16;
  for (; i + step <= count; i += step) {
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(dbf16, hn::LoadU(dh, bits + i))), df, out + i);
  }
  for (; i < count; ++i) out[i] = float_from_bf16(bits[i]);
}

// Most queries whose sums are held in registers at once.
constexpr int kTile = 4;
constexpr int64_t kMostTokens = 64;

#if HWY_TARGET != HWY_SCALAR
// The sums of the lanes of four vectors, next to each other, in fewer steps than one by one.
HWY_INLINE void store_four_sums(const VF (&v)[4], float* HWY_RESTRICT to) {
  const DF df;
  const hn::CappedTag<float, 4> block;
  const VF even = hn::Add(hn::InterleaveLower(df, v[0], v[2]), hn::InterleaveUpper(df, v[0], v[2]));
  const VF odd = hn::Add(hn::InterleaveLower(df, v[1], v[3]), hn::InterleaveUpper(df, v[1], v[3]));
  const VF all = hn::Add(hn::InterleaveLower(df, even, odd), hn::InterleaveUpper(df, even, odd));
  alignas(64) float blocks[16];
  hn::Store(all, df, blocks);
  auto sum = hn::Load(block, blocks);
  for (size_t i = 4; i < hn::Lanes(df); i += 4) sum = hn::Add(sum, hn::Load(block, blocks + i));
  hn::StoreU(sum, block, to);
}
#endif

// weights[r * kMostTokens + t] = query r . key t, of kRows queries and kCount keys, so that no sum waits for
// another and each vector that is loaded meets several.
template <int kRows, int kCount>
HWY_INLINE void score(const float* HWY_RESTRICT queries, int64_t stride, const float* HWY_RESTRICT keys,
                      int64_t head_dim, float* HWY_RESTRICT weights) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  VF sum[kRows][kCount];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kCount; ++t) sum[r][t] = hn::Zero(df);
  }
  for (int64_t d = 0; d < head_dim; d += step) {
    VF key[kCount];
    for (int t = 0; t < kCount; ++t) key[t] = hn::LoadU(df, keys + t * head_dim + d);
    for (int r = 0; r < kRows; ++r) {
      const VF query = hn::Load(df, queries + r * stride + d);
      for (int t = 0; t < kCount; ++t) sum[r][t] = hn::MulAdd(query, key[t], sum[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* to = weights + r * kMostTokens;
#if HWY_TARGET != HWY_SCALAR
    if constexpr (kCount == 4) {
      store_four_sums(sum[r], to);
      continue;
    }
#endif
    for (int t = 0; t < kCount; ++t) to[t] = hn::GetLane(hn::SumOfLanes(df, sum[r][t]));
  }
}

// Scores to weights of the softmax, of which only the first `seen` are not 0; returns what earlier sums are
// multiplied with.
HWY_INLINE float weigh(int64_t seen, float* HWY_RESTRICT weights, SoftmaxRow& state) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  std::fill(weights + seen, weights + kMostTokens, 0.0F);
  if (seen == 0) return 1.0F;
  const float largest = std::max(state.largest, *std::max_element(weights, weights + seen));
  std::fill(weights + seen, weights + kMostTokens, -HUGE_VALF);
  VF total = hn::Zero(df);
  for (int64_t t = 0; t < kMostTokens; t += step) {
    // Below -87 float32 has no exponential of its own; what is left there is 0.
    const VF below = hn::Sub(hn::LoadU(df, weights + t), hn::Set(df, largest));
    const VF bounded = hn::Max(below, hn::Set(df, -87.0F));
    const VF weight = hn::IfThenElseZero(hn::Ge(below, hn::Set(df, -87.0F)), hn::Exp(df, bounded));
    hn::StoreU(weight, df, weights + t);
    total = hn::Add(total, weight);
  }
  const float kept = std::exp(state.largest - largest);
  state.sum = state.sum * kept + hn::GetLane(hn::SumOfLanes(df, total));
  state.largest = largest;
  return kept;
}

// sums = kept * sums + weights . values
template <int kRows, int kVectors>
HWY_INLINE void gather(const float* HWY_RESTRICT weights, const float* kept, const float* HWY_RESTRICT values,
                       int64_t tokens, int64_t head_dim, float* HWY_RESTRICT sums, int64_t stride) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  VF sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = hn::Mul(hn::Load(df, sums + r * stride + v * step), hn::Set(df, kept[r]));
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    VF value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = hn::LoadU(df, values + t * head_dim + v * step);
    for (int r = 0; r < kRows; ++r) {
      const VF weight = hn::Set(df, weights[r * kMostTokens + t]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(weight, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::Store(sum[r][v], df, sums + r * stride + v * step);
  }
}

template <int kRows>
void attend_tile(const float* HWY_RESTRICT queries, int64_t stride, const int64_t* HWY_RESTRICT visible,
                 const float* HWY_RESTRICT keys, const float* HWY_RESTRICT values, int64_t tokens,
                 int64_t head_dim, SoftmaxRow* HWY_RESTRICT state, float* HWY_RESTRICT sums) {
  const auto step = static_cast<int64_t>(hn::Lanes(DF()));
  alignas(64) float weights[kRows * kMostTokens];
  int64_t seen[kRows];
  int64_t most = 0;
  for (int r = 0; r < kRows; ++r) {
    seen[r] = std::clamp<int64_t>(visible[r], 0, tokens);
    most = std::max(most, seen[r]);
  }
  if (most == 0) return;
  int64_t t = 0;
  for (; t + 4 <= most; t += 4) score<kRows, 4>(queries, stride, keys + t * head_dim, head_dim, weights + t);
  for (; t < most; ++t) score<kRows, 1>(queries, stride, keys + t * head_dim, head_dim, weights + t);
  float kept[kRows];
  for (int r = 0; r < kRows; ++r) kept[r] = weigh(seen[r], weights + r * kMostTokens, state[r]);
  int64_t d = 0;
  for (; d + step < head_dim; d += 2 * step) {
    gather<kRows, 2>(weights, kept, values + d, most, head_dim, sums + d, stride);
  }
  if (d < head_dim) gather<kRows, 1>(weights, kept, values + d, most, head_dim, sums + d, stride);
}

void attend_block(const float* HWY_RESTRICT queries, int64_t rows, int64_t stride,
                  const int64_t* HWY_RESTRICT visible, const float* HWY_RESTRICT keys,
                  const float* HWY_RESTRICT values, int64_t tokens, int64_t head_dim,
                  SoftmaxRow* HWY_RESTRICT state, float* HWY_RESTRICT sums) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) {
    attend_tile<kTile>(queries + r * stride, stride, visible + r, keys, values, tokens, head_dim, state + r,
                       sums + r * stride);
  }
  for (; r + 2 <= rows; r += 2) {
    attend_tile<2>(queries + r * stride, stride, visible + r, keys, values, tokens, head_dim, state + r,
                   sums + r * stride);
  }
  if (r < rows) {
    attend_tile<1>(queries + r * stride, stride, visible + r, keys, values, tokens, head_dim, state + r,
                   sums + r * stride);
  }
}

}  // namespace quantloom::kv_cache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kv_cache {

HWY_EXPORT(decode_rows);
HWY_EXPORT(rotate_rows);
HWY_EXPORT(widen_row);
HWY_EXPORT(attend_block);

void decode_rows(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                 float* out, const HeadTables& tables) {
  HWY_DYNAMIC_DISPATCH(decode_rows)(part, head_dim, record, slot, count, out, tables);
}

void rotate_rows(float* rows, int64_t count, int64_t head_dim, const float* cosines, const float* sines,
                 int64_t half) {
  HWY_DYNAMIC_DISPATCH(rotate_rows)(rows, count, head_dim, cosines, sines, half);
}

void widen_row(DType dtype, const std::byte* from, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(widen_row)(dtype, from, count, out);
}

void attend_block(const float* queries, int64_t rows, int64_t stride, const int64_t* visible,
                  const float* keys, const float* values, int64_t tokens, int64_t head_dim, SoftmaxRow* state,
                  float* sums) {
  HWY_DYNAMIC_DISPATCH(attend_block)
  (queries, rows, stride, visible, keys, values, tokens, head_dim, state, sums);
}

}  // namespace quantloom::kv_cache
#endif  // HWY_ONCE
