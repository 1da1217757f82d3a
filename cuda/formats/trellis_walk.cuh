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

// The bits of the ring with these states.
__device__ inline void write_words(const TrellisShape& shape, const uint16_t* states, int lane,
                                   uint32_t* words) {
  for (int w = lane; w < shape.words(); w += 32) {
    const int end = 32 * (w + 1);
    uint32_t word = 0;
    // A step may begin in the word before.
    int step = 64 * w / (shape.half_bits * shape.weights_per_step);
    if (step > 0) --step;
    for (; step < shape.steps() && shape.first_bit(step) < end; ++step) {
      const int behind = end - shape.first_bit(step + 1);  // bits of the word behind those of the step
      if (behind >= 32) continue;
      const uint32_t fresh = states[step] & ((1U << shape.step_bits(step)) - 1);
      word |= behind >= 0 ? fresh << behind : fresh >> -behind;
    }
    words[w] = word;
  }
}

// The squared error of a state at a step, in float32.
__device__ __forceinline__ float state_error(const uint16_t* table, int per_step, uint32_t state,
                                             const float* targets) {
  if (per_step == 1) {
    const float d = targets[0] - weight_of_state(table, state);
    return d * d;
  }
  const uint32_t weights = reinterpret_cast<const uint32_t*>(table)[state];
  const float first = targets[0] - __half2float(__ushort_as_half(static_cast<uint16_t>(weights & 0xFFFFU)));
  const float second = targets[1] - __half2float(__ushort_as_half(static_cast<uint16_t>(weights >> 16)));
  return fmaf(second, second, first * first);
}

// Of a run that began at the ring's first step and is longer than a round: the step at which an edge comes
// back a round later, nearest to the middle of those that can, or -1.
__device__ inline int closing_step(const SearchTask& task, const PathMemory& memory, uint32_t last,
                                   int lane) {
  const TrellisShape shape = task.shape;
  const int round = shape.steps();
  const int overlap = task.steps - round;
  uint32_t nearest = 0xFFFFFFFFU;
  for (int step = lane; step <= overlap; step += 32) {
    const int fresh_bits = shape.step_bits(step % round);
    const uint32_t edge = static_cast<uint32_t>(memory.states[step]) >> fresh_bits;
    const uint32_t later =
        step < overlap ? static_cast<uint32_t>(memory.states[step + round]) >> fresh_bits : last;
    if (edge != later) continue;
    const auto away = static_cast<uint32_t>(abs(2 * step - overlap));
    nearest = min(nearest, away << 16 | static_cast<uint32_t>(step));
  }
  nearest = __reduce_min_sync(kAllLanes, nearest);
  return nearest == 0xFFFFFFFFU ? -1 : static_cast<int>(nearest & 0xFFFFU);
}

