// How the tile loop divides its work among blocks of threads.
//
// A tile is 256 rows x `tokens` tokens over all columns. The tiles, each cut into blocks of 64 columns, are
// one sequence of units; block of threads i takes the i-th of `grid` equal parts of it. A tile that lies in
// one part is finished there. Of the others, each part's sums go to a slot in memory, and are added in
// order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "formats/fragment_order.hpp"

namespace quantloom::fragments {

struct TilePlan {
  static constexpr int kWarps = 4;  // of a tile, 64 rows each

  int row_groups = 0;   // of kWarps blocks of rows
  int token_tiles = 0;  // of `tokens` tokens
  int tokens = 0;       // 32 or 64
  int column_blocks = 0;
  int grid = 0;

  QUANTLOOM_HOST_DEVICE int64_t tiles() const { return static_cast<int64_t>(row_groups) * token_tiles; }
  QUANTLOOM_HOST_DEVICE int64_t units() const { return tiles() * column_blocks; }
  QUANTLOOM_HOST_DEVICE int64_t padded_tokens() const { return int64_t{tokens} * token_tiles; }
  // First unit of part `part`; that of part `grid` is the end.
  QUANTLOOM_HOST_DEVICE int64_t begin(int64_t part) const { return units() * part / grid; }
  // The part that unit `unit` is in.
  QUANTLOOM_HOST_DEVICE int owner(int64_t unit) const {
    return static_cast<int>(((unit + 1) * grid - 1) / units());
  }
  QUANTLOOM_HOST_DEVICE int first_part(int64_t tile) const { return owner(tile * column_blocks); }
  QUANTLOOM_HOST_DEVICE int last_part(int64_t tile) const { return owner((tile + 1) * column_blocks - 1); }
  // True if some tile is in several parts.
  bool has_partials() const { return tiles() % grid != 0; }
  // Where the sums of a tile that is only partly in part `part` go. Walking along the units, either the
  // part or the tile grows, so that part + tile is never taken twice; if there are many tiles, two slots
  // for each part are fewer: a part has at most two such tiles, its first and its last.
  QUANTLOOM_HOST_DEVICE int64_t slot(int64_t part, int64_t tile) const {
    if (tiles() < grid) return part + tile;
    return 2 * part + (tile == begin(part) / column_blocks ? 0 : 1);
  }
  int64_t slots() const {
    if (!has_partials()) return 0;
    return tiles() < grid ? grid + tiles() - 1 : int64_t{2} * grid;
  }
  int64_t slot_bytes() const { return int64_t{4} * kWarps * kBlockRows * tokens; }
  // Bytes of the activations in token order.
  int64_t token_bytes() const { return int64_t{128} * column_blocks * padded_tokens(); }
};

// Parts that fill a device of `processors` multiprocessors, two blocks of threads to each; fewer where the
// parts would be so short that adding their sums costs more than it gains.
inline int64_t balanced_parts(const TilePlan& plan, int processors) {
  constexpr int64_t kLongEnoughForTwo = 8;
  constexpr int64_t kShortest = 4;
  if (plan.units() >= kLongEnoughForTwo * 2 * processors) return int64_t{2} * processors;
  return std::min<int64_t>(processors, std::max(plan.tiles(), plan.units() / kShortest));
}

// `splits`: parts that each tile is cut into, 0 if chosen here.
inline TilePlan tile_plan(int row_blocks, int column_blocks, int m, int processors, int splits) {
  TilePlan plan;
  plan.row_groups = (row_blocks + TilePlan::kWarps - 1) / TilePlan::kWarps;
  plan.tokens = m <= 32 ? 32 : 64;
  plan.token_tiles = m / plan.tokens + (m % plan.tokens == 0 ? 0 : 1);
  plan.column_blocks = column_blocks;
  const int64_t wanted = splits > 0 ? plan.tiles() * splits : balanced_parts(plan, processors);
  plan.grid = static_cast<int>(std::max<int64_t>(std::min({wanted, plan.units(), int64_t{1} << 30}), 1));
  return plan;
}

}  // namespace quantloom::fragments
