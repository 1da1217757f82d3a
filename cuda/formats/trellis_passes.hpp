// The two kernels of the trellis encoder: forward searches that keep copies of the costs of all edges, and
// the way back from the best end through those copies.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantloom/formats/trellis.hpp"

namespace quantloom::cuda {

constexpr int kRingPositions = 256;
constexpr int kLongestSearch = 2 * kRingPositions;

// Steps between copies of the costs: few enough that the way back can try all ancestors of an edge.
constexpr int copy_stride(int bits) {
  return bits == 1 ? 8 : bits == 2 ? 4 : bits == 3 ? 2 : 1;
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

// A batch of rings and a run over their positions. All pointers are to memory of the device.
struct SearchTask {
  int bits = 0;                        // 1 ... 8
  const float* targets = nullptr;      // [tiles, 256], in units of the codebook
  const uint16_t* table = nullptr;     // float16 weights of the 65536 states
  const int32_t* list = nullptr;       // tiles to search, or null: 0 ... count - 1
  const int32_t* list_size = nullptr;  // with a list: how many it has
  int count = 0;                       // tiles to search, with a list the most that it may have
  const uint16_t* pins = nullptr;      // [tiles], the edge at which a run begins and ends; null: any
  uint16_t* ends = nullptr;            // [tiles], written if a run may end anywhere: its best last edge
  uint32_t* history = nullptr;         // history_words() for each group of rings
  int first_position = 0;
  int steps = 0;  // at most kLongestSearch
  int stop = 0;   // the way back ends after that many steps from the beginning

  // Of rings that share a block.
  int group() const { return bits == 1 ? 1 : 2; }
  // Words of the copies of a group of rings: those of steps stop, stop + copy_stride, ... without 0 and
  // `steps`.
  int64_t history_words() const {
    const int64_t copies = (steps - stop) / copy_stride(bits) - (stop == 0 ? 1 : 0);
    return copies * (int64_t{65536} >> bits) / 2 * group();
  }
};

// What the way back leaves.
struct TracebackResult {
  uint16_t* seams = nullptr;   // [tiles], the edge at `stop`; or null, and then:
  uint32_t* words = nullptr;   // [tiles, 8 bits], the ring's bits
  float* errors = nullptr;     // [tiles] or null: the squared error of a ring
  uint16_t* states = nullptr;  // [tiles, 256] or null
  // If a run is longer than a ring: it closes where an edge comes back after 256 steps. Tiles where none
  // does are listed, with the edge at step 256 as their pin.
  int32_t* open = nullptr;
  int32_t* open_size = nullptr;
  uint16_t* open_pins = nullptr;
};

// Steps of the first pass to each side of the seam; of `best`, after the ring's first round.
constexpr int kFastSide = 64;
constexpr int kNormalSide = 128;
constexpr int kOverlap = 192;

// The pass that finds where rings close.
inline SearchTask first_pass(int bits, TrellisSearch search) {
  SearchTask task;
  task.bits = bits;
  if (search == TrellisSearch::best) {
    task.steps = kRingPositions + kOverlap;
    return task;
  }
  const int side = search == TrellisSearch::fast ? kFastSide : kNormalSide;
  task.first_position = kRingPositions - side;
  task.steps = 2 * side;
  task.stop = side;
  return task;
}

// The pass around the whole ring, from an edge back to it.
inline SearchTask second_pass(int bits) {
  SearchTask task;
  task.bits = bits;
  task.steps = kRingPositions;
  return task;
}

// Shared memory that a block of search_rings() needs.
int search_memory(int bits);
void search_rings(const SearchTask& task, int processors, cudaStream_t stream);
void trace_back(const SearchTask& task, const TracebackResult& result, cudaStream_t stream);

}  // namespace quantloom::cuda
