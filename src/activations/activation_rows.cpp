#include "activations/activation_rows.hpp"

#include <bit>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "activations/activation_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::activations::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most the lanes that inputs are padded to.
using DF = hn::CappedTag<float, kActivationPadding>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;

bool range_of_row(const float* HWY_RESTRICT x, int64_t count, ActivationRange& range) {
  const DF df;
  const DU du;
  auto largest = hn::Zero(du);
  auto low = hn::Zero(df);
  auto high = hn::Zero(df);
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(df))) {
    const auto v = hn::LoadU(df, x + i);
    // As integers, Inf and NaN are above all other magnitudes.
    largest = hn::Max(largest, hn::And(hn::BitCast(du, v), hn::Set(du, 0x7fffffffU)));
    low = hn::Min(low, v);
    high = hn::Max(high, v);
  }
  if (hn::GetLane(hn::MaxOfLanes(du, largest)) >= std::bit_cast<uint32_t>(kLargestActivation)) return false;
  range.low = hn::GetLane(hn::MinOfLanes(df, low));
  range.high = hn::GetLane(hn::MaxOfLanes(df, high));
  return true;
}

void encode_row(const float* HWY_RESTRICT x, int64_t count, const RowGrid& grid, int8_t* HWY_RESTRICT codes) {
  const DF df;
  const hn::Rebind<int8_t, DF> d8;
  const auto scale = hn::Set(df, grid.scale);
  const auto low = hn::Set(df, grid.low);
  const auto high = hn::Set(df, grid.high);
  const auto zero = hn::Set(DI(), grid.zero);
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(df))) {
    const auto steps = hn::Min(hn::Max(hn::Div(hn::LoadU(df, x + i), scale), low), high);
    hn::StoreU(hn::DemoteTo(d8, hn::Add(hn::NearestInt(steps), zero)), d8, codes + i);
  }
}

void round_row(const float* HWY_RESTRICT x, int64_t count, float scale_value, int levels,
               int32_t* HWY_RESTRICT integers) {
  const DF df;
  const auto scale = hn::Set(df, scale_value);
  const auto low = hn::Set(df, static_cast<float>(-levels));
  const auto high = hn::Set(df, static_cast<float>(levels));
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(df))) {
    const auto steps = hn::Min(hn::Max(hn::Div(hn::LoadU(df, x + i), scale), low), high);
    hn::StoreU(hn::NearestInt(steps), DI(), integers + i);
  }
}

}  // namespace quantloom::activations::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>

namespace quantloom::activations {

HWY_EXPORT(range_of_row);
HWY_EXPORT(encode_row);
HWY_EXPORT(round_row);

bool range_of_row(const float* x, int64_t count, ActivationRange& range) {
  return HWY_DYNAMIC_DISPATCH(range_of_row)(x, count, range);
}

void encode_row(const float* x, int64_t count, const RowGrid& grid, int8_t* codes) {
  HWY_DYNAMIC_DISPATCH(encode_row)(x, count, grid, codes);
}

void round_row(const float* x, int64_t count, float scale, int levels, int32_t* integers) {
  HWY_DYNAMIC_DISPATCH(round_row)(x, count, scale, levels, integers);
}

void cut_row(const int32_t* integers, int64_t count, int bits, int64_t group_size, int8_t* codes,
             uint8_t* shifts) {
  const int32_t high = (1 << (bits - 1)) - 1;
  for (int64_t begin = 0, g = 0; begin < count; ++g) {
    const int64_t end = count - begin > group_size ? begin + group_size : count;
    uint32_t any = 0;  // has the bit length of the largest
    for (int64_t i = begin; i < end; ++i) any |= static_cast<uint32_t>(std::abs(integers[i]));
    const int shift = std::max(0, static_cast<int>(std::bit_width(any)) - (bits - 1));
    shifts[g] = static_cast<uint8_t>(shift);
    const int32_t half = shift > 0 ? (1 << (shift - 1)) - 1 : 0;
    const int32_t odd = shift > 0 ? 1 : 0;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t q = integers[i];
      const int32_t nearest = (q + half + ((q >> shift) & odd)) >> shift;
      codes[i] = static_cast<int8_t>(std::min(nearest, high));  // never below -2^(bits-1)
    }
    begin = end;
  }
}

}  // namespace quantloom::activations
#endif  // HWY_ONCE
