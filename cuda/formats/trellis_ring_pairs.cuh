// A step of the Viterbi search with the costs of two rings in a word, for two weights a state and for bits in
// halves, whose steps take turns. The weights of all states stay in the registers of a block, or of a cluster
// of blocks; where those do not suffice, one half lies in its shared memory.
//
// Before a step of kNow fresh bits a path is at an edge, the 16 - kNow newest bits of the state before it;
// after it, at one of 16 - kNext bits. Of the 16 bits of a state a thread has every value of the four oldest
// and of the 2 - log2(kBlocks) newest ones, whatever the bits of the step; the others are its own:
//
//   oldest 4 | slice, top part of the thread, part of the block, 6 bits of the thread | newest
//
// An edge of more than 4 bits comes in from states of several slices, which are neighbouring lanes.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"

namespace quantloom::cuda {

// Where the cost of an edge is: a bit is turned, lest slices meet in a bank. Runs of eight stay together.
QUANTLOOM_TRELLIS int pair_place(int edge) {
  return edge ^ ((edge >> 5 ^ edge >> 6) & 1) << 3;
}

// kMost: the more fresh bits of any two steps that follow each other.
template <int kWeights, int kMost, int kBlocks>
struct PairShape {
  static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4);
  static_assert(kWeights == 2 || kBlocks == 1);
  static constexpr int kBlockBits = kBlocks / 2;
  static constexpr int kLowBits = 2 - kBlockBits;
  static constexpr int kLows = 1 << kLowBits;
  static constexpr int kTops = 16;
  static constexpr int kSliceBits = kMost > 4 ? kMost - 4 : 0;
  // Two weights fill the registers of two blocks: of one block's, those of odd top bits are in its memory.
  static constexpr bool kTableInMemory = kWeights == 2 && kBlocks == 1;
  static constexpr int kMemoryFours = kTableInMemory ? kTops / 2 : 0;  // of words, for each thread
  static constexpr int kValueWords = kTops * kLows * kWeights / 2 / (kTableInMemory ? 2 : 1);
  static constexpr bool kExactTargets = kWeights == 1 && kMost >= 6;
  static constexpr int kTargetWords = kWeights == 2 || kExactTargets ? 2 : 1;

  // A state's bits without the oldest and the newest.
  static QUANTLOOM_TRELLIS int middle_of(int thread, int rank) {
    const int slice = thread & ((1 << kSliceBits) - 1);
    const int rest = thread >> kSliceBits;
    return slice << (12 - kSliceBits) | rest >> 6 << 8 | rank << (8 - kBlockBits) | (rest & 63) << kLowBits;
  }
};

// Of a step, as float16 in both halves' rings: the targets of two weights, or that of one weight and what
// float16 lacks.
struct PairTargets {
  uint32_t first;
  uint32_t second;
};

// The weights that a thread holds.
template <class Shape, int kWeights>
struct PairValues {
  uint32_t words[Shape::kValueWords];

  // memory: kMemoryFours runs of kSearchThreads fours, if the table is in memory.
  __device__ __forceinline__ void load(const uint16_t* table, int middle, int thread, uint4* memory) {
    const auto* const pairs = reinterpret_cast<const uint32_t*>(table);
#pragma unroll
    for (int top = 0; top < Shape::kTops; ++top) {
      const int state = top << 12 | middle;
      if constexpr (kWeights == 1) {
        words[2 * top] = pairs[state / 2];
        words[2 * top + 1] = pairs[state / 2 + 1];
      } else {
        if (Shape::kTableInMemory && top % 2 == 1) {
          memory[top / 2 * kSearchThreads + thread] = reinterpret_cast<const uint4*>(table)[state / 4];
          continue;
        }
        const int at = Shape::kTableInMemory ? top / 2 : top;
#pragma unroll
        for (int low = 0; low < Shape::kLows; ++low) words[at * Shape::kLows + low] = pairs[state + low];
      }
    }
  }
};

// The least costs that a thread finds: of edges in runs of kLows.
template <int kWeights, int kNow, int kNext, int kBlocks>
struct RingPairStep {
  using Shape = PairShape<kWeights, (kNow > kNext ? kNow : kNext), kBlocks>;
  static constexpr int kLows = Shape::kLows;
  static constexpr int kInputBits = kNext < 4 ? kNext : 4;  // of the oldest bits, those that the edge drops
  static constexpr int kInputs = 1 << kInputBits;
  static constexpr int kRuns = Shape::kTops / kInputs;
  static constexpr int kSharedBits = kNext > 4 ? kNext - 4 : 0;  // slices that share an edge
  static constexpr int kEdges = kStates >> kNext;
  // What is left of a run when those slices have divided it among them.
  static constexpr int kOwnBits = kSharedBits < Shape::kLowBits ? Shape::kLowBits - kSharedBits : 0;
  static constexpr int kOwn = 1 << kOwnBits;

  uint32_t least[kRuns][kLows];

