// What the products of up to 16 tokens with trellis codes are launched with.
#pragma once

#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

constexpr int kMostPanelTokens = 16;

// Warps of a block of threads, for one or two groups of eight tokens.
QUANTLOOM_HOST_DEVICE constexpr int panel_warps(int groups) {
  return groups == 1 ? 16 : 12;
}

// Places in the workspace.
struct TrellisPanelWork {
  // float16 [column_pieces][2][8 * groups tokens][4 tiles][8]: number 4 a + 2 b + c of a tile is activation
  // 2 a + 8 b + c; numbers 0 ... 7 in the first half of a piece.
  unsigned char* activations = nullptr;
  float* units = nullptr;  // [deal.blocks][most chunks][8 * groups]: what the activations are multiples of
  float* parts = nullptr;  // [64-row pieces][deal.blocks][deal.parts][8 * groups][64]
};

struct TrellisPanelLaunch {
  TrellisProduct product;
  TrellisDeal deal;
  TrellisPanelWork work;
  cudaStream_t stream = nullptr;
};

// Bytes of shared memory: activations, and what they are multiples of.
inline int panel_memory(const TrellisDeal& deal, int groups) {
  return (deal.most_chunks() * 8 * groups * 4 + 15) / 16 * 16 + 2 * deal.most_spans() * groups * 1024;
}

// Activations into the workspace, parts of sums out of it.
void launch_panel_activations(const TrellisPanelLaunch& launch);
void launch_panel_sums(const TrellisPanelLaunch& launch);

// Defined for each number of bits in a translation unit of its own.
template <int kBits, TrellisHash kHash>
void launch_trellis_panels(const TrellisPanelLaunch& launch);

}  // namespace quantloom::cuda
