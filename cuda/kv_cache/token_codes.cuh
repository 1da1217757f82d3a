// Codes of vectors, bit for bit those of src/kv_cache/kv_codes.cpp, by a warp for each vector. Sources that
// include this are compiled without contraction.
#pragma once

#include <math_constants.h>

#include "kv_cache/kv_codes.hpp"
#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

constexpr unsigned kAllLanes = 0xffffffffU;
constexpr float kLeastScale = 0x1p-24F;

// A KVPart in registers, which stores to memory cannot change.
struct Part {
  KVCodec codec;
  int bits;
  int group;
  int groups;
  int row_bytes;
  int codes;
  int parameters;
  int shifts;
  int shift_bytes;
  int shift_bits;
  int outliers;
  int outlier_share;

  __device__ explicit Part(const KVPart& part)
      : codec(part.codec),
        bits(part.bits),
        group(static_cast<int>(part.group)),
        groups(static_cast<int>(part.groups)),
        row_bytes(static_cast<int>(part.row_bytes)),
        codes(static_cast<int>(part.codes)),
        parameters(static_cast<int>(part.parameters)),
        shifts(static_cast<int>(part.shifts)),
        shift_bytes(static_cast<int>(part.shift_bytes)),
        shift_bits(part.shift_bits),
        outliers(static_cast<int>(part.outliers)),
        outlier_share(static_cast<int>(part.outlier_share)) {}
  __device__ bool has_table() const {
    return codec == KVCodec::channel_table || codec == KVCodec::token_table;
  }
  // With outliers a page has at most 2^16 elements.
  __device__ int outliers_before(int slot, int head_dim) const {
    return slot * head_dim * outlier_share / 10000;
  }
};

struct Grid {
  float scale;
  float least;
};

// What a warp holds of a vector, in shared memory; each for all channels.
struct RowMemory {
  float* values;
  float* missing;
  uint8_t* codes;
  uint8_t* shifts;

  static __host__ __device__ int bytes(int head_dim) { return 10 * head_dim; }
  __device__ RowMemory(std::byte* memory, int head_dim)
      : values(reinterpret_cast<float*>(memory)),
        missing(values + head_dim),
        codes(reinterpret_cast<uint8_t*>(missing + head_dim)),
        shifts(codes + head_dim) {}
};

// Of one head.
struct CodeTables {
  const float* bounds;
  const float* values;
  const __half2* ranges;  // [head_dim], of keys
};

__device__ __forceinline__ CodeTables code_tables(const KVView& view, KVSide side, int head) {
  if (side == KVSide::values) return {view.value_bounds, view.value_values, nullptr};
  return {view.key_bounds, view.key_values, view.key_ranges + head * view.layout.head_dim};
}

// A number as float16 has it, stored at `to`.
__device__ __forceinline__ float store_half(float x, std::byte* to) {
  const __half half = __float2half_rn(x);
  *reinterpret_cast<__half*>(to) = half;
  return __half2float(half);
}
__device__ __forceinline__ float load_half(const std::byte* from) {
  return __half2float(*reinterpret_cast<const __half*>(from));
}

__device__ __forceinline__ Grid store_pair(float scale, float least, std::byte* to) {
  return {store_half(scale, to), store_half(least, to + 2)};
}

__device__ __forceinline__ Grid load_pair(const std::byte* from) {
  return {load_half(from), load_half(from + 2)};
}

__device__ __forceinline__ Grid store_grid(float low, float high, int bits, std::byte* scale,
                                           std::byte* least) {
  const float step = fmaxf((high - low) / static_cast<float>((1 << bits) - 1), kLeastScale);
  return {store_half(step, scale), store_half(low, least)};
}

__device__ __forceinline__ uint8_t code_of(float x, const Grid& grid, int bits) {
  const float steps = rintf((x - grid.least) / grid.scale);
  return static_cast<uint8_t>(fminf(fmaxf(steps, 0.0F), static_cast<float>((1 << bits) - 1)));
}

// Bits [begin, begin + width) of a dense stream of `count` codes, zeros behind them; width up to 32.
__device__ __forceinline__ uint32_t pack_bits(const uint8_t* codes, int count, int bits, int begin,
                                              int width) {
  uint32_t word = 0;
  int i = begin / bits;
  for (int at = i * bits - begin; at < width && i < count; at += bits, ++i) {
    const uint32_t code = codes[i] & ((1U << bits) - 1);
    word |= at < 0 ? code >> -at : code << at;
  }
  return word;
}

__device__ __forceinline__ uint8_t code_at(const std::byte* row, int i, int bits) {
  const int bit = i * bits;
  auto word = static_cast<uint32_t>(row[bit / 8]);
  if (bit % 8 + bits > 8) word |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
  return static_cast<uint8_t>(word >> bit % 8 & ((1U << bits) - 1));
}

