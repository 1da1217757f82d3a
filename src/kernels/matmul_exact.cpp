// The loops of matmul for float32 activations.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_exact.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include "kernels/decoders-inl.hpp"

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

template <int kBits, int kColumn, class Decode, int kTile, int kChains>
HWY_INLINE void add_column(const typename Codes<kBits>::Words& words, const float* HWY_RESTRICT x,
                           const Decode& decode, VF (&sum)[kTile][kChains]) {
  const VF value = decode(Codes<kBits>::template index<kColumn>(words));
  HWY_UNROLL(8)
  for (int t = 0; t < kTile; ++t) {
    VF& chain = sum[t][kColumn % kChains];
    chain = hn::MulAdd(value, hn::Set(DF(), x[kColumn * kTile + t]), chain);
  }
}

// Adds the products of the columns of one step. Sums go round kChains chains, so that one token alone does
// not wait for the latency of each addition.
template <int kBits, class Decode, int kTile, int kChains, int... kColumn>
HWY_INLINE void add_step(const uint8_t* HWY_RESTRICT p, const float* HWY_RESTRICT x, const Decode& decode,
                         VF (&sum)[kTile][kChains], std::integer_sequence<int, kColumn...> /*columns*/) {
  prefetch_step<kBits>(p);
  const auto words = Codes<kBits>::load(p);
  (add_column<kBits, kColumn>(words, x, decode, sum), ...);
}

template <int kBits, class Decode, int kTile>
HWY_INLINE void add_block(const uint8_t* HWY_RESTRICT p, const float* HWY_RESTRICT x, int steps,
                          const Decode& decode, VF (&total)[kTile]) {
  constexpr int kChains = kTile == 1 ? 4 : 8 / kTile;
  constexpr int kColumns = Codes<kBits>::kColumns;
  VF sum[kTile][kChains];
  for (int t = 0; t < kTile; ++t) {
    for (int c = 0; c < kChains; ++c) sum[t][c] = hn::Zero(DF());
  }
  for (int s = 0; s < steps; ++s) {
    add_step<kBits>(p, x, decode, sum, std::make_integer_sequence<int, kColumns>());
    p += 2 * kBits * kColumns;
    x += kColumns * kTile;
  }
  for (int t = 0; t < kTile; ++t) {
    VF block_sum = sum[t][0];
    for (int c = 1; c < kChains; ++c) block_sum = hn::Add(block_sum, sum[t][c]);
    total[t] = block_sum;
  }
}

template <int kBits, class Decode, int kTile>
void strips(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last) {
  const DF df;
  constexpr int kColumns = Codes<kBits>::kColumns;
  constexpr int kFullSteps = static_cast<int>(kBlockColumns) / kColumns;
  const int64_t scale_bytes = kStripRows * size_of(w.scale_dtype);
  const int64_t header = scale_bytes + zero_bytes(w.has_zeros, w.real_zeros);
  const Decode decode(w);
  for (int64_t strip = first; strip < last; ++strip) {
    const uint8_t* HWY_RESTRICT p = w.stream + strip * w.strip_bytes;
    const float* HWY_RESTRICT x = tile.x;
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
        const int steps = b < plan.full_blocks ? kFullSteps : plan.tail_steps;
        if (steps == 0) break;
        HWY_UNROLL(4)
        for (int part = 0; part < kParts; ++part) {
          VF total[kTile];
          const uint8_t* HWY_RESTRICT part_words = p + part * kLanes * 4;
          add_block<kBits>(part_words, x, steps, decode, total);
          for (int t = 0; t < kTile; ++t) sum[t][part] = hn::Add(sum[t][part], total[t]);
        }
        p += int64_t{steps} * (2 * kBits * kColumns);
        x += int64_t{steps} * (kColumns * kTile);
      }
      for (int part = 0; part < kParts; ++part) {
        if (w.has_zeros) {
          // The codes were centred: what is left of the zero point.
          const VF zeros =
              hn::Sub(load_zeros(group_header + scale_bytes, w.real_zeros, part), hn::Set(df, w.center));
          for (int t = 0; t < kTile; ++t) {
            const VF group_sum = hn::Set(df, tile.group_sum[g * kTile + t]);
            sum[t][part] = hn::NegMulAdd(zeros, group_sum, sum[t][part]);
          }
        }
        const VF scales = load_scales(group_header, w.scale_dtype, part);
        for (int t = 0; t < kTile; ++t) y[t][part] = hn::MulAdd(sum[t][part], scales, y[t][part]);
      }
    }
    for (int t = 0; t < kTile; ++t) {
      if (t < tile.tokens) store_rows(y[t], tile.y + t * tile.y_stride, strip * kStripRows, w.rows);
    }
  }
}

template <int kBits, class Decode>
void strips_of_tile(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last) {
  switch (tile.tile) {
    case 1:
      return strips<kBits, Decode, 1>(w, tile, first, last);
    case 2:
      return strips<kBits, Decode, 2>(w, tile, first, last);
    case 4:
      return strips<kBits, Decode, 4>(w, tile, first, last);
    default:
      return strips<kBits, Decode, 8>(w, tile, first, last);
  }
}

template <int kBits>
void strips_of_width(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last) {
  if (w.table != nullptr) return strips_of_tile<kBits, FromTable<kBits>>(w, tile, first, last);
  return strips_of_tile<kBits, ToFloat<kBits>>(w, tile, first, last);
}

void multiply_strips_exact(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last) {
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

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(multiply_strips_exact);

void multiply_strips_exact(const StripMatrix& w, const ExactTile& tile, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(multiply_strips_exact)(w, tile, first, last);
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
