// The way back through a search: a warp for each ring. Between two copies of the costs it tries all ancestors
// of an edge; the path that the search found is among those of least cost.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"

namespace quantloom::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr uint32_t kStateMask = 0xFFFF;

struct PathMemory {
  float targets[kRingPositions];
  uint16_t states[kLongestSearch];
};

__device__ __forceinline__ float weight_of_state(const uint16_t* table, uint32_t state) {
  return __half2float(__ushort_as_half(table[state]));
}

// The bits of the ring with these states at its positions.
template <int kBits>
__device__ inline void write_words(const uint16_t* states, int lane, uint32_t* words) {
  for (int w = lane; w < 8 * kBits; w += 32) {
    uint32_t word = 0;
    for (int position = 32 * w / kBits; position <= (32 * w + 31) / kBits; ++position) {
      const uint32_t fresh = states[position] & ((1U << kBits) - 1);
      const int left = 32 * (w + 1) - (position + 1) * kBits;  // bits of the word behind these
      word |= left >= 0 ? fresh << left : fresh >> -left;
    }
    words[w] = word;
  }
}

// The sum in the same order for every ring.
__device__ inline float squared_error(const PathMemory& memory, const float* targets, const uint16_t* table,
                                      int lane) {
  float sum = 0;
  for (int position = lane; position < kRingPositions; position += 32) {
    const float d = targets[position] - weight_of_state(table, memory.states[position]);
    sum = fmaf(d, d, sum);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  return sum;
}

// The edge before step `step` of a path with these states and this last edge.
template <int kBits>
__device__ __forceinline__ int edge_before(const PathMemory& memory, int step, int steps, int last) {
  return step < steps ? memory.states[step] >> kBits : last;
}

// Of a run that began at position 0 and is longer than a ring: the step at which an edge comes back 256 steps
// later, nearest to the middle of those that can, or -1.
template <int kBits>
__device__ inline int closing_step(const PathMemory& memory, int steps, int last, int lane) {
  const int overlap = steps - kRingPositions;
  uint32_t nearest = 0xFFFFFFFFU;
  for (int step = lane; step <= overlap; step += 32) {
    if (edge_before<kBits>(memory, step, steps, last) ==
        edge_before<kBits>(memory, step + kRingPositions, steps, last)) {
      const uint32_t away = static_cast<uint32_t>(abs(2 * step - overlap));
      nearest = min(nearest, away << 16 | static_cast<uint32_t>(step));
    }
  }
  nearest = __reduce_min_sync(kAllLanes, nearest);
  return nearest == 0xFFFFFFFFU ? -1 : static_cast<int>(nearest & 0xFFFFU);
}

// The ring at place `index` of the task, by a warp. A ring's copies of costs lie with those of its group.
template <int kBits>
__device__ void walk_back(const SearchTask& task, const TracebackResult& result, int64_t history_words,
                          int index, int lane, PathMemory& memory) {
  using Shape = TrellisShape<kBits>;
  constexpr int kStride = kCopyStride<kBits>;
  if (task.list != nullptr && index >= *task.list_size) return;
  const int64_t tile = task.list == nullptr ? index : task.list[index];
  const float* targets = task.targets + tile * kRingPositions;
  for (int i = lane; i < kRingPositions; i += 32) memory.targets[i] = bounded_target(targets[i]);
  __syncwarp();

  const int ring = index % Shape::kRings;
  const auto* const history =
      reinterpret_cast<const uint16_t*>(task.history + index / Shape::kRings * history_words);
  const int first_copy = task.stop > 0 ? task.stop : kStride;
  const uint32_t last = task.pins != nullptr ? task.pins[tile] : task.ends[tile];
  uint32_t edge = last;
  for (int step = task.steps; step > task.stop; step -= kStride) {
    const int before = step - kStride;
    const uint16_t* costs = history + int64_t{(before - first_copy) / kStride} * Shape::kCopyWords * 2;
    // The path is a string of bits: the ancestor, then the fresh bits of kStride states. It ends in `edge`.
    // A lane tries ancestors whose oldest bits end in its number. Paths that meet in an edge go on as one:
    // each step halves them bits times, first those of the lane.
    constexpr int kOldest = kStride * kBits;
    constexpr int kOfLane = kOldest > 5 ? 1 << (kOldest - 5) : 1;
    float sums[kOfLane];
    uint32_t strings[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const uint32_t oldest =
          (static_cast<uint32_t>(i) << 5 | static_cast<uint32_t>(lane)) & ((1U << kOldest) - 1);
      strings[i] = oldest << (16 - kBits) | edge;
      const uint32_t ancestor = strings[i] >> kOldest;
      sums[i] = 0;
      if (before > 0) {
        sums[i] = __half2float(__ushort_as_half(costs[Shape::copy_place(static_cast<int>(ancestor), ring)]));
      } else if (task.pins != nullptr && ancestor != last) {
        sums[i] = INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kStride; ++i) {
      const float target = memory.targets[(task.first_position + before + i) % kRingPositions];
      const int bits_now = (kStride - i) * kBits;
      const int bits_then = bits_now - kBits;
      const int now = bits_now > 5 ? 1 << (bits_now - 5) : 1;
      const int then = bits_then > 5 ? 1 << (bits_then - 5) : 1;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        if (j >= now) continue;
        const float d = target - weight_of_state(task.table, strings[j] >> bits_then & kStateMask);
        sums[j] = fmaf(d, d, sums[j]);
        if (j >= then && sums[j] < sums[j % then]) {
          sums[j % then] = sums[j];
          strings[j % then] = strings[j];
        }
      }
    }
    // Not negative: bits order as the numbers do.
    const uint32_t least = __float_as_uint(sums[0]);
    uint32_t string = strings[0];
    const uint32_t best = __reduce_min_sync(kAllLanes, least);
    string = __reduce_min_sync(kAllLanes, least == best ? string : 0xFFFFFFFFU);
    if (lane < kStride) {
      memory.states[before + lane] =
          static_cast<uint16_t>(string >> ((kStride - 1 - lane) * kBits) & kStateMask);
    }
    edge = string >> (kStride * kBits);
  }
  __syncwarp();

  if (result.seams != nullptr) {
    if (lane == 0) result.seams[tile] = static_cast<uint16_t>(edge);
    return;
  }
  if (task.steps > kRingPositions) {
    const int closing = closing_step<kBits>(memory, task.steps, static_cast<int>(last), lane);
    if (closing < 0) {
      if (lane == 0) {
        result.open_pins[tile] = static_cast<uint16_t>(memory.states[kRingPositions] >> kBits);
        result.open[atomicAdd(result.open_size, 1)] = static_cast<int32_t>(tile);
      }
      return;
    }
    // Positions before the closing one are taken from the second time around.
    for (int i = lane; i < closing; i += 32) memory.states[i] = memory.states[kRingPositions + i];
    __syncwarp();
  }
  write_words<kBits>(memory.states, lane, result.words + tile * 8 * kBits);
  if (result.errors != nullptr) {
    const float error = squared_error(memory, targets, task.table, lane);
    if (lane == 0) result.errors[tile] = error;
  }
  if (result.states != nullptr) {
    for (int i = lane; i < kRingPositions; i += 32) {
      result.states[tile * kRingPositions + i] = memory.states[i];
    }
  }
}

}  // namespace quantloom::cuda
