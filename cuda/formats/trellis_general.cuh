// The way back through a search that copied its costs at every step, for all shapes: bits in halves, and two
// weights a step.
//
// Before step t, which takes b(t) fresh bits, a path is at an edge of 16 - b(t) bits: the newest bits of the
// state before it.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"
#include "formats/trellis_walk.cuh"

namespace quantloom::cuda {

// What a state before an edge is looked for with, on the way back.
struct StepBack {
  const uint16_t* table;
  const uint16_t* costs;  // of one ring, before the step; null at the run's first step, where they are 0
  const float* targets;
  int per_step;
  int fresh_bits;
  int next_bits;
  uint32_t edge;
  uint32_t only;     // the one edge before the first step that may be; kAnyEdge: all of them
  uint32_t rings;    // whose costs lie with those of this one
  uint32_t in_word;  // 1: a word has the costs of edges that differ in their newest bit, 0: of two rings

  static constexpr uint32_t kAnyEdge = 0xFFFFFFFFU;

  __device__ __forceinline__ float cost(uint32_t state) const {
    const uint32_t before = state >> fresh_bits;
    float cost = 0;
    if (costs != nullptr) {
      cost = __half2float(__ushort_as_half(costs[(before & ~in_word) * rings + (before & in_word)]));
    } else if (only != kAnyEdge && before != only) {
      cost = INFINITY;
    }
    return cost + state_error(table, per_step, state, targets);
  }
  // The best of the lane's states; all their loads are under way at once.
  template <int kStates>
  __device__ __forceinline__ void find(int lane, uint32_t& least, uint32_t& best_state) const {
    float found[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) found[i] = cost(state_of(lane, i));
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      // Not negative: bits order as the numbers do.
      const uint32_t bits = __float_as_uint(found[i]);
      if (bits < least) {
        least = bits;
        best_state = state_of(lane, i);
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t state_of(int lane, int i) const {
    return static_cast<uint32_t>(lane + 32 * i) << (16 - next_bits) | edge;
  }
};

// walk_back() for any shape.
__device__ inline void walk_back_general(const SearchTask& task, const TracebackResult& result,
                                         int64_t history_words, int index, int lane, PathMemory& memory) {
  const TrellisShape shape = task.shape;
  const int per_step = shape.weights_per_step;
  const int ring_steps = shape.steps();
  if (task.list != nullptr && index >= *task.list_size) return;
  const int64_t tile = task.list == nullptr ? index : task.list[index];
  const float* targets = task.targets + tile * kRingPositions;
  for (int i = lane; i < kRingPositions; i += 32) memory.targets[i] = bounded_target(targets[i]);
  __syncwarp();

  const int rings = task.group();
  const uint32_t in_word = task.on_chip ? 1 : 0;
  const auto* const history =
      reinterpret_cast<const uint16_t*>(task.history + index / rings * history_words) +
      (index % rings << in_word);
  const int first_copy = task.stop > 0 ? task.stop : 1;
  const int64_t copy_halves = task.copy_words() * rings;
  const uint32_t last = task.pins != nullptr ? task.pins[tile] : task.ends[tile];
  uint32_t edge = last;
  for (int step = task.steps - 1; step >= task.stop; --step) {
    const int position = (task.first_position + step) % ring_steps;
    const uint16_t* const costs = history + (step - first_copy) * copy_halves;
    if (task.fetch_ahead && lane == 0 && index % rings == 0) {
      prefetch_copy(history, costs, copy_halves * int64_t{sizeof(uint16_t)});
    }
    const int fresh_bits = shape.step_bits(position);
    const int next_bits = shape.step_bits((position + 1) % ring_steps);
    const StepBack back{task.table,
                        step > 0 ? costs : nullptr,
                        memory.targets + position * per_step,
                        per_step,
                        fresh_bits,
                        next_bits,
                        edge,
                        task.pins != nullptr ? last : StepBack::kAnyEdge,
                        static_cast<uint32_t>(rings),
                        in_word};
    uint32_t least = 0xFFFFFFFFU;
    uint32_t best_state = 0;
    switch (next_bits) {
      case 8:
        back.find<8>(lane, least, best_state);
        break;
      case 7:
        back.find<4>(lane, least, best_state);
        break;
      case 6:
        back.find<2>(lane, least, best_state);
        break;
      default:
        if (lane < 1 << next_bits) back.find<1>(lane, least, best_state);
    }
    const uint32_t best = __reduce_min_sync(kAllLanes, least);
    const uint32_t state = __reduce_min_sync(kAllLanes, least == best ? best_state : 0xFFFFFFFFU);
    if (lane == 0) memory.states[step] = static_cast<uint16_t>(state);
    edge = state >> fresh_bits;
  }
  __syncwarp();
  finish_walk(task, result, tile, edge, last, lane, memory);
}

}  // namespace quantloom::cuda
