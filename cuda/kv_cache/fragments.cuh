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

#include "common/half_pairs.cuh"
#include "common/shared_memory.cuh"
#include "kv_cache/code_pairs.cuh"
#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

// The token of row r < 8 of either half of a tile.
__device__ __forceinline__ int token_of_row(int r) {
  return (r >> 1) + 4 * (r & 1);
}

struct Lane {
  int g;
  int t;
};

// A warp begins to copy kBytes, a multiple of 16, into shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_run(std::byte* to, const std::byte* from) {
  const int lane = static_cast<int>(threadIdx.x) % 32 * 16;
#pragma unroll
  for (int i = 0; i < kBytes; i += 32 * 16) {
    if (i + lane < kBytes) cuda::copy_async(to + i + lane, from + i + lane);
  }
}

// The same of `bytes`, a multiple of 16 and at most kMost words for each token of a unit.
template <int kMost>
__device__ __forceinline__ void copy_few(std::byte* to, const std::byte* from, int bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32 * 16;
#pragma unroll
  for (int i = 0; i < kUnitTokens * kMost * 4; i += 32 * 16) {
    if (i + lane < bytes) cuda::copy_async(to + i + lane, from + i + lane);
  }
}

// The number that two runs of codes take for their channels' scales and least values, in float16.
__device__ __forceinline__ uint32_t grid_value(uint32_t codes, uint32_t scales, uint32_t leasts) {
  return Halves::multiply_add(codes, scales, leasts);
}

// Keys by channel: float16 (scale, min) for each channel of a group of tokens, which holds whole units.
template <int kBits, int kDim>
struct ChannelGridKeys {
  static constexpr int kRun = kDim / 8;
  static constexpr int kRowBytes = (kDim * kBits + 31) / 32 * 4;
  using Run = CodeRun<kBits, kRun>;

  uint32_t mark;
  Lane lane;
  int codes;  // of the keys in a record
  int ranges;
  uint32_t inverse;     // slot * inverse / 2^20 is the group of a unit
  Run low[4], high[4];  // of the tokens of rows g and g + 8 of both tiles
  const std::byte* range;

  __device__ __forceinline__ ChannelGridKeys(const KVView& view, Lane lane_, uint32_t mark_)
      : mark(mark_), lane(lane_) {
    const KVPart& part = view.layout.keys;
    codes = static_cast<int>(part.codes);
    ranges = static_cast<int>(part.parameters);
    inverse = ((1U << 20) + static_cast<uint32_t>(part.group) - 1) / static_cast<uint32_t>(part.group);
  }

  // Of the keys of a unit: codes, then a group's ranges.
  static __host__ __device__ int unit_bytes(const KVLayout&) { return kUnitTokens * kRowBytes + kDim * 4; }
  // Begins to copy the unit of tokens from `slot` on in a record.
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, int slot) const {
    copy_run<kUnitTokens * kRowBytes>(to, record + codes + slot * kRowBytes);
    const auto group = static_cast<int>(static_cast<uint32_t>(slot) * inverse >> 20);
    copy_run<kDim * 4>(to + kUnitTokens * kRowBytes, record + ranges + group * kDim * 4);
  }
  __device__ __forceinline__ void load(const std::byte* unit) {
    const std::byte* row = unit + token_of_row(lane.g) * kRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i].load(row + i * 8 * kRowBytes, lane.t);
      high[i].load(row + i * 8 * kRowBytes, lane.t + 4);
    }
    range = unit + kUnitTokens * kRowBytes + lane.t * kRun * 4;
  }

  // Adds the products with queries, of which `row` is the lane's part: scales are multiplied into those, once
  // for all tokens of the unit; the least values of all channels make one more token.
  __device__ __forceinline__ void multiply(const uint32_t* row, float (&scores)[2][4]) const {
    float least[4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const auto below = *reinterpret_cast<const uint2*>(range + k * 8);
      const auto above = *reinterpret_cast<const uint2*>(range + k * 8 + kDim / 2 * 4);
      const auto query = *reinterpret_cast<const uint2*>(row + 2 * k);
      const uint32_t first = Halves::multiply(query.x, low_halves(below.x, above.x));
      const uint32_t second = Halves::multiply(query.y, low_halves(below.y, above.y));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 2 * tile + i % 2;
          a[i] = code_pair(low[token], high[token], 2 * k + i / 2, mark);
        }
        cuda::multiply_accumulate<__half>(scores[tile], a, first, second);
      }
      const uint32_t x = high_halves(below.x, above.x);
      const uint32_t y = high_halves(below.y, above.y);
      const uint32_t leasts[4] = {x, x, y, y};
      cuda::multiply_accumulate<__half>(least, leasts, query.x, query.y);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] += least[i % 4];
  }
};

