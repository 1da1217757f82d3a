// How the work of a trellis product is dealt: bands of 128 rows to teams of thread blocks, the columns of a
// team to its blocks, and a block's pieces of 64 x 64 weights to its warps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/stream_deal.hpp"

namespace quantloom::cuda {

constexpr int kTrellisBand = 128;  // rows that are rotated together, as are columns
constexpr int kTrellisPiece = 64;  // rows and columns of a piece

struct TrellisDeal {
  int teams = 1;
  int blocks = 1;       // of threads, in a team
  int bands = 0;        // of 128 rows, of a team
  int extra = 0;        // teams, the first, that have one more
  int spans = 0;        // of 128 columns, of a block
  int extra_spans = 0;  // blocks of a team, the first, that have one more
  int chunk = 1;        // spans whose activations share a scale
  int parts = 1;        // places for the parts of the sums of 64 rows
  Divider by_blocks;
  Divider by_columns[2];  // by the pieces in a row of blocks of `spans` and of one more

  TrellisDeal() = default;
  // Of `all_bands` and `all_spans`, at least 1; teams at most as many as the former.
  TrellisDeal(int all_bands, int all_spans, int team_count, int team_blocks, int chunk_spans)
      : teams(team_count),
        blocks(team_blocks),
        bands(all_bands / team_count),
        extra(all_bands % team_count),
        spans(all_spans / team_blocks),
        extra_spans(all_spans % team_blocks),
        chunk(chunk_spans),
        by_blocks(static_cast<uint32_t>(team_blocks)) {
    by_columns[0] = Divider(static_cast<uint32_t>(std::max(2 * spans, 1)));
    by_columns[1] = Divider(static_cast<uint32_t>(2 * spans + 2));
  }

  QUANTLOOM_HOST_DEVICE int first_band(int team) const {
    return team * bands + (team < extra ? team : extra);
  }
  QUANTLOOM_HOST_DEVICE int bands_of(int team) const { return bands + (team < extra ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE int most_bands() const { return bands + (extra > 0 ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE int first_span(int rank) const {
    return rank * spans + (rank < extra_spans ? rank : extra_spans);
  }
  QUANTLOOM_HOST_DEVICE int spans_of(int rank) const { return spans + (rank < extra_spans ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE int most_spans() const { return spans + (extra_spans > 0 ? 1 : 0); }
  QUANTLOOM_HOST_DEVICE int most_chunks() const { return (most_spans() + chunk - 1) / chunk; }
  QUANTLOOM_HOST_DEVICE const Divider& columns_of(int rank) const {
    return by_columns[rank < extra_spans ? 1 : 0];
  }
  // Bands that one block of threads finishes, at most.
  QUANTLOOM_HOST_DEVICE int own_bands() const { return (most_bands() + blocks - 1) / blocks; }
};

// The pieces of one block of threads, dealt to its warps in order: a row of `columns` pieces, and the next.
struct TrellisRuns {
  int count = 0;  // pieces
  int warps = 1;

  QUANTLOOM_HOST_DEVICE int begin(int warp) const {
    const int share = count / warps;
    const int longer = count - share * warps;
    return warp * share + (warp < longer ? warp : longer);
  }
  QUANTLOOM_HOST_DEVICE int warp_of(int piece) const {
    const int share = count / warps;
    const int longer = count - share * warps;
    const int first = longer * (share + 1);
    return piece < first ? piece / (share + 1) : longer + (piece - first) / share;
  }
};

// The most warps that meet one row of pieces.
inline int most_parts(int rows, int columns, int warps) {
  const TrellisRuns runs{rows * columns, warps};
  int most = 1;
  for (int row = 0; row < rows && columns > 0; ++row) {
    most = std::max(most, runs.warp_of((row + 1) * columns - 1) - runs.warp_of(row * columns) + 1);
  }
  return most;
}

}  // namespace quantloom::cuda
