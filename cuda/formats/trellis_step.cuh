// One step of the Viterbi search of a trellis with 16 bits of state: where costs lie in shared memory and
// what each thread of a block does with them. The weights of all 65536 states stay in the registers of the
// block, 64 float16 numbers with each thread.
//
// An edge joins two states that follow each other: it is the 16 - bits newest bits of the first and the
// oldest of the second. State s leads from edge s >> bits to edge s mod kEdges. The states that lead from
// edges h * kGroups + g (h = 0 ... 2^bits - 1) to edges g * 2^bits + b are a group g of their own: each of
// its outputs is a minimum over each of its inputs.
#pragma once

#include <cstdint>

#include "formats/trellis_arithmetic.cuh"
#include "formats/trellis_passes.hpp"

namespace quantloom::cuda {

constexpr int kStates = 65536;
constexpr int kSearchThreads = 1024;
constexpr int kValueWords = kStates / 2 / kSearchThreads;  // registers with weights, two in each

// The costs of one ring with 1 bit fill 64 KiB, twice. Up to 4 bits there may be fewer, too, which leaves a
// step to half as many operations.
constexpr int most_rings(int bits) {
  return bits == 1 ? 1 : 2;
}

// A word holds two costs of one ring. The words of the kRingCount rings of a block lie side by side.
template <int kBits, int kRingCount = most_rings(kBits)>
struct SearchShape {
  static constexpr int kInputs = 1 << kBits;  // of a group, and its outputs
  static constexpr int kEdges = kStates >> kBits;
  static constexpr int kGroups = kEdges >> kBits;
  static constexpr int kRings = kRingCount;
  // Up to 4 bits a word has the same input of two groups, above two inputs of one group.
  static constexpr bool kPairsOfGroups = kBits <= 4;
  static_assert(kPairsOfGroups || kRings == 2);
  // A row per group of inputs, moved against the banks of shared memory.
  static constexpr int kRowWords = kInputs + 4;
  static constexpr int kCostWords = kPairsOfGroups ? kEdges / 2 * kRings : kGroups * kRowWords;
  // Each weight is as exact as its target: float16 is too coarse for the targets of long codes.
  static constexpr bool kExactTargets = kBits >= 6;

  // The place of a pair of edges, 2 unit and 2 unit + 1, among the pairs. The lanes of a warp write to the
  // outputs of groups that are far from each other, so one bit is turned.
  static __device__ __forceinline__ constexpr int place_of(int unit) {
    return kBits == 1 ? unit : unit ^ ((unit >> (6 - kRings) & 1) << (kBits - 1));
  }
  // The same in a copy of the costs in memory; of up to 4 bits they are copied as they lie.
  static constexpr int kCopyWords = kEdges / 2 * kRings;
  static __device__ __forceinline__ constexpr int copy_place(int edge, int ring) {
    return kPairsOfGroups ? cost_place(edge, ring) : ring * kEdges + edge;
  }
  // The place of the cost of an edge, in halves of words.
  static __device__ __forceinline__ constexpr int cost_place(int edge, int ring) {
    if constexpr (kPairsOfGroups) {
      return (place_of(edge >> 1) * kRings + ring) * 2 + (edge & 1);
    } else {
      const int input = edge / kGroups;
      const int row = edge % kGroups;
      return (row * kRowWords + (input >> 1) * kRings + ring) * 2 + (input & 1);
    }
  }
};

template <int kBits>
constexpr int kCopyStride = copy_stride(kBits);

// The search adds costs in float16: no target may be so far from all weights that the longest search
// overflows. 448 squares of 12 do not, even if all weights are zero.
constexpr float kFarthestTarget = 12;
__device__ __forceinline__ float bounded_target(float target) {
  return fminf(fmaxf(target, -kFarthestTarget), kFarthestTarget);
}

// Two halves in a register, by way of memory: else the compiler keeps them in two, of which there are too
// few.
__device__ __forceinline__ uint32_t one_word(uint16_t low, uint16_t high, uint32_t& staging) {
  auto* const halves = reinterpret_cast<volatile uint16_t*>(&staging);
  halves[0] = low;
  halves[1] = high;
  return *const_cast<volatile uint32_t*>(&staging);
}

struct Targets {
  uint32_t high[2];  // for each ring, in both halves
  uint32_t low[2];   // what float16 lacks, if kExactTargets
};

template <int kBits>
__device__ __forceinline__ uint32_t candidate(uint32_t value, uint32_t cost, const Targets& targets,
                                              int ring) {
  uint32_t d = pair_subtract(targets.high[ring], value);
  if constexpr (SearchShape<kBits>::kExactTargets) d = pair_add(d, targets.low[ring]);
  return pair_square_add(d, cost);
}

// 1 to 4 bits. A thread has kPairs pairs of groups, of each kOutputs outputs and every input.
template <int kBits, int kRingCount>
struct GroupPairStep {
  using Shape = SearchShape<kBits, kRingCount>;
  static constexpr int kRings = Shape::kRings;
  static constexpr int kInputs = Shape::kInputs;
  static constexpr int kThreadsOfPair = kBits <= 2 ? 1 : kBits == 3 ? 2 : 8;
  static constexpr int kOutputs = kInputs / kThreadsOfPair;
  static constexpr int kPairs = kValueWords / (kInputs * kOutputs);
  static constexpr int kPairStride = kSearchThreads / kThreadsOfPair;  // between the pairs of a thread
  static constexpr int kOutputWords = kOutputs / 2 * kRings;           // of one group