  __device__ __forceinline__ void find(const PairValues<Shape, kWeights>& values, const uint4* memory,
                                       const uint32_t* costs, const PairTargets& targets, int middle,
                                       int thread) {
    const int place = pair_place(middle >> kNow);
    const uint32_t* const bases[2] = {costs + place, costs + (place ^ 8)};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int input = 0; input < kInputs; input += 2) {
        uint32_t found[2][kLows];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int top = (input + i) << (4 - kInputBits) | run;
          const int offset = top << (12 - kNow);
          const uint32_t* const before = bases[(offset >> 5 ^ offset >> 6) & 1] + offset;
          candidates(values, memory, before, targets, top, thread, found[i]);
        }
#pragma unroll
        for (int low = 0; low < kLows; ++low) {
          least[run][low] = input == 0 ? pair_min(found[0][low], found[1][low])
                                       : pair_min(least[run][low], found[0][low], found[1][low]);
        }
      }
    }
  }

  // After this the first kOwn costs of a run are those of edges from first_low() on. By whole warps.
  __device__ __forceinline__ void share(int thread) {
#pragma unroll
    for (int i = 0; i < kSharedBits; ++i) {
      const int lanes = 1 << (Shape::kSliceBits - 1 - i);
      const int half = kLows >> (i + 1);
      static_assert(kRuns == 1 || kSharedBits == 0);
      if (half > 0) {
        const bool upper = (thread & lanes) != 0;
#pragma unroll
        for (int low = 0; low < kLows / 2; ++low) {
          if (low >= half) continue;
          const uint32_t kept = upper ? least[0][low + half] : least[0][low];
          const uint32_t sent = upper ? least[0][low] : least[0][low + half];
          least[0][low] = pair_min(kept, __shfl_xor_sync(0xFFFFFFFFU, sent, lanes));
        }
      } else {
        least[0][0] = pair_min(least[0][0], __shfl_xor_sync(0xFFFFFFFFU, least[0][0], lanes));
      }
    }
  }
  static __device__ __forceinline__ int first_low(int thread) {
    int low = 0;
#pragma unroll
    for (int i = 0; i < kSharedBits && kLows >> (i + 1) > 0; ++i) {
      if ((thread >> (Shape::kSliceBits - 1 - i) & 1) != 0) low += kLows >> (i + 1);
    }
    return low;
  }
  // Whether a thread is the first of those that then have the same costs.
  static __device__ __forceinline__ bool writes(int thread) {
    constexpr int kSame = kSharedBits > Shape::kLowBits ? kSharedBits - Shape::kLowBits : 0;
    return (thread >> (Shape::kSliceBits - kSharedBits) & ((1 << kSame) - 1)) == 0;
  }
  // The first edge of a run, less the run's number << 12.
  static __device__ __forceinline__ int first_edge(int middle, int thread) {
    return (middle & (kEdges - 1)) + first_low(thread);
  }

  // The own costs of a run to where a whole number of them lies.
  __device__ __forceinline__ void write(int run, uint32_t* to) const {
    if constexpr (kOwn == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(least[run][0], least[run][1], least[run][2], least[run][3]);
    } else if constexpr (kOwn == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(least[run][0], least[run][1]);
    } else {
      *to = least[run][0];
    }
  }

 private:
  static __device__ __forceinline__ void candidates(const PairValues<Shape, kWeights>& values,
                                                    const uint4* memory, const uint32_t* before,
                                                    const PairTargets& targets, int top, int thread,
                                                    uint32_t (&found)[kLows]) {
    uint32_t states[kLows];  // two weights
    if constexpr (kWeights == 2) {
      if (Shape::kTableInMemory && top % 2 == 1) {
        const uint4 four = memory[top / 2 * kSearchThreads + thread];
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int low = 0; low < kLows; ++low) states[low] = words[low];
      } else {
        const int at = Shape::kTableInMemory ? top / 2 : top;
#pragma unroll
        for (int low = 0; low < kLows; ++low) states[low] = values.words[at * kLows + low];
      }
    }
    uint32_t cost = before[0];
#pragma unroll
    for (int low = 0; low < kLows; ++low) {
      if (low > 0 && low % (1 << kNow) == 0) cost = before[low >> kNow];
      if constexpr (kWeights == 2) {
        const uint32_t first = pair_subtract_low(targets.first, states[low]);
        const uint32_t second = pair_subtract_high(targets.second, states[low]);
        found[low] = pair_square_add(second, pair_square_add(first, cost));
      } else {
        const uint32_t word = values.words[2 * top + low / 2];
        uint32_t d =
            low % 2 == 0 ? pair_subtract_low(targets.first, word) : pair_subtract_high(targets.first, word);
        if constexpr (Shape::kExactTargets) d = pair_add(d, targets.second);
        found[low] = pair_square_add(d, cost);
      }
    }
  }
};

}  // namespace quantloom::cuda
