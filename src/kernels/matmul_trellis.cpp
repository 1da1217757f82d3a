// The loops of products with trellises: tiles are decoded into the nearest caches, 16 inputs at a time for a
// few tokens, more for many, and multiplied from there.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_trellis.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include <algorithm>

#include "kernels/trellis_decoders-inl.hpp"

#ifndef QUANTLOOM_KERNELS_MATMUL_TRELLIS
#define QUANTLOOM_KERNELS_MATMUL_TRELLIS
namespace quantloom::kernels {
namespace {

constexpr int kTile = 256;  // weights
constexpr int kFewTokens = 6;
// Tiles that are decoded before tokens pass over them, so that their sums are not fetched for each tile.
constexpr int64_t kTilesAtOnce = 4;

constexpr int64_t tiles_at_once(int64_t tokens) {
  return tokens > kFewTokens ? kTilesAtOnce : 1;
}

}  // namespace
}  // namespace quantloom::kernels
#endif

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

// Vectors of sums that registers hold at once.
constexpr int kSums = HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3 ? 12 : 24;

// sums [kTokens, 16 outputs, lanes] += the products of `tiles` decoded tiles, whose inputs are x. The sum of
// an output goes over its 16 inputs in the order of the ring, whatever kTokens and kOutputs are.
template <int kTokens, int kPairs>
HWY_NOINLINE void add_products(const float* HWY_RESTRICT weights, int64_t tiles, const float* HWY_RESTRICT x,
                               int64_t x_stride, float* HWY_RESTRICT sums, int64_t sums_stride) {
  const DF df;
  // A pair of outputs q and q + 8 takes 32 positions of the ring: 4 runs of 4 inputs for either output.
  for (int q = 0; q < 8; q += kPairs) {
    VF sum[kTokens][2 * kPairs];
    for (int t = 0; t < kTokens; ++t) {
      for (int o = 0; o < 2 * kPairs; ++o) {
        sum[t][o] = hn::Load(df, sums + t * sums_stride + (q + o / 2 + o % 2 * 8) * kTrellisLanes);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* HWY_RESTRICT w = weights + (tile * kTile + q * 32) * kLanes;
      const float* HWY_RESTRICT inputs = x + tile * 16;
      for (int run = 0; run < 4; ++run) {
        HWY_UNROLL(4)
        for (int j = 0; j < 4; ++j) {
          const int input = 2 * run + (j & 1) + 8 * (j >> 1);
          VF value[2 * kPairs];
          HWY_UNROLL(8)
          for (int o = 0; o < 2 * kPairs; ++o) {
            value[o] = hn::Load(df, w + (o / 2 * 32 + run * 8 + o % 2 * 4 + j) * kLanes);
          }
          HWY_UNROLL(8)
          for (int t = 0; t < kTokens; ++t) {
            const VF number = hn::Set(df, inputs[t * x_stride + input]);
            HWY_UNROLL(8)
            for (int o = 0; o < 2 * kPairs; ++o) sum[t][o] = hn::MulAdd(value[o], number, sum[t][o]);
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int o = 0; o < 2 * kPairs; ++o) {
        hn::Store(sum[t][o], df, sums + t * sums_stride + (q + o / 2 + o % 2 * 8) * kTrellisLanes);
      }
    }
  }
}

template <int kTokens>
constexpr int pairs_for() {
  // At most 4: one token alone has sums enough then to hide the latency of each addition.
  return 8 * (kTokens + 1) <= kSums + 4 ? 4 : 4 * kTokens <= kSums ? 2 : 1;
}

void add_products_of(int64_t tokens, const float* weights, int64_t tiles, const float* x, int64_t x_stride,
                     float* sums, int64_t sums_stride) {
  switch (tokens) {
    case 1:
      return add_products<1, pairs_for<1>()>(weights, tiles, x, x_stride, sums, sums_stride);
    case 2:
      return add_products<2, pairs_for<2>()>(weights, tiles, x, x_stride, sums, sums_stride);
    case 3:
      return add_products<3, pairs_for<3>()>(weights, tiles, x, x_stride, sums, sums_stride);
    case 4:
      return add_products<4, pairs_for<4>()>(weights, tiles, x, x_stride, sums, sums_stride);
    case 5:
      return add_products<5, pairs_for<5>()>(weights, tiles, x, x_stride, sums, sums_stride);
    default:
      return add_products<6, pairs_for<6>()>(weights, tiles, x, x_stride, sums, sums_stride);
  }
}

template <class Code>
void multiply_tiles_of(const TrellisMatrix& w, const TrellisJob& job) {
  const Code code(w);
  const PieceStates states_of = piece_states_of(w.ring.half_bits * Code::kWeights, w.ring.window);
  const int64_t ring_words = int64_t{w.ring.words()} * kTrellisLanes;
  const int64_t inputs = 16 * w.tile_columns;
  const int64_t at_once = tiles_at_once(job.tokens);
  float* weights = job.workspace;
  float* sums = job.workspace + at_once * kTile * kTrellisLanes;
  std::fill_n(sums, job.tokens * kTrellisOutputs, 0.0F);
  const uint32_t* words = w.words + (job.strip * w.tile_columns + job.first_tile) * ring_words;
  for (int64_t first = 0; first < job.tiles; first += at_once) {
    const int64_t tiles = std::min(at_once, job.tiles - first);
    for (int part = 0; part < kParts; ++part) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        decode_rings(w, code, states_of, words + (first + tile) * ring_words + part * kLanes,
                     weights + tile * kTile * kLanes);
      }
      for (int64_t token = 0; token < job.tokens; token += kFewTokens) {
        add_products_of(std::min<int64_t>(kFewTokens, job.tokens - token), weights, tiles,
                        job.x + token * inputs + (job.first_tile + first) * 16, inputs,
                        sums + token * kTrellisOutputs + part * kLanes, kTrellisOutputs);
      }
    }
  }
  store_outputs(job, sums);
}

void multiply_trellis_tiles(const TrellisMatrix& w, const TrellisJob& job) {
  switch (w.code) {
    case TrellisCode::lcg:
      return multiply_tiles_of<Halves<true>>(w, job);
    case TrellisCode::mcg:
      return multiply_tiles_of<Halves<false>>(w, job);
    case TrellisCode::mul1:
      return multiply_tiles_of<Mul1>(w, job);
    case TrellisCode::one_mad:
      return multiply_tiles_of<OneMad>(w, job);
    case TrellisCode::octagon:
      return multiply_tiles_of<Octagon>(w, job);
    case TrellisCode::hyb:
      return multiply_tiles_of<Hyb>(w, job);
    case TrellisCode::table:
      return w.ring.weights_per_step == 2 ? multiply_tiles_of<Pairs>(w, job)
                                          : multiply_tiles_of<Table>(w, job);
  }
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(multiply_trellis_tiles);

int64_t trellis_workspace(int64_t tokens) {
  const int64_t weights = tiles_at_once(tokens) * kTile * kTrellisLanes;
  return std::max(weights, tokens * kTrellisOutputs) + tokens * kTrellisOutputs;
}

void multiply_trellis_tiles(const TrellisMatrix& w, const TrellisJob& job) {
  HWY_DYNAMIC_DISPATCH(multiply_trellis_tiles)(w, job);
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
