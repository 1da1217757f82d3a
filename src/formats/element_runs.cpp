#include "formats/element_runs.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/element_runs.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::element_runs::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::CappedTag<float, kRunVector>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
// Half as many lanes, of float64.
using DD = hn::CappedTag<double, kRunVector / 2>;
using DF2 = hn::Rebind<float, DD>;
using DI2 = hn::Rebind<int32_t, DD>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kHalfLanes = static_cast<int>(hn::MaxLanes(DD()));

void divide_run(float* x, const float* scales, float factor, int count) {
  const DF d;
  const VF zero = hn::Zero(d);
  if (scales != nullptr) {
    for (int i = 0; i < count; i += kLanes) {
      const VF value = hn::LoadU(d, x + i);
      const VF scale = hn::LoadU(d, scales + i);
      hn::StoreU(hn::IfThenElse(hn::Eq(scale, zero), value, hn::Div(value, scale)), d, x + i);
    }
  }
  if (factor == 1) return;
  const VF divisor = hn::Set(d, factor);
  for (int i = 0; i < count; i += kLanes) hn::StoreU(hn::Div(hn::LoadU(d, x + i), divisor), d, x + i);
}

void multiply_run(float* values, const float* x, const float* scales, float factor, int count) {
  const DF d;
  const VF multiplier = hn::Set(d, factor);
  for (int i = 0; i < count; i += kLanes) {
    const VF input = hn::LoadU(d, x + i);
    VF value = hn::Mul(hn::LoadU(d, values + i), multiplier);
    value = hn::IfThenElse(hn::IsNaN(input), input, value);
    if (scales != nullptr) value = hn::Mul(value, hn::LoadU(d, scales + i));
    hn::StoreU(value, d, values + i);
  }
}

Extremes extremes(const float* x, int64_t count) {
  const DI d;
  const auto all = hn::Set(d, 0x7fffffff);
  auto positive = hn::Zero(d);
  auto negative = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto bits = hn::BitCast(d, hn::LoadU(DF(), x + i));
    const auto size = hn::And(bits, all);
    const auto below = hn::BroadcastSignBit(bits);
    positive = hn::Max(positive, hn::AndNot(below, size));
    negative = hn::Max(negative, hn::And(below, size));
  }
  Extremes result{hn::GetLane(hn::MaxOfLanes(d, positive)), hn::GetLane(hn::MaxOfLanes(d, negative))};
  for (; i < count; ++i) {
    const auto bits = std::bit_cast<int32_t>(x[i]);
    int32_t& side = bits < 0 ? result.negative : result.positive;
    side = std::max(side, bits & 0x7fffffff);
  }
  return result;
}

// Entries of a table by their places; `first` holds the first kLanes, `second` those after.
HWY_INLINE VF pick(VU places, VF first) {
  return hn::TableLookupLanes(first, hn::IndicesFromVec(DF(), places));
}
HWY_INLINE VF pick(VU places, VF first, VF second) {
  const DU du;
  const VU low = hn::And(places, hn::Set(du, kLanes - 1));
  const auto upper = hn::RebindMask(DF(), hn::Gt(places, hn::Set(du, kLanes - 1)));
  return hn::IfThenElse(upper, pick(low, second), pick(low, first));
}

// kLevels levels that fit registers, then others from memory.
template <int kLevels>
void boundary_levels(const BoundaryTable& table, const float* x, int count, uint32_t* out) {
  const DF d;
  const DU du;
  VF levels[kLevels > 0 ? kLevels : 1];
  for (int level = 0; level < kLevels; ++level) levels[level] = hn::LoadU(d, table.level(level));
  const int level_count = table.level_count();
  for (int i = 0; i < count; i += kLanes) {
    const VF value = hn::LoadU(d, x + i);
    VU place = hn::Zero(du);
    for (int level = 0; level < kLevels; ++level) {
      const VU above = hn::VecFromMask(du, hn::RebindMask(du, hn::Gt(value, pick(place, levels[level]))));
      place = hn::Sub(hn::Add(place, place), above);  // a mask of ones is -1
    }
    for (int level = kLevels; level < level_count; ++level) {
      const VF boundary = hn::GatherIndex(d, table.level(level), hn::BitCast(DI(), place));
      const VU above = hn::VecFromMask(du, hn::RebindMask(du, hn::Gt(value, boundary)));
      place = hn::Sub(hn::Add(place, place), above);
    }
    hn::StoreU(place, du, out + i);
  }
}

