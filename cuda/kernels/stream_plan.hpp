// How the streaming loop's work is dealt: the teams of least estimated time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/device.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/stream_deal.hpp"
#include "kernels/trellis_product.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

// What the streaming loop's time is estimated from, in us; fitted to measurements on an H200.
struct StreamCosts {
  double of_block;     // of 64 x 64, of each of 16 warps
  double of_teams[4];  // of 1, 2, 4 and 8 blocks of threads, whose parts of sums meet in a cluster
  double of_memory;    // if they meet in memory
};

inline StreamCosts stream_costs(int bits, bool digits) {
  if (digits) return {0.45, {0.0, 0.5, 0.7, 0.9}, 3.0};
  return {std::max(0.25 * bits, 0.6), {2.0, 2.6, 3.2, 3.5}, 5.0};
}

// Of `bytes` of shared memory that are left, those for the activations that outliers meet: none if the tokens
// would not fit in two rounds, where it is faster to read them from memory.
inline int spare_for_outliers(int64_t bytes, int64_t k, int m) {
  const int64_t tokens = std::max<int64_t>(bytes, 0) / std::max<int64_t>(checked_pad(k, 8) * 2, 1);
  return 2 * tokens >= m ? static_cast<int>(bytes) : 0;
}

// From so many blocks of 64 x 64 of each warp on, a product of one token is faster on digits, which take some
// time to make: measured.
constexpr int kDigitsFromBlocks = 5;

struct StreamPlan {
  StreamDeal deal;
  int longest = 0;  // blocks of a warp; 0: no deal fits
};

// Deals the work of the streaming loop. Of the teams' sizes (or the given one, `blocks`) the one with the
// least estimated time wins. digits: activations are made digits, for which there must be room.
inline StreamPlan stream_plan(const FragmentLayout& layout, const DeviceFacts& device, int m, int table_bytes,
                              int blocks, bool in_clusters, bool digits) {
  const StreamCosts costs = stream_costs(layout.bits, digits);
  const bool fine = layout.group_columns % fragments::kBlockColumns != 0;
  const int warps = stream_warps(m, fine);
  // Beside the parts. The barrier of the parts takes some bytes as well.
  const int64_t other_bytes = table_bytes + stream_gathered_bytes(m, fine) + 256;
  const int row_blocks = static_cast<int>(layout.row_blocks);
  const int column_blocks = static_cast<int>(layout.column_blocks);
  const int group_steps = static_cast<int>(layout.group_columns / fragments::kStepColumns);
  StreamPlan best;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](int team_blocks, double overhead) {
    const bool in_memory = team_blocks > 1 && !in_clusters;
    const int resident =
        in_memory ? std::max(device.processors / team_blocks, 1) : resident_clusters(device, team_blocks);
    int teams = resident;
    int team_warps = team_blocks * warps;
    const auto bytes_of = [&](const StreamDeal& deal) {
      return other_bytes + stream_digit_bytes(deal.stretches) + (in_memory ? 0 : stream_parts_bytes(deal, m));
    };
    auto deal = stream_deal(row_blocks, column_blocks, group_steps, teams, team_blocks, team_warps);
    if (digits) deal.stretches = most_stretches(deal, warps, column_blocks);
    while (bytes_of(deal) > device.shared_memory) {
      if (digits) return;
      if (deal.most_rows() > 1) {
        teams = 2 * deal.teams;
      } else {
        team_warps = std::max(team_warps / 2, 1);
      }
      deal = stream_deal(row_blocks, column_blocks, group_steps, teams, team_blocks, team_warps);
    }
    const double rounds = std::ceil(static_cast<double>(deal.teams) / resident);
    const auto longest =
        static_cast<int>(ceil_div(int64_t{deal.most_rows()} * column_blocks, int64_t{deal.warps}));
    const double cost = rounds * (longest * costs.of_block * warps / 16 + overhead);
    if (cost < least) {
      least = cost;
      deal.spare = spare_for_outliers(device.shared_memory - bytes_of(deal) - 16, layout.k, m);
      best = {deal, longest};
    }
  };
  if (blocks > 0) {
    consider(blocks, 0);
    return best;
  }
  consider(1, costs.of_teams[0]);
  if (in_clusters) {
    for (int i = 1; i < 4; ++i) consider(1 << i, costs.of_teams[i]);
  } else {
    consider(device.processors, costs.of_memory);
  }
  return best;
}

}  // namespace quantloom::cuda