// The ranges of tokens that share a grid in each group of channels: float16 (scale, least).
struct GridRanges {
  int begin;        // in a record
  int token_bytes;  // of a token

  __device__ __forceinline__ explicit GridRanges(const KVPart& part)
      : begin(static_cast<int>(part.parameters)), token_bytes(static_cast<int>(part.groups) * 4) {}

  static __host__ __device__ int unit_bytes(const KVPart& part) {
    return kUnitTokens * static_cast<int>(part.groups) * 4;
  }
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, int slot) const {
    copy_few<8>(to, record + begin + slot * token_bytes, kUnitTokens * token_bytes);
  }
  // (scale, least) of a group of a token of the unit.
  __device__ __forceinline__ uint32_t at(const std::byte* unit, int token, int group) const {
    return *reinterpret_cast<const uint32_t*>(unit + token * token_bytes + group * 4);
  }
  // Codes are numbers without sign.
  template <int kBits, class Run>
  static __device__ __forceinline__ void adjust(Run&) {}
};

// Those of significant digits. A code with its top bit flipped is the number of steps of scale 2^shift from
// the least value, -2^(bits - 1) of them: all exact in float16, and below 2^16, since 128 scales are.
struct DigitRanges {
  int begin;
  int shifts;
  int shift_bytes;  // of a token
  int shift_bits;
  uint32_t unshifted;  // float16 (1, -2^(bits - 1))

  __device__ __forceinline__ explicit DigitRanges(const KVPart& part)
      : begin(static_cast<int>(part.parameters)),
        shifts(static_cast<int>(part.shifts)),
        shift_bytes(static_cast<int>(part.shift_bytes)),
        shift_bits(part.shift_bits),
        unshifted((0xBC00U + (static_cast<uint32_t>(part.bits - 1) << 10)) << 16 | 0x3C00U) {}

  // Scales, shifts, and four bytes that are read beyond them.
  static __host__ __device__ int unit_bytes(const KVPart& part) {
    return kUnitTokens * (2 + static_cast<int>(part.shift_bytes)) + 16;
  }
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, int slot) const {
    copy_run<kUnitTokens * 2>(to, record + begin + slot * 2);
    copy_few<1>(to + kUnitTokens * 2, record + shifts + slot * shift_bytes, kUnitTokens * shift_bytes);
  }
  __device__ __forceinline__ uint32_t at(const std::byte* unit, int token, int group) const {
    const uint32_t scale = *reinterpret_cast<const uint16_t*>(unit + token * 2);
    const int bit = token * shift_bytes * 8 + group * shift_bits;
    const auto* words = reinterpret_cast<const uint32_t*>(unit + kUnitTokens * 2) + bit / 32;
    const uint32_t shift = __funnelshift_r(words[0], words[1], bit % 32) & ((1U << shift_bits) - 1);
    return Halves::multiply(scale * 0x10001U, unshifted + shift * 0x04000400U);
  }
  template <int kBits, class Run>
  static __device__ __forceinline__ void adjust(Run& run) {
#pragma unroll
    for (int i = 0; i < Run::kWords; ++i) {
      uint32_t tops = 0;
#pragma unroll
      for (int bit = 0; bit < 32; ++bit) {
        if ((32 * i + bit) % kBits == kBits - 1) tops |= 1U << bit;
      }
      run.words[i] ^= tops;
    }
  }
};

// Keys by token, with a range for each group of channels. A run lies in one group.
template <class Ranges, int kBits, int kDim>
struct TokenKeys {
  static constexpr int kRun = kDim / 8;
  static constexpr int kRowBytes = (kDim * kBits + 31) / 32 * 4;
  using Run = CodeRun<kBits, kRun>;

  uint32_t mark;
  Lane lane;
  Ranges ranges;
  int codes;                  // of the keys in a record
  int low_group, high_group;  // of the lane's runs
  Run low[4], high[4];        // of the tokens of rows g and g + 8 of both tiles
  uint32_t scales[4], leasts[4];

  __device__ __forceinline__ TokenKeys(const KVView& view, Lane lane_, uint32_t mark_)
      : mark(mark_), lane(lane_), ranges(view.layout.keys), codes(static_cast<int>(view.layout.keys.codes)) {
    low_group = lane.t * kRun / static_cast<int>(view.layout.keys.group);
    high_group = (lane.t + 4) * kRun / static_cast<int>(view.layout.keys.group);
  }

