// What the streaming product of trellis codes is launched with.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/trellis_deal.hpp"

namespace quantloom::cuda {

constexpr int kMostTrellisTokens = 4;
constexpr int kTrellisWarps = 16;  // of a block of threads

// How weights are made of a hash: one of the sum of its bytes or of two float16 numbers, or two of its bytes.
enum class TrellisHash : uint8_t { bytes, halves, octagon };

// What a code is, beside its bits: word = multiplier * state + addend, and weight = slope * (sum of the bytes
// or halves of the word) + offset.
struct TrellisMap {
  uint32_t multiplier = 0;
  uint32_t addend = 0;
  float slope = 1.0F;
  float offset = 0.0F;
};

struct TrellisProduct {
  const uint4* codes = nullptr;  // in fragment order; see PreparedPlanes
  const __half* input_scales = nullptr;
  const __half* output_scales = nullptr;
  TrellisMap map;
  bool rotated = false;
  int n = 0;
  int k = 0;
  int column_pieces = 0;  // of 64 columns; even
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  int m = 0;
  bool bfloat16 = false;    // x, bias and y; else float16
  bool x_in_fours = false;  // rows of x can be read in pieces of 8 bytes
  bool overlap = false;     // launched before the previous kernel has ended
  // Sums of the blocks of a team, [bands][deal.blocks][1 or kMostTrellisTokens][128], or null: a team is a
  // cluster, whose blocks leave them in each other's shared memory.
  float* partial = nullptr;
};

struct TrellisLaunch {
  TrellisProduct product;
  TrellisDeal deal;
  bool overlap = false;
  cudaStream_t stream = nullptr;
};

// Adds the sums in launch.product.partial; the second launch of a product.
void launch_trellis_sums(const TrellisLaunch& launch);

// The streaming product of one kind of words.
struct TrellisLauncher {
  // Of one token, and of two to four.
  void (*launch[2])(const TrellisLaunch&) = {};
  // Bytes of shared memory that a deal takes.
  int (*memory[2])(const TrellisDeal&) = {};
};

// Words as they meet the tensor cores.
enum class TrellisWords : uint8_t {
  bytes,          // the bytes of the hash
  exl3_bytes,     // those of the hash of EXL3's MUL1; 2, 3 and 4 bits
  halves,         // the two float16 numbers of the hash
  octagon,        // the bytes of a hash of two weights; up to 4 bits
  own_octagon,    // those of the hash of kOctagonMultiplier
  exact_bytes,    // weights, decoded to float16 from the bytes of the hash
  exact_halves,   // weights, decoded to float16 from its two float16 numbers
  exact_octagon,  // weights, decoded to float16 from the bytes of a hash of two
};

// Defined for each number of bits in a translation unit of its own.
template <int kBits>
TrellisLauncher trellis_launcher(TrellisWords words);

}  // namespace quantloom::cuda
