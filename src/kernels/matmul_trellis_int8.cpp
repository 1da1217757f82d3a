// The loops of products with trellises of byte sums and int8 activations: the hash of a state is itself the
// operand of a dot product with four copies of a code, so that nothing is decoded.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_trellis_int8.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include <algorithm>

#include "kernels/trellis_decoders-inl.hpp"

#ifndef QUANTLOOM_KERNELS_MATMUL_TRELLIS_INT8
#define QUANTLOOM_KERNELS_MATMUL_TRELLIS_INT8
namespace quantloom::kernels {
namespace {

constexpr int kFewTokens = 6;
constexpr int kCenter = 510;  // of the sum of four bytes

}  // namespace
}  // namespace quantloom::kernels
#endif

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

// What a dot product takes: the bytes of the hash, or their sum where there is no such instruction.
template <bool kAdd>
HWY_INLINE VU operand(VU states, VU multiplier) {
  VU hash = hn::Mul(states, multiplier);
  if constexpr (kAdd) hash = hn::Add(hash, hn::Set(DU(), trellis::kOneMadAddend));
#if QUANTLOOM_VNNI
  return hash;
#else
  return hn::BitCast(DU(), weigh_bytes<1, 1, 1, 1>(hash, 0));
#endif
}

// sum + (sum of the bytes) * code, exactly.
HWY_INLINE VI add_dot(VI sum, VU bytes, int32_t code) {
#if QUANTLOOM_VNNI
  return VI{_mm512_dpbusd_epi32(sum.raw, bytes.raw, _mm512_set1_epi32(code))};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  // The upper halves of the sums are 0.
  const hn::Repartition<int16_t, DU> d16;
  return hn::Add(sum, madd(hn::BitCast(d16, bytes), hn::BitCast(d16, hn::Set(DI(), code >> 24))));
#else
  return hn::Add(sum, hn::Mul(hn::BitCast(DI(), bytes), hn::Set(DI(), code >> 24)));
#endif
}