  // Of the keys of a unit: codes, then ranges.
  static __host__ __device__ int unit_bytes(const KVLayout& layout) {
    return kUnitTokens * kRowBytes + Ranges::unit_bytes(layout.keys);
  }
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, int slot) const {
    copy_run<kUnitTokens * kRowBytes>(to, record + codes + slot * kRowBytes);
    ranges.fetch(to + kUnitTokens * kRowBytes, record, slot);
  }
  __device__ __forceinline__ void load(const std::byte* unit) {
    const int token = token_of_row(lane.g);
    const std::byte* row = unit + token * kRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i].load(row + i * 8 * kRowBytes, lane.t);
      high[i].load(row + i * 8 * kRowBytes, lane.t + 4);
      Ranges::template adjust<kBits>(low[i]);
      Ranges::template adjust<kBits>(high[i]);
      const uint32_t a = ranges.at(unit + kUnitTokens * kRowBytes, token + i * 8, low_group);
      const uint32_t b = ranges.at(unit + kUnitTokens * kRowBytes, token + i * 8, high_group);
      scales[i] = low_halves(a, b);
      leasts[i] = high_halves(a, b);
    }
  }
  __device__ __forceinline__ void multiply(const uint32_t* row, float (&scores)[2][4]) const {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const auto query = *reinterpret_cast<const uint2*>(row + 2 * k);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 2 * tile + i % 2;
          a[i] = grid_value(code_pair(low[token], high[token], 2 * k + i / 2, mark), scales[token],
                            leasts[token]);
        }
        cuda::multiply_accumulate<__half>(scores[tile], a, query.x, query.y);
      }
    }
  }
};

// Values by token, with a range for each group of channels. A run lies in one group or two.
template <class Ranges, int kBits, int kDim>
struct TokenValues {
  static constexpr int kRun = kDim / 8;
  static constexpr int kRowBytes = (kDim * kBits + 31) / 32 * 4;
  static constexpr bool kTwoGroups = (kRun & (kRun - 1)) != 0;
  using Run = CodeRun<kBits, kRun>;

  uint32_t mark;
  Lane lane;
  Ranges ranges;
  int codes;                           // of the values in a record
  int group;                           // of the run's first channel
  int boundary;                        // channels of the run in its first group
  Run runs[4];                         // tokens t, t + 4, t + 8, t + 12 of a tile
  uint32_t scales[2][1 + kTwoGroups];  // of the first two and of the last two
  uint32_t leasts[2][1 + kTwoGroups];

  __device__ __forceinline__ TokenValues(const KVView& view, Lane lane_, uint32_t mark_)
      : mark(mark_),
        lane(lane_),
        ranges(view.layout.values),
        codes(static_cast<int>(view.layout.values.codes)) {
    const auto group_size = static_cast<int>(view.layout.values.group);
    group = lane.g * kRun / group_size;
    boundary = (group + 1) * group_size - lane.g * kRun;
  }

  // Of the values of a unit: codes, then ranges.
  static __host__ __device__ int unit_bytes(const KVLayout& layout) {
    return kUnitTokens * kRowBytes + Ranges::unit_bytes(layout.values);
  }
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, int slot) const {
    copy_run<kUnitTokens * kRowBytes>(to, record + codes + slot * kRowBytes);
    ranges.fetch(to + kUnitTokens * kRowBytes, record, slot);
  }
  // The tile of tokens from `token` on.
  __device__ __forceinline__ void load(const std::byte* unit, int token) {
    token += lane.t;
    const std::byte* row = unit + token * kRowBytes;
    const std::byte* range = unit + kUnitTokens * kRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      runs[i].load(row + i * 4 * kRowBytes, lane.g);
      Ranges::template adjust<kBits>(runs[i]);
    }
#pragma unroll
    for (int n = 0; n < 1 + kTwoGroups; ++n) {
      const int of = n == 1 && boundary < kRun ? group + 1 : group;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a = ranges.at(range, token + 8 * i, of);
        const uint32_t b = ranges.at(range, token + 8 * i + 4, of);
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
        a[2 * i + row] = grid_value(code_pair(runs[2 * i], runs[2 * i + 1], 2 * j + row, mark), scale, least);
      }
    }
  }
};

template <int kBits, int kDim>
using TokenGridKeys = TokenKeys<GridRanges, kBits, kDim>;
template <int kBits, int kDim>
using TokenGridValues = TokenValues<GridRanges, kBits, kDim>;
template <int kBits, int kDim>
using DigitKeys = TokenKeys<DigitRanges, kBits, kDim>;
template <int kBits, int kDim>
using DigitValues = TokenValues<DigitRanges, kBits, kDim>;

}  // namespace quantloom::kv_cache