  // The thread's outputs as they are stored: of each pair of groups those of one group, then of the other.
  struct Outputs {
    uint32_t words[kPairs][2][kOutputWords];
  };

  static __device__ __forceinline__ int first_pair(int thread) { return thread / kThreadsOfPair; }
  static __device__ __forceinline__ int first_output(int thread) {
    return thread % kThreadsOfPair * kOutputs;
  }

  static __device__ __forceinline__ void load_values(const uint16_t* table, int thread, uint32_t& staging,
                                                     uint32_t (&values)[kValueWords]) {
#pragma unroll
    for (int i = 0; i < kValueWords; ++i) {
      const int output = first_output(thread) + i % kOutputs;
      const int input = i / kOutputs % kInputs;
      const int group = 2 * (first_pair(thread) + i / (kOutputs * kInputs) * kPairStride);
      const int state = (input * Shape::kGroups + group) << kBits | output;
      values[i] = one_word(table[state], table[state + kInputs], staging);
    }
  }

  // The least costs of the outputs of the thread's pair of groups i.
  static __device__ __forceinline__ void search_pair(const uint32_t* values, const Targets& targets,
                                                     const uint32_t* inputs,
                                                     uint32_t (&best)[kOutputs][kRings]) {
#pragma unroll
    for (int input = 0; input < kInputs; input += 2) {
      uint32_t costs[2][kRings];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t* from = inputs + (input + j) * (Shape::kGroups / 2) * kRings;
        if constexpr (kRings == 2) {
          const uint2 words = *reinterpret_cast<const uint2*>(from);
          costs[j][0] = words.x;
          costs[j][1] = words.y;
        } else {
          costs[j][0] = *from;
        }
      }
#pragma unroll
      for (int output = 0; output < kOutputs; ++output) {
#pragma unroll
        for (int ring = 0; ring < kRings; ++ring) {
          const uint32_t first =
              candidate<kBits>(values[input * kOutputs + output], costs[0][ring], targets, ring);
          const uint32_t second =
              candidate<kBits>(values[(input + 1) * kOutputs + output], costs[1][ring], targets, ring);
          best[output][ring] =
              input == 0 ? pair_min(first, second) : pair_min(best[output][ring], first, second);
        }
      }
    }
  }

  // Costs after a step, from those before it.
  static __device__ __forceinline__ void run(const uint32_t (&values)[kValueWords], const Targets& targets,
                                             const uint32_t* costs, int thread, Outputs& outputs) {
    const uint32_t* const inputs = costs + Shape::place_of(first_pair(thread)) * kRings;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      uint32_t best[kOutputs][kRings];
      search_pair(values + i * kInputs * kOutputs, targets, inputs + i * kPairStride * kRings, best);
#pragma unroll
      for (int output = 0; output < kOutputs; output += 2) {
#pragma unroll
        for (int ring = 0; ring < kRings; ++ring) {
          const int word = output / 2 * kRings + ring;
          outputs.words[i][0][word] = low_halves(best[output][ring], best[output + 1][ring]);
          outputs.words[i][1][word] = high_halves(best[output][ring], best[output + 1][ring]);
        }
      }
    }
  }

  static __device__ __forceinline__ void copy(const Outputs& outputs, int thread, uint32_t* to) {
    store(outputs, thread, to);
  }
  static __device__ __forceinline__ void store(const Outputs& outputs, int thread, uint32_t* costs) {
    const int unit = first_pair(thread) * kInputs + first_output(thread) / 2;
    uint32_t* const to[2] = {costs + Shape::place_of(unit) * kRings,
                             costs + Shape::place_of(unit + kInputs / 2) * kRings};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const uint32_t* words = outputs.words[i][group];
        uint32_t* at = to[group] + i * kPairStride * kInputs * kRings;
        if constexpr (kOutputWords == 4) {
          *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
        } else if constexpr (kOutputWords == 2) {
          *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
        } else {
          *at = words[0];
        }
      }
    }
  }
};

