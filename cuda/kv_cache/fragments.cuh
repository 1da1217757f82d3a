// Keys and values as operands of mma.m16n8k16: what lane 4 g + t of a warp holds of a tile of 16 tokens.
//
// Scores are K q^T: rows of the first operand are tokens, columns channels. A run is head_dim / 8 consecutive
// channels. Lane t of a quad has runs t of the lower and of the upper half of the channels, paired channel by
// channel (as rotary embeddings pair them), of the tokens of rows g and g + 8.
// Outputs are V^T p^T: rows are channels, columns tokens. Lane g has run g: its channels 2 j and 2 j + 1 are
// rows g and g + 8 of tile j; pairs are those of two tokens.
//
// Row r of a tile of tokens is token r / 2 + 4 (r % 2) of its half, so that the quads of a warp read
// neighbouring rows of codes.
#pragma once

#include "common/load_float.cuh"
#include "kv_cache/code_pairs.cuh"
#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

constexpr int kUnitTokens = 32;  // tokens that a warp takes at a time: two tiles

// The token of row r < 8 of either half of a tile.
__device__ __forceinline__ int token_of_row(int r) {
  return (r >> 1) + 4 * (r & 1);
}

struct Lane {
  int g;
  int t;
};

// The number that two runs of codes take for their channels' scales and least values, in float16.
__device__ __forceinline__ uint32_t grid_value(uint32_t codes, uint32_t scales, uint32_t leasts) {
  return Halves::multiply_add(codes, scales, leasts);
}

// Keys by channel: float16 (scale, min) for each channel of a group of tokens, which holds whole units.
template <int kBits, int kDim>
struct ChannelGridKeys {
  static constexpr int kRun = kDim / 8;
  using Run = CodeRun<kBits, kRun>;
  static constexpr bool kStaged = false;

  Run low[4], high[4];  // of the tokens of rows g and g + 8 of both tiles
  const std::byte* ranges;

  // The unit of tokens from `slot` on in a record in shared memory.
  __device__ __forceinline__ void load(const KVView& view, const std::byte* record, int slot, Lane lane) {
    const KVPart& part = view.layout.keys;
    const auto row_bytes = static_cast<int>(part.row_bytes);
    const std::byte* row = record + part.codes + (slot + token_of_row(lane.g)) * row_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i].load(row + i * 8 * row_bytes, lane.t);
      high[i].load(row + i * 8 * row_bytes, lane.t + 4);
    }
    const int group = slot / static_cast<int>(part.group);
    ranges = record + part.parameters + (group * kDim + lane.t * kRun) * 4;
  }

  // Step k of 16 channels, of both tiles.
  __device__ __forceinline__ void step(int k, uint32_t (&first)[4], uint32_t (&second)[4]) const {
    const auto below = *reinterpret_cast<const uint2*>(ranges + k * 8);
    const auto above = *reinterpret_cast<const uint2*>(ranges + k * 8 + kDim / 2 * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t scales = low_halves(i == 0 ? below.x : below.y, i == 0 ? above.x : above.y);
      const uint32_t leasts = high_halves(i == 0 ? below.x : below.y, i == 0 ? above.x : above.y);
      const auto value = [&](int row) {
        return grid_value(code_pair<kBits, kRun>(low[row], high[row], 2 * k + i), scales, leasts);
      };
      first[2 * i] = value(0);
      first[2 * i + 1] = value(1);
      second[2 * i] = value(2);
      second[2 * i + 1] = value(3);
    }
  }
};

// Values by token: float16 (scale, min) for each group of channels of a token. A run lies in one group or
// two.
template <int kBits, int kDim>
struct TokenGridValues {
  static constexpr int kRun = kDim / 8;
  using Run = CodeRun<kBits, kRun>;
  static constexpr bool kStaged = false;
  static constexpr bool kTwoGroups = (kRun & (kRun - 1)) != 0;

  Run runs[4];                         // tokens t, t + 4, t + 8, t + 12 of a tile
  uint32_t scales[2][1 + kTwoGroups];  // of the first two and of the last two
  uint32_t leasts[2][1 + kTwoGroups];
  int boundary;  // channels of the run in its first group