void boundary_codes(const BoundaryTable& table, const float* x, int count, uint32_t* out) {
  // Level l has 2^l entries.
  constexpr int kInRegister = kLanes >= 16 ? 5 : kLanes == 8 ? 4 : kLanes == 4 ? 3 : 1;
  switch (std::min(table.level_count(), kInRegister)) {
    case 0:
      return boundary_levels<0>(table, x, count, out);
    case 1:
      return boundary_levels<1>(table, x, count, out);
    case 2:
      return boundary_levels<2>(table, x, count, out);
    case 3:
      return boundary_levels<3>(table, x, count, out);
    case 4:
      return boundary_levels<std::min(4, kInRegister)>(table, x, count, out);
    default:
      return boundary_levels<std::min(5, kInRegister)>(table, x, count, out);
  }
}

void boundary_values(const BoundaryTable& table, const uint32_t* codes, int count, float* out) {
  const DF d;
  const DU du;
  const float* values = table.table();
  const int64_t size = table.value_count();
  const VF first = hn::LoadU(d, values);
  if (size <= kLanes) {
    for (int i = 0; i < count; i += kLanes) hn::StoreU(pick(hn::LoadU(du, codes + i), first), d, out + i);
  } else if (size <= 2 * kLanes) {
    const VF second = hn::LoadU(d, values + kLanes);
    for (int i = 0; i < count; i += kLanes) {
      hn::StoreU(pick(hn::LoadU(du, codes + i), first, second), d, out + i);
    }
  } else {
    for (int i = 0; i < count; i += kLanes) {
      hn::StoreU(hn::GatherIndex(d, values, hn::BitCast(DI(), hn::LoadU(du, codes + i))), d, out + i);
    }
  }
}

void float_codes(const FloatRuns& format, const float* x, int count, uint32_t* out) {
  const DF d;
  const DU du;
  const DI di;
  const int shift = 23 - format.mantissa_bits;
  const uint32_t smallest_normal = static_cast<uint32_t>(128 - format.bias) << 23;
  const uint32_t below = (uint32_t{1} << shift) - 1;  // what rounding up adds to the bits
  const VU added = hn::Set(du, format.rounding == FloatRounding::to_zero  ? 0
                               : format.rounding == FloatRounding::to_inf ? below
                                                                          : below / 2);
  const VU origin = hn::Set(du, (smallest_normal >> shift) - (uint32_t{1} << format.mantissa_bits));
  const VU normal = hn::Set(du, smallest_normal);
  const VF step = hn::Set(d, std::ldexp(1.0F, format.mantissa_bits + format.bias - 1));
  const VF half = hn::Set(d, format.rounding == FloatRounding::nearest ? 0.5F : 0.0F);
  const VF largest = hn::Set(d, format.largest);
  const VU largest_code = hn::Set(du, format.largest_code);
  const VU zero_code = hn::Set(du, format.zero_code);
  for (int i = 0; i < count; i += kLanes) {
    const VF value = hn::LoadU(d, x + i);
    const VF size = hn::Abs(value);
    const VU bits = hn::BitCast(du, size);
    // Binades follow each other without gaps, as the bits of float32 do.
    VU place = hn::Sub(hn::ShiftRightSame(hn::Add(bits, added), shift), origin);
    const VF steps = hn::Sub(hn::Mul(size, step), half);
    const VF whole = format.rounding == FloatRounding::to_zero ? hn::Floor(steps) : hn::Ceil(steps);
    const auto subnormal = hn::Lt(bits, normal);
    place = hn::IfThenElse(subnormal, hn::BitCast(du, hn::ConvertTo(di, whole)), place);
    place = hn::IfThenElse(hn::RebindMask(du, hn::Ge(size, largest)), largest_code, place);
    const auto negative = hn::RebindMask(du, hn::Lt(value, hn::Zero(d)));
    VU code;
    if (format.has_sign) {
      code = hn::IfThenElse(negative, hn::Sub(zero_code, place), hn::Add(zero_code, place));
    } else {
      code = hn::IfThenZeroElse(negative, place);
    }
    code = hn::IfThenZeroElse(hn::RebindMask(du, hn::IsNaN(value)), code);
    hn::StoreU(code, du, out + i);
  }
}

void float_values(const FloatRuns& format, const uint32_t* codes, int count, float* out) {
  const DF d;
  const DU du;
  const DI di;
  const int shift = 23 - format.mantissa_bits;
  const VU first_normal = hn::Set(du, uint32_t{1} << format.mantissa_bits);
  const VU origin = hn::Set(du, static_cast<uint32_t>(127 - format.bias) << 23);
  const VF step = hn::Set(d, std::ldexp(1.0F, 1 - format.bias - format.mantissa_bits));
  const VU zero_code = hn::Set(du, format.zero_code);
  for (int i = 0; i < count; i += kLanes) {
    const VU code = hn::LoadU(du, codes + i);
    const auto negative = hn::Lt(code, zero_code);
    const VU place = hn::IfThenElse(negative, hn::Sub(zero_code, code), hn::Sub(code, zero_code));
    const VF normal = hn::BitCast(d, hn::Add(hn::ShiftLeftSame(place, shift), origin));
    const VF subnormal = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, place)), step);
    const VF size = hn::IfThenElse(hn::RebindMask(d, hn::Lt(place, first_normal)), subnormal, normal);
    hn::StoreU(hn::IfThenElse(hn::RebindMask(d, negative), hn::Neg(size), size), d, out + i);
  }
}

