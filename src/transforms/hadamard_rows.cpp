#include "transforms/hadamard_rows.hpp"

#include <algorithm>
#include <cstring>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "transforms/hadamard_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::transforms::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using D16 = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;

HWY_INLINE VF float_from_halves(hn::Vec<D16> bits, bool bfloat) {
  const DF df;
  if (bfloat) return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(DU(), bits)));
  return hn::PromoteTo(df, hn::BitCast(hn::Rebind<hwy::float16_t, DF>(), bits));
}

// As bf16_from_float().
HWY_INLINE hn::Vec<D16> bf16_from_floats(VF value) {
  const DU du;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto is_nan = hn::RebindMask(du, hn::Ne(value, value));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  return hn::DemoteTo(D16(), hn::BitCast(hn::RebindToSigned<DU>(), high));
}

// The conversions of these instruction sets round as f16_from_float(); others are Highway's emulation, which
// need not.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
constexpr bool kConvertsHalves = true;
#else
constexpr bool kConvertsHalves = false;
#endif

void load(const RowSpan& span, bool with_signs, float* HWY_RESTRICT to) {
  const DF df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  if (span.dtype == DType::f32) {
    std::memcpy(to, span.x, static_cast<size_t>(span.count) * sizeof(float));
  } else {
    const auto* from = static_cast<const uint16_t*>(span.x);
    const bool bfloat = span.dtype == DType::bf16;
    if (bfloat || kConvertsHalves) {
      for (; i + lanes <= span.count; i += lanes) {
        hn::StoreU(float_from_halves(hn::LoadU(D16(), from + i), bfloat), df, to + i);
      }
    }
    for (; i < span.count; ++i) to[i] = bfloat ? float_from_bf16(from[i]) : float_from_f16(from[i]);
  }
  std::fill(to + span.count, to + span.count + kBufferPadding, 0.0F);
  if (!with_signs) return;
  for (i = 0; i + lanes <= span.count; i += lanes) {
    const auto bits = hn::Xor(hn::BitCast(DU(), hn::LoadU(df, to + i)), hn::LoadU(DU(), span.signs + i));
    hn::StoreU(hn::BitCast(df, bits), df, to + i);
  }
  for (; i < span.count; ++i) to[i] = span.signs[i] == 0 ? to[i] : -to[i];
}

void store(const RowSpan& span, bool with_signs, float factor, float* HWY_RESTRICT from) {
  const DF df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t count = span.count;
  const VF factors = hn::Set(df, factor);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    VF value = hn::Mul(hn::LoadU(df, from + i), factors);
    if (span.scales != nullptr) value = hn::Mul(value, hn::LoadU(df, span.scales + i));
    if (with_signs) {
      value = hn::BitCast(df, hn::Xor(hn::BitCast(DU(), value), hn::LoadU(DU(), span.signs + i)));
    }
    hn::StoreU(value, df, from + i);
  }
  for (; i < count; ++i) {
    float value = from[i] * factor;
    if (span.scales != nullptr) value *= span.scales[i];
    from[i] = with_signs && span.signs[i] != 0 ? -value : value;
  }
  if (span.dtype == DType::f32) {
    std::memcpy(span.out, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(span.out);
  i = 0;
  if (span.dtype == DType::bf16) {
    for (; i + lanes <= count; i += lanes)
      hn::StoreU(bf16_from_floats(hn::LoadU(df, from + i)), D16(), to + i);
    for (; i < count; ++i) to[i] = bf16_from_float(from[i]);
    return;
  }
  if (kConvertsHalves) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    for (; i + lanes <= count; i += lanes) {
      hn::StoreU(hn::BitCast(D16(), hn::DemoteTo(dh, hn::LoadU(df, from + i))), D16(), to + i);
    }
  }
  for (; i < count; ++i) to[i] = f16_from_float(from[i]);
}

// Butterflies of stride s, in vectors of at most s elements.
template <class D>
void one_stride(float* HWY_RESTRICT x, int64_t count, int64_t s) {
  const D d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t base = 0; base < count; base += 2 * s) {
    for (int64_t i = base; i < base + s; i += lanes) {
      const auto a = hn::LoadU(d, x + i);
      const auto b = hn::LoadU(d, x + i + s);
      hn::StoreU(hn::Add(a, b), d, x + i);
      hn::StoreU(hn::Sub(a, b), d, x + i + s);
    }
  }
}

// Pairs of neighbours, then (four) of elements 2 apart, in each run of 4. Products with +-1 are exact.
template <bool kSecond>
void shortest_strides(float* HWY_RESTRICT x, int64_t count) {
#if HWY_TARGET == HWY_SCALAR
  one_stride<DF>(x, count, 1);
  if (kSecond) one_stride<DF>(x, count, 2);
#else
  const DF df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const DU du;
  const auto index = hn::Iota(du, 0);
  const auto sign_of = [&](uint32_t bit) {
    const auto high = hn::Ne(hn::And(index, hn::Set(du, bit)), hn::Zero(du));
    return hn::IfThenElse(hn::RebindMask(df, high), hn::Set(df, -1.0F), hn::Set(df, 1.0F));
  };
  const VF first = sign_of(1);
  const VF second = sign_of(2);
  for (int64_t i = 0; i < count; i += lanes) {
    VF value = hn::LoadU(df, x + i);
    value = hn::MulAdd(value, first, hn::Shuffle2301(value));
    if (kSecond) value = hn::MulAdd(value, second, hn::Shuffle1032(value));
    hn::StoreU(value, df, x + i);
  }
#endif
}

