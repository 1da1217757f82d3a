// How the streaming loop's work is dealt: row blocks to teams of thread blocks, and the blocks of 64 x 64
// codes of a team's row blocks to its warps, each a run of equal length.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "formats/fragment_order.hpp"

namespace quantloom::cuda {

// Divides by a number that the host knows, with a multiplication.
struct Divider {
  uint64_t magic = 0;  // ceil(2^64 / divisor); 0 if that is 2^64

  Divider() = default;
  // `divisor`: at least 1.
  explicit constexpr Divider(uint32_t divisor) : magic(divisor == 1 ? 0 : ~uint64_t{0} / divisor + 1) {}

  QUANTLOOM_HOST_DEVICE uint32_t divide(uint32_t value) const {
    if (magic == 0) return value;
#ifdef __CUDA_ARCH__
    return static_cast<uint32_t>(__umul64hi(value, magic));
#else
    const uint64_t low = (magic & 0xFFFFFFFFU) * value;
    return static_cast<uint32_t>(((magic >> 32) * value + (low >> 32)) >> 32);
#endif
  }
};

// Most warps of a block of threads: fewer where each needs more registers. fine: groups are no multiples of
// 64 columns.
QUANTLOOM_HOST_DEVICE constexpr int stream_warps(int tokens, bool fine) {
  if (fine) return 8;
  return tokens > 8 ? 12 : 16;
}

// Bytes of shared memory for activations that the warps gather.
constexpr int64_t stream_gathered_bytes(int tokens, bool fine) {
  const int most = tokens == 1 && !fine ? 1 : tokens <= 8 ? 8 : 16;
  return int64_t{stream_warps(tokens, fine)} * most * fragments::kBlockColumns * 2;
}

// Blocks of codes to the warps of a team: `share` to each, and one more to the first `extra`.
struct StreamRuns {
  int share = 0;
  int extra = 0;

  QUANTLOOM_HOST_DEVICE int begin(int warp) const { return warp * share + (warp < extra ? warp : extra); }
  // The warp that has block `at`.
  QUANTLOOM_HOST_DEVICE int warp_of(int at) const {
    const int longer = extra * (share + 1);
    return at < longer ? at / (share + 1) : extra + (at - longer) / share;
  }
};

struct StreamDeal {
  int teams = 1;
  int blocks = 1;      // of threads, in a team
  int warps = 1;       // of a team, that take part
  int rows = 0;        // row blocks of a team
  int extra = 0;       // teams, the first, that have one more
  int parts = 1;       // places for the parts of a row block's sum: warp w leaves its in w % parts; 2^i
  int stretches = 0;   // of activations, as digits, in the shared memory of a block; 0: no digits are made
  int spare = 0;       // bytes of shared memory that a block has left
  int staged_at = 0;   // where in it activations lie that outliers are multiplied with; 0: in none
  int staged = 0;      // tokens of them at a time
  StreamRuns runs[2];  // of teams with `rows` and with one more
  Divider by_blocks;
  Divider by_columns;  // by column blocks
  Divider by_group;    // by a group's column blocks or, if groups are fine, its steps of 16 columns

  QUANTLOOM_HOST_DEVICE int most_rows() const { return rows + (extra > 0 ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE int first_row(int team) const { return team * rows + (team < extra ? team : extra); }
  QUANTLOOM_HOST_DEVICE int rows_of(int team) const { return rows + (team < extra ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE const StreamRuns& runs_of(int team) const { return runs[team < extra ? 1 : 0]; }
};

// `teams`: wanted; no more than row blocks are made. `warps`: of a team.
inline StreamDeal stream_deal(int row_blocks, int column_blocks, int group_steps, int teams, int blocks,
                              int warps) {
  StreamDeal deal;
  deal.teams = std::clamp(teams, 1, row_blocks);
  deal.blocks = blocks;
  deal.warps = warps;
  deal.rows = row_blocks / deal.teams;
  deal.extra = row_blocks % deal.teams;
  for (int more = 0; more < 2; ++more) {
    const int count = (deal.rows + more) * column_blocks;
    deal.runs[more] = {count / warps, count % warps};
  }
  // A row block meets the runs of so many warps at most, each at least `share` long.
  const int share = deal.runs[0].share;
  const int met = share > 0 ? (column_blocks - 1 + share - 1) / share + 1 : column_blocks;
  const int most = std::max(1, std::min({met, column_blocks, warps}));
  deal.parts = static_cast<int>(std::bit_ceil(static_cast<unsigned>(most)));
  deal.by_blocks = Divider(static_cast<uint32_t>(blocks));
  deal.by_columns = Divider(static_cast<uint32_t>(std::max(column_blocks, 1)));
  deal.by_group = Divider(static_cast<uint32_t>(group_steps % 4 != 0 ? group_steps : group_steps / 4));
  return deal;
}

// Activations as digits (cuda/kernels/activation_digits.cuh) come in stretches of 128 columns.
constexpr int kStretchColumns = 128;
constexpr int kStretchBytes = 4 * kStretchColumns + 16;  // four digits of each, and a factor

// The stretches that `count` blocks meet, from column block `first` on and over row ends.
QUANTLOOM_HOST_DEVICE constexpr int stretches_met(int first, int count, int column_blocks) {
  const int all = (column_blocks + 1) / 2;
  if (count <= 0) return 0;
  if (count >= column_blocks) return all;
  const int last = first + count - 1;
  const int met =
      last < column_blocks ? last / 2 - first / 2 + 1 : all - first / 2 + (last - column_blocks) / 2 + 1;
  return met < all ? met : all;
}

// The most that a block of `warps` warps meets.
inline int most_stretches(const StreamDeal& deal, int warps, int column_blocks) {
  const StreamRuns& runs = deal.runs[deal.extra > 0 ? 1 : 0];
  const int64_t count = int64_t{std::min(warps, deal.warps)} * (runs.share + (runs.extra > 0 ? 1 : 0));
  return static_cast<int>(std::min<int64_t>(count / 2 + 2, (column_blocks + 1) / 2));
}

// Bytes of shared memory for them.
QUANTLOOM_HOST_DEVICE constexpr int64_t stream_digit_bytes(int stretches) {
  return int64_t{stretches} * kStretchBytes;
}

// The warps that leave a part of row block `row` of a team: `count` from `first` on.
struct StreamParts {
  int first = 0;
  int count = 0;
};

QUANTLOOM_HOST_DEVICE StreamParts parts_of(const StreamRuns& runs, int row, int column_blocks) {
  if (column_blocks == 0) return {};
  const int first = runs.warp_of(row * column_blocks);
  return {first, runs.warp_of(row * column_blocks + column_blocks - 1) - first + 1};
}

// Floats of a part: sums [m][64 rows in the order of parameter_in_block()], and some so that the parts of a
// sum lie in different banks.
QUANTLOOM_HOST_DEVICE constexpr int stream_part_size(int m) {
  return m * fragments::kBlockRows + 16;
}

// Row blocks whose parts one block of threads adds up, at most.
inline int stream_own_rows(const StreamDeal& deal) {
  return (deal.most_rows() + deal.blocks - 1) / deal.blocks;
}

// Bytes of shared memory for their parts, and for what parts_of() says of each.
inline int64_t stream_parts_bytes(const StreamDeal& deal, int m) {
  return int64_t{stream_own_rows(deal)} *
         (int64_t{deal.parts} * stream_part_size(m) * 4 + static_cast<int64_t>(sizeof(StreamParts)));
}

}  // namespace quantloom::cuda
