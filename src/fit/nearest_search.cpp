// The loops of nearest_neighbour: float32 scores with a bound on their error.
//
// A score is |c|^2 - 2 x.c = D - |x|^2, with D the squared distance. Summed in float32 in d + 1 steps, it is
// off by at most k (|c|^2 + 2 |x||c|) with k = (2 d + 2) 2^-24, which is at most k (5 |x|^2 + 3 D). So a
// centroid whose score exceeds the least one by more than about k (10 |x|^2 + 6 D) is not the nearest:
// `slack` below is somewhat more than that. All others are compared in float64.
#include "fit/nearest_search.hpp"

#include <algorithm>

#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "fit/nearest_search.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::fit::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::VFromD<DF>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kTileVectors = static_cast<int>(kTileRows) / kLanes;

// Vectors of rows whose values, sums and minima fit the registers.
template <int kDims>
constexpr int row_vectors() {
  const int registers = HWY_MAX_BYTES == 64 || HWY_ARCH_ARM_A64 ? 32 : 16;
  for (const int vectors : {4, 2}) {
    if (vectors * (kDims + 2) + 1 <= registers && vectors <= kTileVectors) return vectors;
  }
  return 1;
}

struct Tile {
  HWY_ALIGN float x[kMaxCodebookDims][kTileRows];  // scaled
  HWY_ALIGN float least[kTileRows];                // score of the best block
  HWY_ALIGN float next[kTileRows];                 // of the second best
  HWY_ALIGN float block[kTileRows];                // index of the best block; exact in float32
};

template <int kDims, int kVectors>
void score_rows(const SearchJob& job, int first_vector, Tile& tile) {
  const DF df;
  VF x[kVectors][kDims];
  VF least[kVectors];
  VF next[kVectors];
  VF best[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int j = 0; j < kDims; ++j) x[v][j] = hn::Load(df, tile.x[j] + (first_vector + v) * kLanes);
    least[v] = next[v] = hn::Set(df, 3e38F);
    best[v] = hn::Zero(df);
  }
  const float* HWY_RESTRICT table = job.table;
  for (int64_t b = 0; b < job.blocks; ++b) {
    VF block_least[kVectors];
    for (int v = 0; v < kVectors; ++v) block_least[v] = hn::Set(df, 3e38F);
    for (int64_t c = 0; c < kBlockEntries; ++c) {
      VF score[kVectors];
      const VF norm = hn::Set(df, table[c]);
      for (int v = 0; v < kVectors; ++v) score[v] = norm;
      for (int j = 0; j < kDims; ++j) {
        const VF entry = hn::Set(df, table[(j + 1) * kBlockEntries + c]);
        for (int v = 0; v < kVectors; ++v) score[v] = hn::MulAdd(x[v][j], entry, score[v]);
      }
      for (int v = 0; v < kVectors; ++v) block_least[v] = hn::Min(block_least[v], score[v]);
    }
    const VF index = hn::Set(df, static_cast<float>(b));
    for (int v = 0; v < kVectors; ++v) {
      best[v] = hn::IfThenElse(hn::Lt(block_least[v], least[v]), index, best[v]);
      next[v] = hn::Min(next[v], hn::Max(least[v], block_least[v]));
      least[v] = hn::Min(least[v], block_least[v]);
    }
    table += (kDims + 1) * kBlockEntries;
  }
  for (int v = 0; v < kVectors; ++v) {
    const int at = (first_vector + v) * kLanes;
    hn::Store(least[v], df, tile.least + at);
    hn::Store(next[v], df, tile.next + at);
    hn::Store(best[v], df, tile.block + at);
  }
}

// The bits of the entries of a block whose score for one row is at most `limit`.
template <int kDims>
HWY_INLINE uint32_t entries_within(const SearchJob& job, int64_t block, const Tile& tile, int64_t row,
                                   float limit) {
  const DF df;
  const float* HWY_RESTRICT table = job.table + block * (kDims + 1) * kBlockEntries;
  uint32_t within = 0;
  for (int64_t at = 0; at < kBlockEntries; at += kLanes) {
    VF score = hn::LoadU(df, table + at);
    for (int j = 0; j < kDims; ++j) {
      score =
          hn::MulAdd(hn::Set(df, tile.x[j][row]), hn::LoadU(df, table + (j + 1) * kBlockEntries + at), score);
    }
    uint8_t bits[8] = {};
    hn::StoreMaskBits(df, hn::Le(score, hn::Set(df, limit)), bits);
    within |= (static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 8) << at;
  }
  return within;
}

template <int kDims>
int32_t decide(const SearchJob& job, const Tile& tile, int64_t row, const float* x) {
  constexpr float kRounding = (2 * kDims + 2) * 0x1p-24F;
  float square = 0;
  for (int j = 0; j < kDims; ++j) square += tile.x[j][row] * tile.x[j][row];
  const float distance = std::max(0.0F, tile.least[row] + square);
  // The last term covers products below the normal numbers.
  const float slack = kRounding * (16 * square + 12 * distance) + 1e-35F;
  const float limit = tile.least[row] + slack;
  const auto best_block = static_cast<int64_t>(tile.block[row]);
  int64_t first = best_block;
  int64_t last = best_block + 1;
  if (tile.next[row] <= limit) {
    first = 0;
    last = job.blocks;
  } else {
    const uint32_t within = entries_within<kDims>(job, best_block, tile, row, limit);
    if ((within & (within - 1)) == 0 && within != 0) {
      return static_cast<int32_t>(best_block * kBlockEntries + __builtin_ctz(within));
    }
  }
  int32_t code = 0;
  double least = -1;
  for (int64_t b = first; b < last; ++b) {
    uint32_t within = entries_within<kDims>(job, b, tile, row, limit);
    for (; within != 0; within &= within - 1) {
      const int64_t entry = b * kBlockEntries + __builtin_ctz(within);
      const double exact = squared_distance(x, job.centroids.row(entry), job.x.cols());
      if (least < 0 || exact < least) {
        least = exact;
        code = static_cast<int32_t>(entry);
      }
    }
  }
  return code;
}

template <int kDims>
void search_rows_of(const SearchJob& job, int64_t first, int64_t last) {
  constexpr int kVectors = row_vectors<kDims>();
  const int64_t d = job.x.cols();
  Tile tile;
  for (int64_t begin = first; begin < last; begin += kTileRows) {
    const int64_t rows = std::min(kTileRows, last - begin);
    for (int64_t j = 0; j < kDims; ++j) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        tile.x[j][r] = r < rows && j < d ? job.x(begin + r, j) * job.factor : 0;
      }
    }
    for (int v = 0; v < kTileVectors && v * kLanes < rows; v += kVectors) {
      score_rows<kDims, kVectors>(job, v, tile);
    }
    for (int64_t r = 0; r < rows; ++r) {
      job.codes[begin + r] = decide<kDims>(job, tile, r, job.x.row(begin + r));
    }
  }
}

void search_rows(const SearchJob& job, int64_t first, int64_t last) {
  switch (job.dims) {
    case 1:
      return search_rows_of<1>(job, first, last);
    case 2:
      return search_rows_of<2>(job, first, last);
    case 4:
      return search_rows_of<4>(job, first, last);
    case 8:
      return search_rows_of<8>(job, first, last);
    default:
      return search_rows_of<16>(job, first, last);
  }
}

}  // namespace quantloom::fit::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::fit {

HWY_EXPORT(search_rows);

void search_rows(const SearchJob& job, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(search_rows)(job, first, last);
}

}  // namespace quantloom::fit
#endif  // HWY_ONCE
