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

// The codes of a row as bytes; reads up to 15 bytes beyond it and writes up to 63 codes more.
void unpack_row(int bits, const std::byte* row, int64_t head_dim, uint8_t* HWY_RESTRICT codes) {
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
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    for (int64_t i = 0; i < head_dim; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i / 8 * bits, sizeof word);
      for (int64_t j = 0; j < 8; ++j) codes[i + j] = static_cast<uint8_t>((word >> (j * bits)) & mask);
    }
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

void decode_rows(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                 float* HWY_RESTRICT out, const HeadTables& tables) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  alignas(64) uint8_t codes[1024 + 64] = {};
  alignas(64) float scales[1024 + kRowPadding] = {};
  alignas(64) float least[1024 + kRowPadding] = {};
  int64_t loaded = -1;
  float* const begin = out;
  for (int64_t t = slot; t < slot + count; ++t, out += head_dim) {
    unpack_row(part.bits, record + part.codes + t * part.row_bytes, head_dim, codes);
    if (part.codec == KVCodec::channel_grid) {
      const int64_t group = t / part.group;
      if (group != loaded) {
        load_pairs(record + part.parameters + group * head_dim * 4, head_dim, scales, least);
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

// Scores of one query and kCount keys at once, so that sums do not wait for each other.
template <int kCount>
HWY_INLINE void score(const float* HWY_RESTRICT query, const float* HWY_RESTRICT keys, int64_t head_dim,
                      float* HWY_RESTRICT scores) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  VF sum[kCount];
  for (int t = 0; t < kCount; ++t) sum[t] = hn::Zero(df);
  for (int64_t d = 0; d < head_dim; d += step) {
    const VF q = hn::Load(df, query + d);
    for (int t = 0; t < kCount; ++t) {
      sum[t] = hn::MulAdd(q, hn::LoadU(df, keys + t * head_dim + d), sum[t]);
    }
  }
  for (int t = 0; t < kCount; ++t) scores[t] = hn::GetLane(hn::SumOfLanes(df, sum[t]));
}

void attend_block(const float* HWY_RESTRICT queries, int64_t rows, int64_t stride,
                  const int64_t* HWY_RESTRICT visible, const float* HWY_RESTRICT keys,
                  const float* HWY_RESTRICT values, int64_t tokens, int64_t head_dim,
                  SoftmaxRow* HWY_RESTRICT state, float* HWY_RESTRICT sums) {
  const DF df;
  const auto step = static_cast<int64_t>(hn::Lanes(df));
  alignas(64) float weights[64 + kRowPadding];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = std::min(visible[r], tokens);
    if (seen <= 0) continue;
    const float* query = queries + r * stride;
    int64_t t = 0;
    for (; t + 4 <= seen; t += 4) score<4>(query, keys + t * head_dim, head_dim, weights + t);
    for (; t < seen; ++t) score<1>(query, keys + t * head_dim, head_dim, weights + t);
    float largest = state[r].largest;
    for (t = 0; t < seen; ++t) largest = std::max(largest, weights[t]);
    for (t = seen; t < seen + kRowPadding; ++t) weights[t] = -HUGE_VALF;
    const float kept = std::exp(state[r].largest - largest);
    VF total = hn::Zero(df);
    for (t = 0; t < seen; t += step) {
      // Below -87 float32 has no exponential of its own; what is left there is 0.
      const VF below = hn::Sub(hn::LoadU(df, weights + t), hn::Set(df, largest));
      const VF bounded = hn::Max(below, hn::Set(df, -87.0F));
      const VF weight = hn::IfThenElseZero(hn::Ge(below, hn::Set(df, -87.0F)), hn::Exp(df, bounded));
      hn::StoreU(weight, df, weights + t);
      total = hn::Add(total, weight);
    }
    state[r].sum = state[r].sum * kept + hn::GetLane(hn::SumOfLanes(df, total));
    state[r].largest = largest;
    float* HWY_RESTRICT out = sums + r * stride;
    for (int64_t d = 0; d < head_dim; d += step) {
      VF sum = hn::Mul(hn::Load(df, out + d), hn::Set(df, kept));
      for (t = 0; t < seen; ++t) {
        sum = hn::MulAdd(hn::Set(df, weights[t]), hn::LoadU(df, values + t * head_dim + d), sum);
      }
      hn::Store(sum, df, out + d);
    }
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
