// The loops of matmul for int8 activations, and the rounding of activations.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_int8.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include "kernels/decoders-inl.hpp"

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

template <int kBits, int kField, int kTile, int kChains>
HWY_INLINE void add_field(const typename Codes<kBits>::Words& words, const int32_t* HWY_RESTRICT x,
                          VI (&sum)[kTile][kChains]) {
  const VU codes = Codes<kBits>::template bytes<kField>(words);
  HWY_UNROLL(8)
  for (int t = 0; t < kTile; ++t) {
    VI& chain = sum[t][kField % kChains];
    chain = dot_bytes<kBits>(chain, codes, hn::Set(DI(), x[kField * kTile + t]));
  }
}

// Adds the products of the columns of one step. Sums go round kChains chains, so that one token alone does
// not wait for the latency of each dot product.
template <int kBits, int kTile, int kChains, int... kField>
HWY_INLINE void add_step(const uint8_t* HWY_RESTRICT p, const int32_t* HWY_RESTRICT x,
                         VI (&sum)[kTile][kChains], std::integer_sequence<int, kField...> /*fields*/) {
  prefetch_step<kBits>(p);
  const auto words = Codes<kBits>::load(p);
  (add_field<kBits, kField>(words, x, sum), ...);
}

template <int kBits, int kTile>
HWY_INLINE void add_block(const uint8_t* HWY_RESTRICT p, const int32_t* HWY_RESTRICT x, int steps,
                          VI (&total)[kTile]) {
  constexpr int kChains = kTile == 1 ? 4 : 8 / kTile;
  constexpr int kFields = Codes<kBits>::kColumns / 4;
  VI sum[kTile][kChains];
  for (int t = 0; t < kTile; ++t) {
    for (int c = 0; c < kChains; ++c) sum[t][c] = hn::Zero(DI());
  }
  for (int s = 0; s < steps; ++s) {
    add_step<kBits, kTile, kChains>(p, x, sum, std::make_integer_sequence<int, kFields>());
    p += 2 * kBits * Codes<kBits>::kColumns;
    x += kFields * kTile;
  }
  for (int t = 0; t < kTile; ++t) {
    for (int c = 0; c < kChains; ++c) total[t] = hn::Add(total[t], sum[t][c]);
  }
}

template <int kBits, int kTile>
void strips(const StripMatrix& w, const Int8Tile& tile, int64_t first, int64_t last) {
  const DF df;
  constexpr int kColumns = Codes<kBits>::kColumns;
  constexpr int kFullSteps = static_cast<int>(kBlockColumns) / kColumns;
  const int64_t scale_bytes = kStripRows * size_of(w.scale_dtype);
  const int64_t header = scale_bytes + zero_bytes(w.has_zeros, w.real_zeros);
  const int block_steps = w.block_columns / kColumns;
  for (int64_t strip = first; strip < last; ++strip) {
    const uint8_t* HWY_RESTRICT p = w.stream + strip * w.strip_bytes;
    const int32_t* HWY_RESTRICT x = tile.x;
    int64_t block = 0;
    VF y[kTile][kParts];
    for (int t = 0; t < kTile; ++t) {
      for (int part = 0; part < kParts; ++part) y[t][part] = hn::Zero(df);
    }
    for (int64_t g = 0; g < w.group_count; ++g) {
      const GroupPlan plan = w.groups[g];
      const uint8_t* group_header = p;
      p += header;
      VF sum[kTile][kParts];
      for (int t = 0; t < kTile; ++t) {
        for (int part = 0; part < kParts; ++part) sum[t][part] = hn::Zero(df);
      }
      for (int b = 0; b <= plan.full_blocks; ++b) {
        const int steps = b < plan.full_blocks ? block_steps : plan.tail_steps;
        if (steps == 0) break;
        HWY_UNROLL(4)
        for (int part = 0; part < kParts; ++part) {
          VI total[kTile];
          for (int t = 0; t < kTile; ++t) total[t] = hn::Set(DI(), tile.start[block * kTile + t]);
          const uint8_t* HWY_RESTRICT part_words = p + part * kLanes * 4;
          if (steps == kFullSteps) {
            add_block<kBits, kTile>(part_words, x, kFullSteps, total);
          } else {
            add_block<kBits, kTile>(part_words, x, steps, total);
          }
          for (int t = 0; t < kTile; ++t) {
            // Exact in float32: below 2^24.
            VF products = hn::ConvertTo(df, total[t]);
            if (w.has_zeros) {
              const VF zeros = load_zeros(group_header + scale_bytes, w.real_zeros, part);
              products = hn::NegMulAdd(zeros, hn::Set(df, tile.code_sum[block * kTile + t]), products);
            }
            // Not fused, so that each instruction set rounds alike.
            const VF scaled = hn::Mul(products, hn::Set(df, tile.scale[block * kTile + t]));
            sum[t][part] = hn::Add(sum[t][part], scaled);
          }
        }
        p += int64_t{steps} * (2 * kBits * kColumns);
        x += int64_t{steps} * (kColumns / 4 * kTile);
        ++block;
      }
      for (int part = 0; part < kParts; ++part) {
        const VF scales = load_scales(group_header, w.scale_dtype, part);
        for (int t = 0; t < kTile; ++t) y[t][part] = hn::Add(y[t][part], hn::Mul(sum[t][part], scales));
      }
    }
    for (int t = 0; t < kTile; ++t) {
      if (t < tile.tokens) store_rows(y[t], tile.y + t * tile.y_stride, strip * kStripRows, w.rows);
    }
  }
}

