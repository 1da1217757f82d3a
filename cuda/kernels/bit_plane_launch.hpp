// What the products with planes of bits are launched with.
#pragma once

#include "kernels/bit_plane_layout.hpp"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// Shared memory for 128 activations as bits; see bit_digits.cuh.
constexpr int kBitStretchBytes = 416;
// Most tokens of a launch.
constexpr int kMostBitPlaneTokens = 16;

// Warps of a block of threads. fine: groups are no multiples of 128 columns, or scales are float32.
QUANTLOOM_HOST_DEVICE constexpr int bit_plane_warps(int planes, int tokens, bool fine) {
  return planes <= (fine && tokens > 1 ? 2 : 4) && tokens <= 8 ? 16 : 8;
}

// The codes of arguments.w are signs, its column blocks of 128 columns.
struct BitPlaneLaunch {
  ProductArguments arguments;
  int parameters = 1;   // of a row and group
  int group_words = 4;  // of 32 columns, in a group
  DType dtype = DType::f16;
  StreamDeal deal{};
  bool overlap = false;
  cudaStream_t stream = nullptr;

  bool fine() const { return group_words % 4 != 0 || arguments.w.scale_dtype == DType::f32; }
};

// The products of matrices of kPlanes planes, in units of their own.
template <int kPlanes>
void launch_bit_planes(const BitPlaneLaunch& launch);

}  // namespace quantloom::cuda
