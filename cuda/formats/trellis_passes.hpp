// The kernels of the trellis encoder: forward searches that keep copies of the costs of all edges, and the
// way back from the best end through those copies.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantloom/formats/trellis.hpp"

namespace quantloom::cuda {

constexpr int kRingPositions = 256;
constexpr int kLongestSearch = 2 * kRingPositions;

// Steps between copies of the costs: few enough that the way back can try all ancestors of an edge.
QUANTLOOM_TRELLIS int copy_stride(int bits) {
  return bits == 1 ? 8 : bits <= 3 ? 2 : 1;
}

// The same for bits in halves, bits and bits + 1 in turn: copies of every second step are those of even ones.
QUANTLOOM_TRELLIS int half_copy_stride(int bits) {
  return bits == 1 ? 4 : bits == 2 ? 2 : 1;
}

// Calls body.template operator()<bits>().
template <class Body>
void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
    default:
      return body.template operator()<8>();
  }
}

// A batch of rings and a run over their steps. All pointers are to memory of the device.
struct SearchTask {
  TrellisShape shape;                  // of 16 bits of state and 256 weights
  const float* targets = nullptr;      // [tiles, 256], in units of the codebook
  const uint16_t* table = nullptr;     // float16 weights of the 65536 states
  const int32_t* list = nullptr;       // tiles to search, or null: 0 ... count - 1
  const int32_t* list_size = nullptr;  // with a list: how many it has
  int count = 0;                       // tiles to search, with a list the most that it may have
  const uint16_t* pins = nullptr;      // [tiles], the edge at which a run begins and ends; null: any
  uint16_t* ends = nullptr;            // [tiles], written if a run may end anywhere: its best last edge
  uint32_t* history = nullptr;         // history_words() for each group of rings
  int first_position = 0;              // the ring's step at which the run begins
  int steps = 0;                       // at most kLongestSearch
  bool bulk = false;                   // 1 to 4 bits: copies of costs by the bulk engine (code of sm_90 on)
  bool on_chip = false;                // two weights a step: by trellis_state_pairs.cuh
  // A block for each ring: on_chip, and with one weight a step 1 to 4 whole bits.
  bool alone = false;
  int pairs = 0;  // two weights a step, not on_chip: pairs of rings in a block, 1, 2 or 4; 0: what suits
  bool fetch_ahead = false;  // on the way back, copies of costs come to the level-2 cache before their turn
  int stop = 0;              // the way back ends after that many steps from the beginning

  // One weight a step and whole bits, 1 to 8: the search that keeps the codebook in registers.
  QUANTLOOM_TRELLIS bool plain() const { return shape.weights_per_step == 1 && shape.half_bits % 2 == 0; }
  QUANTLOOM_TRELLIS int bits() const { return shape.half_bits / 2; }
  // Rings that share a block.
  QUANTLOOM_TRELLIS int group() const {
    if (shape.weights_per_step == 2) return on_chip && alone ? 1 : 2;
    return plain() && (bits() == 1 || (alone && bits() <= 4)) ? 1 : 2;
  }
  int stride() const {
    if (shape.weights_per_step == 2) return 1;
    return plain() ? copy_stride(bits()) : half_copy_stride(bits());
  }
  // Words of a copy of the costs of two rings.
  QUANTLOOM_TRELLIS int64_t copy_words() const {
    const int least_bits = shape.step_bits(0) < shape.step_bits(1) ? shape.step_bits(0) : shape.step_bits(1);
    return 65536 >> least_bits;
  }
  // Words of the copies of a group of rings: those of steps stop, stop + stride(), ... without 0 and `steps`.
  int64_t history_words() const {
    const int64_t copies = (steps - stop) / stride() - (stop == 0 ? 1 : 0);
    return copies * copy_words() / 2 * group();
  }
};

// What the way back leaves.
struct TracebackResult {
  uint16_t* seams = nullptr;   // [tiles], the edge at `stop`; or null, and then:
  uint32_t* words = nullptr;   // [tiles, shape.words()], the ring's bits
  float* errors = nullptr;     // [tiles] or null: the squared error of a ring
  uint16_t* states = nullptr;  // [tiles, shape.steps()] or null
  // If a run is longer than a ring: it closes where an edge comes back after a round. Tiles where none
  // does are listed, with the edge after the first round as their pin.
  int32_t* open = nullptr;
  int32_t* open_size = nullptr;
  uint16_t* open_pins = nullptr;
};

// Weights of the first pass to each side of the seam; of `best`, after the ring's first round.
constexpr int kFastSide = 64;
constexpr int kNormalSide = 128;
constexpr int kOverlap = 192;

// The pass that finds where rings close.
inline SearchTask first_pass(const TrellisShape& shape, TrellisSearch search) {
  SearchTask task;
  task.shape = shape;
  const int ring_steps = shape.steps();
  if (search == TrellisSearch::best) {
    task.steps = ring_steps + kOverlap / shape.weights_per_step;
    return task;
  }
  const int side = (search == TrellisSearch::fast ? kFastSide : kNormalSide) / shape.weights_per_step;
  task.first_position = ring_steps - side;
  task.steps = 2 * side;
  task.stop = side;
  return task;
}

// The pass around the whole ring, from an edge back to it.
inline SearchTask second_pass(const TrellisShape& shape) {
  SearchTask task;
  task.shape = shape;
  task.steps = shape.steps();
  return task;
}

// Chooses `on_chip`, `alone` and `fetch_ahead` for a task of `count` rings.
void plan_search(SearchTask& task, int processors, int shared_memory);
// Shared memory that a block of search_rings() needs.
int64_t search_memory(const SearchTask& task);
void search_rings(const SearchTask& task, int processors, cudaStream_t stream);
// The same for half bits, and for two weights a step on_chip.
int64_t pair_search_memory(const SearchTask& task);
void search_pairs(const SearchTask& task, int processors, cudaStream_t stream);
// And for two weights a step with less memory.
int64_t two_weights_search_memory(const SearchTask& task);
void search_two_weights(const SearchTask& task, int processors, cudaStream_t stream);
void trace_back(const SearchTask& task, const TracebackResult& result, cudaStream_t stream);

}  // namespace quantloom::cuda