// A run of channels that a lane takes of a group; the lanes of a group follow each other.
struct LaneRun {
  int group;
  int lanes;  // of a group: a power of two
  int begin;
  int end;
  bool leads;  // the first lane of an existing group
};

__device__ __forceinline__ int lanes_of_group(const Part& part) {
  int lanes = 32;
  while (lanes > 1 && lanes * part.groups > 32) lanes /= 2;
  return lanes;
}

__device__ __forceinline__ LaneRun lane_run(const Part& part, int head_dim, int first_group, int lanes,
                                            int lane) {
  const int size = part.group;
  const int group = first_group + lane / lanes;
  const int chunk = (size + lanes - 1) / lanes;
  const int end = min((group + 1) * size, head_dim);
  const int begin = group * size + lane % lanes * chunk;
  return {group, lanes, begin, min(begin + chunk, end), lane % lanes == 0 && group < part.groups};
}

__device__ __forceinline__ void encode_grids(const Part& part, int head_dim, const RowMemory& row, int lane,
                                             std::byte* grids) {
  const int lanes = lanes_of_group(part);
  for (int first = 0; first < part.groups; first += 32 / lanes) {
    const LaneRun run = lane_run(part, head_dim, first, lanes, lane);
    float low = CUDART_INF_F;
    float high = -CUDART_INF_F;
    for (int d = run.begin; d < run.end; ++d) {
      low = row.values[d] < low ? row.values[d] : low;
      high = fmaxf(high, row.values[d]);
    }
    for (int step = 1; step < lanes; step *= 2) {
      // Of equal ones, 0 and -0, the first counts.
      const float other = __shfl_xor_sync(kAllLanes, low, step);
      const bool takes = (lane & step) != 0 ? !(low < other) : other < low;
      low = takes ? other : low;
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
    }
    if (run.begin >= run.end && !run.leads) continue;
    alignas(4) std::byte unused[4];
    std::byte* to = run.leads ? grids + run.group * 4 : unused;
    const Grid grid = store_grid(low, high, part.bits, to, to + 2);
    for (int d = run.begin; d < run.end; ++d) row.codes[d] = code_of(row.values[d], grid, part.bits);
  }
}

__device__ __forceinline__ void encode_digits(const Part& part, int head_dim, const RowMemory& row, int lane,
                                              int slot, std::byte* record) {
  float largest = 0;
  for (int d = lane; d < head_dim; d += 32) largest = fmaxf(largest, fabsf(row.values[d]));
  for (int step = 1; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  const __half stored = __float2half_rn(largest == 0 ? 1.0F : fmaxf(largest / 127.0F, kLeastScale));
  if (lane == 0) *reinterpret_cast<__half*>(record + part.parameters + slot * 2) = stored;
  const float scale = __half2float(stored);
  const auto integer = [&](int d) { return fminf(fmaxf(rintf(row.values[d] / scale), -127.0F), 127.0F); };
  const auto half = static_cast<float>(1 << (part.bits - 1));
  const int lanes = lanes_of_group(part);
  for (int first = 0; first < part.groups; first += 32 / lanes) {
    const LaneRun run = lane_run(part, head_dim, first, lanes, lane);
    int most = 0;
    for (int d = run.begin; d < run.end; ++d) most = max(most, static_cast<int>(fabsf(integer(d))));
    for (int step = 1; step < lanes; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    const int shift = max(0, 32 - __clz(most) - (part.bits - 1));
    if (run.leads) row.shifts[run.group] = static_cast<uint8_t>(shift);
    for (int d = run.begin; d < run.end; ++d) {
      const float cut = rintf(integer(d) / static_cast<float>(1 << shift));
      row.codes[d] = static_cast<uint8_t>(static_cast<int>(fminf(fmaxf(cut, -half), half - 1)));
    }
  }
  __syncwarp();
  std::byte* shifts = record + part.shifts + slot * part.shift_bytes;
  for (int i = lane; i < part.shift_bytes; i += 32) {
    shifts[i] = static_cast<std::byte>(pack_bits(row.shifts, part.groups, part.shift_bits, 8 * i, 8));
  }
}

// The least key(d) above `last`, or the largest one below it, of all channels: keys differ, and one is there.
template <bool kLargest, class Key>
__device__ __forceinline__ uint64_t next_key(int head_dim, int lane, uint64_t last, const Key& key) {
  const auto better = [](uint64_t a, uint64_t b) { return kLargest ? a > b : a < b; };
  uint64_t best = kLargest ? 0 : ~uint64_t{0};
  for (int d = lane; d < head_dim; d += 32) {
    const uint64_t own = key(d);
    if (better(last, own) && better(own, best)) best = own;
  }
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(best), step);
    best = better(other, best) ? other : best;
  }
  return best;
}