void int_codes(const IntRuns& format, const float* x, int count, uint32_t* out) {
  const DD d;
  const auto offset = hn::Set(d, format.offset);
  const auto lowest = hn::Set(d, format.lowest);
  const auto top = hn::Set(d, format.top);
  for (int i = 0; i < count; i += kHalfLanes) {
    const auto value = hn::PromoteTo(d, hn::LoadU(DF2(), x + i));
    const auto place = hn::Sub(hn::Sub(hn::Round(hn::Add(value, offset)), offset), lowest);
    const auto clipped = hn::IfThenElseZero(hn::Gt(place, hn::Zero(d)), hn::Min(place, top));  // NaN: 0
    hn::StoreU(hn::DemoteTo(DI2(), clipped), DI2(), reinterpret_cast<int32_t*>(out) + i);
  }
}

void int_values(const IntRuns& format, const uint32_t* codes, int count, float* out) {
  const DD d;
  const auto lowest = hn::Set(d, format.lowest);
  for (int i = 0; i < count; i += kHalfLanes) {
    const auto code = hn::LoadU(DI2(), reinterpret_cast<const int32_t*>(codes) + i);
    hn::StoreU(hn::DemoteTo(DF2(), hn::Add(hn::PromoteTo(d, code), lowest)), DF2(), out + i);
  }
}

}  // namespace quantloom::element_runs::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::element_runs {

HWY_EXPORT(divide_run);
HWY_EXPORT(multiply_run);
HWY_EXPORT(extremes);
HWY_EXPORT(boundary_codes);
HWY_EXPORT(boundary_values);
HWY_EXPORT(float_codes);
HWY_EXPORT(float_values);
HWY_EXPORT(int_codes);
HWY_EXPORT(int_values);

void divide_run(float* x, const float* scales, float factor, int count) {
  HWY_DYNAMIC_DISPATCH(divide_run)(x, scales, factor, count);
}

void multiply_run(float* values, const float* x, const float* scales, float factor, int count) {
  HWY_DYNAMIC_DISPATCH(multiply_run)(values, x, scales, factor, count);
}

Extremes extremes(const float* x, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(extremes)(x, count);
}

BoundaryTable::BoundaryTable(const TableElements& table)
    : values_(table.values), value_count_(static_cast<int64_t>(table.values.size())) {
  values_.resize(std::max<size_t>(values_.size(), 2 * kRunVector), 0.0F);
  const size_t count = table.boundaries.size();
  const auto level_count = static_cast<int>(std::bit_width(count));
  for (int level = 0; level < level_count; ++level) {
    offsets_.push_back(levels_.size());
    const size_t entries = size_t{1} << level;
    const size_t apart = size_t{1} << (level_count - level);
    levels_.resize(levels_.size() + std::max<size_t>(entries, kRunVector),
                   std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < entries; ++i) {
      const size_t place = i * apart + apart / 2 - 1;
      if (place < count) levels_[offsets_.back() + i] = table.boundaries[place];
    }
  }
}

void BoundaryTable::codes(const float* x, int count, uint32_t* out) const {
  HWY_DYNAMIC_DISPATCH(boundary_codes)(*this, x, count, out);
}

void BoundaryTable::values(const uint32_t* codes, int count, float* out) const {
  HWY_DYNAMIC_DISPATCH(boundary_values)(*this, codes, count, out);
}

void FloatRuns::codes(const float* x, int count, uint32_t* out) const {
  HWY_DYNAMIC_DISPATCH(float_codes)(*this, x, count, out);
}

void FloatRuns::values(const uint32_t* codes, int count, float* out) const {
  HWY_DYNAMIC_DISPATCH(float_values)(*this, codes, count, out);
}

void IntRuns::codes(const float* x, int count, uint32_t* out) const {
  HWY_DYNAMIC_DISPATCH(int_codes)(*this, x, count, out);
}

void IntRuns::values(const uint32_t* codes, int count, float* out) const {
  HWY_DYNAMIC_DISPATCH(int_values)(*this, codes, count, out);
}

}  // namespace quantloom::element_runs
#endif  // HWY_ONCE