  // The tile of tokens from `slot` on.
  __device__ __forceinline__ void load(const KVView& view, const std::byte* record, int slot, Lane lane) {
    const KVPart& part = view.layout.values;
    const auto row_bytes = static_cast<int>(part.row_bytes);
    const auto groups = static_cast<int>(part.groups);
    const auto group_size = static_cast<int>(part.group);
    const std::byte* row = record + part.codes + (slot + lane.t) * row_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) runs[i].load(row + i * 4 * row_bytes, lane.g);
    const int group = lane.g * kRun / group_size;
    boundary = (group + 1) * group_size - lane.g * kRun;
    const auto* pairs =
        reinterpret_cast<const uint32_t*>(record + part.parameters) + (slot + lane.t) * groups + group;
#pragma unroll
    for (int n = 0; n < 1 + kTwoGroups; ++n) {
      const int next = n == 1 && boundary < kRun ? 1 : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a = pairs[8 * i * groups + next];
        const uint32_t b = pairs[(8 * i + 4) * groups + next];
        scales[i][n] = low_halves(a, b);
        leasts[i][n] = high_halves(a, b);
      }
    }
  }

  // Tile j of 16 channels.
  __device__ __forceinline__ void step(int j, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t scale = scales[i][0];
      uint32_t least = leasts[i][0];
      if constexpr (kTwoGroups) {
        if (2 * j >= boundary) scale = scales[i][1], least = leasts[i][1];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t codes = code_pair<kBits, kRun>(runs[2 * i], runs[2 * i + 1], 2 * j + row);
        a[2 * i + row] = grid_value(codes, scale, least);
      }
    }
  }
};

// Two consecutive elements as float16.
__device__ __forceinline__ uint32_t exact_pair(const std::byte* row, DType dtype, int channel) {
  if (dtype == DType::f16) return *reinterpret_cast<const uint32_t*>(row + channel * 2);
  float2 two;
  if (dtype == DType::bf16) {
    const auto pair = *reinterpret_cast<const uint32_t*>(row + channel * 2);
    two = {cuda::HalfPair<__nv_bfloat16>::low(pair), cuda::HalfPair<__nv_bfloat16>::high(pair)};
  } else {
    two = *reinterpret_cast<const float2*>(row + channel * 4);
  }
  const __half2 halves = __floats2half2_rn(two.x, two.y);
  return *reinterpret_cast<const uint32_t*>(&halves);
}

// Exact keys in global memory, of the tokens of rows g and g + 8 of both tiles; null: none, zeros.
template <int kDim>
struct ExactKeys {
  static constexpr int kRun = kDim / 8;
  const std::byte* rows[4];
  DType dtype;
  int t;

  __device__ __forceinline__ void step(int k, uint32_t (&first)[4], uint32_t (&second)[4]) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      uint32_t below = 0;
      uint32_t above = 0;
      if (rows[row] != nullptr) {
        below = exact_pair(rows[row], dtype, t * kRun + 2 * k);
        above = exact_pair(rows[row], dtype, kDim / 2 + t * kRun + 2 * k);
      }
      uint32_t(&to)[4] = row < 2 ? first : second;
      to[row % 2] = low_halves(below, above);
      to[2 + row % 2] = high_halves(below, above);
    }
  }
};

// Exact values of tokens t, t + 4, t + 8, t + 12 of a tile.
template <int kDim>
struct ExactValues {
  static constexpr int kRun = kDim / 8;
  const std::byte* rows[4];
  DType dtype;
  int g;

  __device__ __forceinline__ void step(int j, uint32_t (&a)[4]) const {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = rows[i] == nullptr ? 0 : exact_pair(rows[i], dtype, g * kRun + 2 * j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = low_halves(pairs[2 * i], pairs[2 * i + 1]);
      a[2 * i + 1] = high_halves(pairs[2 * i], pairs[2 * i + 1]);
    }
  }
};

}  // namespace quantloom::kv_cache