// The range of a token that is least when `count` elements are left out, at either end. `count` is at most a
// tenth of the channels and 1; row.missing is overwritten.
__device__ __forceinline__ Grid least_range(int head_dim, const RowMemory& row, int lane, int count) {
  // In the order of values, NaN at the ends; above 0.
  const auto key = [&](int d) {
    const uint32_t bits = __float_as_uint(row.values[d]);
    const uint32_t order = bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
    return (static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(d)) + 1;
  };
  float* largest = row.missing + head_dim - 1 - count;
  uint64_t low = 0;
  uint64_t high = ~uint64_t{0};
  for (int i = 0; i <= count; ++i) {
    low = next_key<false>(head_dim, lane, low, key);
    high = next_key<true>(head_dim, lane, high, key);
    if (lane != 0) continue;
    row.missing[i] = row.values[static_cast<uint32_t>(low - 1)];
    largest[count - i] = row.values[static_cast<uint32_t>(high - 1)];
  }
  __syncwarp();
  int best = 0;
  for (int below = 1; below <= count; ++below) {
    if (largest[below] - row.missing[below] < largest[best] - row.missing[best]) best = below;
  }
  const float least = row.missing[best];
  const float most = largest[best];
  __syncwarp();
  // The sum of -0 and -0 would depend on the order of zeros.
  return {fmaxf((most - least) / 2, kLeastScale), (most + least) / 2 + 0.0F};
}

__device__ __forceinline__ void encode_by_table(const Part& part, int head_dim, const RowMemory& row,
                                                int lane, int slot, std::byte* record,
                                                const CodeTables& tables) {
  const int first = part.outliers_before(slot, head_dim);
  const int count = part.outliers_before(slot + 1, head_dim) - first;
  const bool by_token = part.codec == KVCodec::token_table;
  Grid range{};
  if (by_token) {
    range = least_range(head_dim, row, lane, count);
    alignas(4) std::byte unused[4];
    range = store_pair(range.scale, range.least, lane == 0 ? record + part.parameters + slot * 4 : unused);
  }
  const int bounds = (1 << part.bits) - 1;
  for (int d = lane; d < head_dim; d += 32) {
    if (!by_token) range = {__low2float(tables.ranges[d]), __high2float(tables.ranges[d])};
    const float value = row.values[d];
    const float normalized = (value - range.least) / range.scale;
    int code = 0;
    while (code < bounds && tables.bounds[code] < normalized) ++code;
    row.codes[d] = static_cast<uint8_t>(code);
    row.missing[d] = value - (tables.values[code] * range.scale + range.least);
  }
  __syncwarp();
  if (count == 0) return;
  // Those that err most, the lower channel first among equals; their bits have an order for NaN too.
  const auto key = [&](int d) {
    const uint32_t error = __float_as_uint(row.missing[d]) & 0x7fffffffU;
    return static_cast<uint64_t>(error) << 32 | static_cast<uint32_t>(head_dim - d);
  };
  uint64_t last = ~uint64_t{0};
  for (int i = 0; i < count; ++i) last = next_key<true>(head_dim, lane, last, key);
  int place = first;
  for (int begin = 0; begin < head_dim; begin += 32) {
    const int d = begin + lane;
    const bool chosen = d < head_dim && key(d) >= last;
    const unsigned all = __ballot_sync(kAllLanes, chosen);
    if (chosen) {
      const int at = place + __popc(all & ((1U << lane) - 1));
      const auto channel = static_cast<uint32_t>(slot * head_dim + d);
      const uint32_t missing = __half_as_ushort(__float2half_rn(row.missing[d]));
      *reinterpret_cast<uint32_t*>(record + part.outliers + at * 4) = channel | missing << 16;
    }
    place += __popc(all);
  }
}

// One vector, row.values, at `slot` of a record: by a whole warp, which has synchronized.
__device__ __forceinline__ void encode_token(const Part& part, int head_dim, const RowMemory& row, int lane,
                                             int slot, std::byte* record, const CodeTables& tables) {
  if (part.codec == KVCodec::digits) {
    encode_digits(part, head_dim, row, lane, slot, record);
  } else if (part.has_table()) {
    encode_by_table(part, head_dim, row, lane, slot, record, tables);
  } else {
    encode_grids(part, head_dim, row, lane, record + part.parameters + slot * part.groups * 4);
  }
  __syncwarp();
  auto* words = reinterpret_cast<uint32_t*>(record + part.codes + slot * part.row_bytes);
  for (int i = lane; i < part.row_bytes / 4; i += 32) {
    words[i] = pack_bits(row.codes, head_dim, part.bits, 32 * i, 32);
  }
}

}  // namespace quantloom::kv_cache