// What a warp makes of the states of a path from `edge` to `last`.
__device__ inline void finish_walk(const SearchTask& task, const TracebackResult& result, int64_t tile,
                                   uint32_t edge, uint32_t last, int lane, PathMemory& memory) {
  const TrellisShape shape = task.shape;
  const int round = shape.steps();
  if (result.seams != nullptr) {
    if (lane == 0) result.seams[tile] = static_cast<uint16_t>(edge);
    return;
  }
  if (task.steps > round) {
    const int closing = closing_step(task, memory, last, lane);
    if (closing < 0) {
      if (lane == 0) {
        result.open_pins[tile] = static_cast<uint16_t>(memory.states[round] >> shape.step_bits(0));
        result.open[atomicAdd(result.open_size, 1)] = static_cast<int32_t>(tile);
      }
      return;
    }
    // Steps before the closing one are taken from the second round.
    for (int i = lane; i < closing; i += 32) memory.states[i] = memory.states[round + i];
    __syncwarp();
  }
  write_words(shape, memory.states, lane, result.words + tile * shape.words());
  if (result.errors != nullptr) {
    // The sum in the same order for every ring.
    const float* targets = task.targets + tile * kRingPositions;
    const int per_step = shape.weights_per_step;
    float sum = 0;
    for (int step = lane; step < round; step += 32) {
      sum += state_error(task.table, per_step, memory.states[step], targets + step * per_step);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
    if (lane == 0) result.errors[tile] = sum;
  }
  if (result.states != nullptr) {
    for (int i = lane; i < round; i += 32) result.states[tile * round + i] = memory.states[i];
  }
}

// Copies of costs of whole bits, one weight a step.
template <int kWholeBits, int kRingCount = most_rings(kWholeBits)>
struct PlainCopies {
  using Shape = SearchShape<kWholeBits, kRingCount>;
  static constexpr int kRings = kRingCount;
  static constexpr int kStride = copy_stride(kWholeBits);
  static constexpr int kWords = Shape::kCopyWords;
  static QUANTLOOM_TRELLIS int bits(int /*step*/) { return kWholeBits; }
  static __device__ __forceinline__ int place(int edge, int ring) { return Shape::copy_place(edge, ring); }
};

// And of bits in halves, where costs are those before even steps.
template <int kEven>
struct HalfCopies {
  static constexpr int kRings = 2;
  static constexpr int kStride = half_copy_stride(kEven);
  static_assert(kStride % 2 == 0);
  static constexpr int kWords = kStates >> kEven;
  static QUANTLOOM_TRELLIS int bits(int step) { return kEven + step % 2; }
  static __device__ __forceinline__ int place(int edge, int ring) { return 2 * edge + ring; }
};

// Copies of costs that the way back will read soon, from memory to the level-2 cache: `copy` is the one
// before a step, those of earlier steps lie before it. By one lane.
constexpr int kCopiesAhead = 6;
__device__ __forceinline__ void prefetch_copy(const void* first, const void* copy, int64_t bytes) {
  const auto* const ahead = static_cast<const unsigned char*>(copy) - kCopiesAhead * bytes;
  if (ahead >= first) prefetch_to_level_2(ahead, static_cast<uint32_t>(bytes));
}

// The ring at place `index` of the task, by a warp. A ring's copies of costs lie with those of its group.
template <class Copies>
__device__ void walk_back(const SearchTask& task, const TracebackResult& result, int64_t history_words,
                          int index, int lane, PathMemory& memory) {
  constexpr int kStride = Copies::kStride;
  // Fresh bits of the steps between two copies from number `step` on.
  constexpr auto kFresh = [](int step) {
    int bits = 0;
    for (; step < kStride; ++step) bits += Copies::bits(step);
    return bits;
  };
  if (task.list != nullptr && index >= *task.list_size) return;
  const int64_t tile = task.list == nullptr ? index : task.list[index];
  const float* targets = task.targets + tile * kRingPositions;
  for (int i = lane; i < kRingPositions; i += 32) memory.targets[i] = bounded_target(targets[i]);
  __syncwarp();

  const int ring = index % Copies::kRings;
  const auto* const history =
      reinterpret_cast<const uint16_t*>(task.history + index / Copies::kRings * history_words);
  const int first_copy = task.stop > 0 ? task.stop : kStride;
  const uint32_t last = task.pins != nullptr ? task.pins[tile] : task.ends[tile];
  uint32_t edge = last;
  for (int step = task.steps; step > task.stop; step -= kStride) {
    const int before = step - kStride;
    const uint16_t* costs = history + int64_t{(before - first_copy) / kStride} * Copies::kWords * 2;
    if (task.fetch_ahead && lane == 0 && ring == 0) prefetch_copy(history, costs, Copies::kWords * 4);
    // The path is a string of bits: the ancestor, then the fresh bits of kStride states. It ends in `edge`.
    // A lane tries ancestors whose oldest bits end in its number. Paths that meet in an edge go on as one:
    // each step halves them bits times, first those of the lane.
    constexpr int kOldest = kFresh(0);
    constexpr int kOfLane = kOldest > 5 ? 1 << (kOldest - 5) : 1;
    // Of two paths the weights of all steps are loaded at once, rather than those of the better one when it
    // is known.
    constexpr bool kEarly = kOfLane <= 2;
    float sums[kOfLane];
    uint32_t strings[kOfLane];
    float weights[kEarly ? kStride : 1][kEarly ? kOfLane : 1];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const uint32_t oldest =
          (static_cast<uint32_t>(i) << 5 | static_cast<uint32_t>(lane)) & ((1U << kOldest) - 1);
      strings[i] = oldest << (16 - Copies::bits(0)) | edge;
      if constexpr (kEarly) {
#pragma unroll
        for (int j = 0; j < kStride; ++j) {
          weights[j][i] = weight_of_state(task.table, strings[i] >> kFresh(j + 1) & kStateMask);
        }
      }
      const uint32_t ancestor = strings[i] >> kOldest;
      sums[i] = 0;
      if (before > 0) {
        const int at = static_cast<int>(ancestor);
        sums[i] = __half2float(__ushort_as_half(costs[Copies::place(at, ring)]));
      } else if (task.pins != nullptr && ancestor != last) {
        sums[i] = INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kStride; ++i) {
      const float target = memory.targets[(task.first_position + before + i) % kRingPositions];
      // The bits behind the state, and those in which paths differ before and after the step.
      const int behind = kFresh(i + 1);
      const int differ_now = Copies::bits(0) + behind;
      const int differ_then = i + 1 < kStride ? Copies::bits(0) + kFresh(i + 2) : 0;
      const int now = differ_now > 5 ? 1 << (differ_now - 5) : 1;
      const int then = differ_then > 5 ? 1 << (differ_then - 5) : 1;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        if (j >= now) continue;
        float weight;
        if constexpr (kEarly) {
          weight = weights[i][j];
        } else {
          weight = weight_of_state(task.table, strings[j] >> behind & kStateMask);
        }
        const float d = target - weight;
        sums[j] = fmaf(d, d, sums[j]);
        if (j >= then && sums[j] < sums[j % then]) {
          sums[j % then] = sums[j];
          strings[j % then] = strings[j];
          if constexpr (kEarly) {
#pragma unroll
            for (int later = i + 1; later < kStride; ++later) weights[later][j % then] = weights[later][j];
          }
        }
      }
    }
    // Not negative: bits order as the numbers do.
    const uint32_t least = __float_as_uint(sums[0]);
    uint32_t string = strings[0];
    const uint32_t best = __reduce_min_sync(kAllLanes, least);
    string = __reduce_min_sync(kAllLanes, least == best ? string : 0xFFFFFFFFU);
#pragma unroll
    for (int i = 0; i < kStride; ++i) {
      if (lane == i) memory.states[before + i] = static_cast<uint16_t>(string >> kFresh(i + 1) & kStateMask);
    }
    edge = string >> kOldest;
  }
  __syncwarp();
  finish_walk(task, result, tile, edge, last, lane, memory);
}

}  // namespace quantloom::cuda