// Butterflies of strides s and then 2 s.
template <class D>
void two_strides(float* HWY_RESTRICT x, int64_t count, int64_t s) {
  const D d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t base = 0; base < count; base += 4 * s) {
    for (int64_t i = base; i < base + s; i += lanes) {
      const auto a = hn::LoadU(d, x + i);
      const auto b = hn::LoadU(d, x + i + s);
      const auto c = hn::LoadU(d, x + i + 2 * s);
      const auto e = hn::LoadU(d, x + i + 3 * s);
      const auto ab = hn::Add(a, b);
      const auto a_b = hn::Sub(a, b);
      const auto ce = hn::Add(c, e);
      const auto c_e = hn::Sub(c, e);
      hn::StoreU(hn::Add(ab, ce), d, x + i);
      hn::StoreU(hn::Add(a_b, c_e), d, x + i + s);
      hn::StoreU(hn::Sub(ab, ce), d, x + i + 2 * s);
      hn::StoreU(hn::Sub(a_b, c_e), d, x + i + 3 * s);
    }
  }
}

template <class D>
int64_t strides_from(float* HWY_RESTRICT x, int64_t count, int64_t s, int64_t end) {
  while (4 * s <= end) {
    two_strides<D>(x, count, s);
    s *= 4;
  }
  if (2 * s <= end) {
    one_stride<D>(x, count, s);
    s *= 2;
  }
  return s;
}

// Every aligned run of `length` = 2^power elements of x [count].
void walsh(float* HWY_RESTRICT x, int64_t count, int64_t length) {
  if (length == 1) return;
  // Longer runs are transformed part by part as long as a part stays in the first cache.
  constexpr int64_t kCached = 4096;
  const int64_t part = std::min(length, kCached);
  const DF df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  for (int64_t begin = 0; begin < count; begin += kCached) {
    float* HWY_RESTRICT y = x + begin;
    const int64_t size = std::min(kCached, count - begin);
    if (length == 2) {
      shortest_strides<false>(y, size);
      continue;
    }
    shortest_strides<true>(y, size);
    int64_t s = 4;
    if (s < lanes && 2 * s <= part) {
      one_stride<hn::CappedTag<float, 4>>(y, size, s);
      s *= 2;
    }
    if (s < lanes && 2 * s <= part) {
      one_stride<hn::CappedTag<float, 8>>(y, size, s);
      s *= 2;
    }
    strides_from<DF>(y, size, s, part);
  }
  if (length > part) strides_from<DF>(x, count, part, length);
}

// y = M x for x [order][columns], 4 rows at once. D has at most `columns` lanes.
template <class D, int kVectors>
int64_t dense_columns(const BlockPlan& plan, const float* HWY_RESTRICT x, float* HWY_RESTRICT y,
                      int64_t columns, int64_t col) {
  const D d;
  using V = hn::Vec<D>;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t m = plan.order;
  for (; col + kVectors * lanes <= columns; col += kVectors * lanes) {
    for (int64_t row = 0; row < m; row += 4) {
      const float* HWY_RESTRICT entries = plan.base + row * m;
      V sum[4][kVectors];
      for (int r = 0; r < 4; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
      }
      for (int64_t j = 0; j < m; ++j) {
        V value[kVectors];
        for (int v = 0; v < kVectors; ++v) value[v] = hn::LoadU(d, x + j * columns + col + v * lanes);
        for (int r = 0; r < 4; ++r) {
          const V entry = hn::Set(d, entries[4 * j + r]);
          for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(value[v], entry, sum[r][v]);
        }
      }
      for (int r = 0; r < 4; ++r) {
        for (int v = 0; v < kVectors; ++v)
          hn::StoreU(sum[r][v], d, y + (row + r) * columns + col + v * lanes);
      }
    }
  }
  return col;
}

void dense(const BlockPlan& plan, const float* x, float* y, int64_t columns) {
  int64_t col = dense_columns<DF, 2>(plan, x, y, columns, 0);
  col = dense_columns<DF, 1>(plan, x, y, columns, col);
  col = dense_columns<hn::CappedTag<float, 8>, 1>(plan, x, y, columns, col);
  col = dense_columns<hn::CappedTag<float, 4>, 1>(plan, x, y, columns, col);
  dense_columns<hn::CappedTag<float, 1>, 1>(plan, x, y, columns, col);
}

void transform_span(const RowSpan& span, const BlockPlan& plan, float* buffer, float* second) {
  const bool with_signs = span.signs != nullptr;
  load(span, with_signs && !plan.inverse, buffer);
  const int64_t columns = int64_t{1} << plan.power;
  if (plan.base != nullptr) {
    const int64_t block = plan.order * columns;
    for (int64_t begin = 0; begin < span.count; begin += block) {
      dense(plan, buffer + begin, second + begin, columns);
    }
    std::fill(second + span.count, second + span.count + kBufferPadding, 0.0F);
    std::swap(buffer, second);
  }
  walsh(buffer, span.count, columns);
  store(span, with_signs && plan.inverse, plan.factor, buffer);
}

}  // namespace quantloom::transforms::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::transforms {

HWY_EXPORT(transform_span);

void transform_span(const RowSpan& span, const BlockPlan& plan, float* buffer, float* second) {
  HWY_DYNAMIC_DISPATCH(transform_span)(span, plan, buffer, second);
}

}  // namespace quantloom::transforms
#endif  // HWY_ONCE