// 5 to 8 bits. A thread has kOutputs outputs of one group, and of their inputs every kParts-th four.
template <int kBits>
struct InputPairStep {
  using Shape = SearchShape<kBits>;
  static constexpr int kRings = Shape::kRings;
  static constexpr int kOutputs = kBits == 5 ? 2 : 1;
  static constexpr int kParts = kBits <= 6 ? 1 : kBits == 7 ? 2 : 4;  // threads that share an output
  static constexpr int kFours = kValueWords / 2 / kOutputs;           // of inputs, with a thread

  struct Outputs {
    uint32_t words[kOutputs];  // ring 0 in the low half, ring 1 in the high one
  };

  static __device__ __forceinline__ int first_edge(int thread) { return thread / kParts * kOutputs; }
  static __device__ __forceinline__ int first_four(int thread) { return thread % kParts; }

  static __device__ __forceinline__ void load_values(const uint16_t* table, int thread, uint32_t& staging,
                                                     uint32_t (&values)[kValueWords]) {
#pragma unroll
    for (int i = 0; i < kValueWords; ++i) {
      const int edge = first_edge(thread) + i / (2 * kFours);
      const int input = (i / 2 % kFours * kParts + first_four(thread)) * 4 + i % 2 * 2;
      values[i] =
          one_word(table[input * Shape::kEdges + edge], table[(input + 1) * Shape::kEdges + edge], staging);
    }
  }

  // Costs after a step, from those before it; the threads that share an output have yet to compare theirs.
  static __device__ __forceinline__ void run(const uint32_t (&values)[kValueWords], const Targets& targets,
                                             const uint32_t* costs, int thread, Outputs& outputs) {
    const uint32_t* const inputs =
        costs + (first_edge(thread) >> kBits) * Shape::kRowWords + first_four(thread) * 4;
    uint32_t best[kOutputs][kRings];
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const uint4 words = *reinterpret_cast<const uint4*>(inputs + four * kParts * 4);
      const uint32_t first[kRings] = {words.x, words.y};
      const uint32_t second[kRings] = {words.z, words.w};
#pragma unroll
      for (int output = 0; output < kOutputs; ++output) {
#pragma unroll
        for (int ring = 0; ring < kRings; ++ring) {
          const uint32_t* const pair = values + output * 2 * kFours + 2 * four;
          const uint32_t a = candidate<kBits>(pair[0], first[ring], targets, ring);
          const uint32_t b = candidate<kBits>(pair[1], second[ring], targets, ring);
          best[output][ring] = four == 0 ? pair_min(a, b) : pair_min(best[output][ring], a, b);
        }
      }
    }
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) {
      outputs.words[output] = pair_min(low_halves(best[output][0], best[output][1]),
                                       high_halves(best[output][0], best[output][1]));
    }
  }

  static __device__ __forceinline__ void store(const Outputs& outputs, int thread, uint32_t* costs) {
    write(outputs, thread, reinterpret_cast<uint16_t*>(costs),
          [](int edge, int ring) { return Shape::cost_place(edge, ring); });
  }
  static __device__ __forceinline__ void copy(const Outputs& outputs, int thread, uint32_t* to) {
    write(outputs, thread, reinterpret_cast<uint16_t*>(to),
          [](int edge, int ring) { return Shape::copy_place(edge, ring); });
  }

 private:
  // Of threads that share an output the first writes ring 0, the last ring 1.
  template <class Place>
  static __device__ __forceinline__ void write(const Outputs& outputs, int thread, uint16_t* to,
                                               Place place) {
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) {
      const int edge = first_edge(thread) + output;
      const uint32_t word = outputs.words[output];
      if (first_four(thread) == 0) to[place(edge, 0)] = static_cast<uint16_t>(word & 0xFFFFU);
      if (first_four(thread) == kParts - 1) to[place(edge, 1)] = static_cast<uint16_t>(word >> 16);
    }
  }
};

template <int kBits, int kRingCount>
struct StepOf {
  using Type = InputPairStep<kBits>;
};
template <int kBits, int kRingCount>
requires(SearchShape<kBits, kRingCount>::kPairsOfGroups) struct StepOf<kBits, kRingCount> {
  using Type = GroupPairStep<kBits, kRingCount>;
};
template <int kBits, int kRingCount = most_rings(kBits)>
using SearchStep = typename StepOf<kBits, kRingCount>::Type;

}  // namespace quantloom::cuda