// sums [kTokens, 16 outputs, kLanes] += the dot products of one tile.
template <bool kAdd, int kTokens, int kPairs>
HWY_NOINLINE void add_dots(const uint32_t* HWY_RESTRICT states, VU multiplier,
                           const int32_t* HWY_RESTRICT codes, int64_t codes_stride,
                           int32_t* HWY_RESTRICT sums) {
  const DI di;
  constexpr int64_t kStride = int64_t{16} * kLanes;
  for (int q = 0; q < 8; q += kPairs) {
    VI sum[kTokens][2 * kPairs];
    for (int t = 0; t < kTokens; ++t) {
      for (int o = 0; o < 2 * kPairs; ++o) {
        sum[t][o] = hn::Load(di, sums + t * kStride + (q + o / 2 + o % 2 * 8) * kLanes);
      }
    }
    for (int run = 0; run < 4; ++run) {
      HWY_UNROLL(4)
      for (int j = 0; j < 4; ++j) {
        const int input = 2 * run + (j & 1) + 8 * (j >> 1);
        HWY_UNROLL(8)
        for (int o = 0; o < 2 * kPairs; ++o) {
          const int position = (q + o / 2) * 32 + run * 8 + o % 2 * 4 + j;
          const VU bytes = operand<kAdd>(hn::Load(DU(), states + position * kLanes), multiplier);
          HWY_UNROLL(8)
          for (int t = 0; t < kTokens; ++t) {
            sum[t][o] = add_dot(sum[t][o], bytes, codes[t * codes_stride + input]);
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int o = 0; o < 2 * kPairs; ++o) {
        hn::Store(sum[t][o], di, sums + t * kStride + (q + o / 2 + o % 2 * 8) * kLanes);
      }
    }
  }
}

template <bool kAdd>
void add_dots_of(int64_t tokens, const uint32_t* states, VU multiplier, const int32_t* codes,
                 int64_t codes_stride, int32_t* sums) {
  switch (tokens) {
    case 1:
      return add_dots<kAdd, 1, 4>(states, multiplier, codes, codes_stride, sums);
    case 2:
      return add_dots<kAdd, 2, 2>(states, multiplier, codes, codes_stride, sums);
    case 3:
      return add_dots<kAdd, 3, 2>(states, multiplier, codes, codes_stride, sums);
    case 4:
      return add_dots<kAdd, 4, 1>(states, multiplier, codes, codes_stride, sums);
    case 5:
      return add_dots<kAdd, 5, 1>(states, multiplier, codes, codes_stride, sums);
    default:
      return add_dots<kAdd, 6, 1>(states, multiplier, codes, codes_stride, sums);
  }
}

template <bool kAdd>
void multiply_tiles_int8(const TrellisMatrix& w, const TrellisJob& job, uint32_t multiplier_bits) {
  const DF df;
  const DI di;
  constexpr int kPieces = trellis::kRingLength / kPieceSteps;
  const VU multiplier = hn::Set(DU(), multiplier_bits);
  const PieceStates states_of = piece_states_of(w.ring.half_bits, w.ring.window);
  const int64_t ring_words = int64_t{w.ring.words()} * kTrellisLanes;
  const int64_t inputs = 16 * w.tile_columns;
  const int64_t blocks = ceil_div(w.tile_columns, kTrellisBlockTiles);
  HWY_ALIGN uint32_t states[trellis::kRingLength * kLanes];
  float* total = job.workspace;
  auto* sums = reinterpret_cast<int32_t*>(job.workspace + job.tokens * kTrellisOutputs);
  std::fill_n(total, job.tokens * kTrellisOutputs, 0.0F);
  const uint32_t* words = w.words + job.strip * w.tile_columns * ring_words;
  const int64_t end = job.first_tile + job.tiles;
  for (int64_t first = job.first_tile; first < end; first += kTrellisBlockTiles) {
    const int64_t block = first / kTrellisBlockTiles;
    for (int part = 0; part < kParts; ++part) {
      for (int64_t token = 0; token < job.tokens; ++token) {
        const VI start = hn::Set(di, -kCenter * job.code_sum[token * blocks + block]);
        for (int i = 0; i < 16; ++i) hn::Store(start, di, sums + (token * 16 + i) * kLanes);
      }
      for (int64_t tile = first; tile < std::min(first + kTrellisBlockTiles, end); ++tile) {
        for_each_piece<kPieces>(w, states_of, words + tile * ring_words + part * kLanes,
                                [&](int piece, const auto& read)
                                    HWY_ATTR { read(states + piece * kPieceSteps * kLanes); });
        for (int64_t token = 0; token < job.tokens; token += kFewTokens) {
          add_dots_of<kAdd>(std::min<int64_t>(kFewTokens, job.tokens - token), states, multiplier,
                            job.codes + token * inputs + tile * 16, inputs, sums + token * 16 * kLanes);
        }
      }
      for (int64_t token = 0; token < job.tokens; ++token) {
        const VF scale = hn::Set(df, job.code_scale[token * blocks + block]);
        for (int i = 0; i < 16; ++i) {
          // Exact: below 2^24. Not fused, so that each instruction set rounds alike.
          const VF products = hn::ConvertTo(df, hn::Load(di, sums + (token * 16 + i) * kLanes));
          float* to = total + token * kTrellisOutputs + i * kTrellisLanes + part * kLanes;
          hn::Store(hn::Add(hn::Load(df, to), hn::Mul(products, scale)), df, to);
        }
      }
    }
  }
  store_outputs(job, total);
}

void multiply_trellis_tiles_int8(const TrellisMatrix& w, const TrellisJob& job) {
  if (w.code == TrellisCode::one_mad) {
    return multiply_tiles_int8<true>(w, job, trellis::kOneMadMultiplier);
  }
  multiply_tiles_int8<false>(w, job, w.multiplier);
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(multiply_trellis_tiles_int8);

void multiply_trellis_tiles_int8(const TrellisMatrix& w, const TrellisJob& job) {
  HWY_DYNAMIC_DISPATCH(multiply_trellis_tiles_int8)(w, job);
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