template <int kBits>
void strips_of_width(const StripMatrix& w, const Int8Tile& tile, int64_t first, int64_t last) {
  switch (tile.tile) {
    case 1:
      return strips<kBits, 1>(w, tile, first, last);
    case 2:
      return strips<kBits, 2>(w, tile, first, last);
    case 4:
      return strips<kBits, 4>(w, tile, first, last);
    default:
      return strips<kBits, 8>(w, tile, first, last);
  }
}

void multiply_strips_int8(const StripMatrix& w, const Int8Tile& tile, int64_t first, int64_t last) {
  switch (w.container_bits) {
    case 2:
      return strips_of_width<2>(w, tile, first, last);
    case 3:
      return strips_of_width<3>(w, tile, first, last);
    case 4:
      return strips_of_width<4>(w, tile, first, last);
    default:
      return strips_of_width<8>(w, tile, first, last);
  }
}

// The largest |x| of a block, as bits: their order is that of the numbers, with NaN above Inf.
HWY_INLINE uint32_t largest_magnitude_bits(const float* HWY_RESTRICT x, int64_t count) {
  const DU du;
  VU largest = hn::Zero(du);
  for (int64_t i = 0; i < count; i += kLanes) {
    const VU bits =
        hn::And(hn::LoadU(du, reinterpret_cast<const uint32_t*>(x + i)), hn::Set(du, 0x7fffffffU));
    largest = hn::Max(largest, bits);
  }
  return hn::GetLane(hn::MaxOfLanes(du, largest));
}

int64_t quantize_token(const float* x, const GroupPlan* groups, int64_t group_count, int step_columns,
                       int8_t* codes, float* scales, int32_t* sums) {
  const DF df;
  const hn::Rebind<int8_t, DF> d8;
  int64_t at = 0;
  int64_t block = 0;
  for (int64_t g = 0; g < group_count; ++g) {
    for (int b = 0; b <= groups[g].full_blocks; ++b) {
      const int64_t count =
          b < groups[g].full_blocks ? kBlockColumns : int64_t{groups[g].tail_steps} * step_columns;
      if (count == 0) break;
      const uint32_t bits = largest_magnitude_bits(x + at, count);
      if (bits >= 0x7f800000U) {
        for (int64_t i = at;; ++i) {
          if ((std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU) >= 0x7f800000U) return i;
        }
      }
      // Blocks of tiny numbers are lifted by a power of two, so that neither 127 / max overflows nor the
      // codes feel subnormal steps.
      const float lift = bits < 0x10000000U ? 0x1p96F : 1.0F;
      const float largest = std::bit_cast<float>(bits) * lift;
      const float inverse = largest > 0.0F ? 127.0F / largest : 0.0F;
      VI sum = hn::Zero(DI());
      for (int64_t i = at; i < at + count; i += kLanes) {
        const VF lifted = hn::Mul(hn::LoadU(df, x + i), hn::Set(df, lift));
        const VI code = hn::NearestInt(hn::Mul(lifted, hn::Set(df, inverse)));
        sum = hn::Add(sum, code);
        hn::StoreU(hn::DemoteTo(d8, code), d8, codes + i);
      }
      scales[block] = largest / 127.0F / lift;
      sums[block] = hn::GetLane(hn::SumOfLanes(DI(), sum));
      at += count;
      ++block;
    }
  }
  return -1;
}

const char* strip_target() {
  return hwy::TargetName(HWY_TARGET);
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(multiply_strips_int8);
HWY_EXPORT(quantize_token);
HWY_EXPORT(strip_target);

void multiply_strips_int8(const StripMatrix& w, const Int8Tile& tile, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(multiply_strips_int8)(w, tile, first, last);
}

int64_t quantize_token(const float* x, const GroupPlan* groups, int64_t group_count, int step_columns,
                       int8_t* codes, float* scales, int32_t* sums) {
  return HWY_DYNAMIC_DISPATCH(quantize_token)(x, groups, group_count, step_columns, codes, scales, sums);
}

const char* strip_target() {
  return HWY_DYNAMIC_DISPATCH(strip_target)();
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
