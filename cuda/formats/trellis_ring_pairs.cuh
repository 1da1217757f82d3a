// A step of the Viterbi search for bits in halves, whose steps take turns: kEven fresh bits, then one more.
// Costs of two rings share a word, and the weights of all states stay in the registers of a block, whatever
// the step.
//
// Before a step of kNow fresh bits a path is at an edge, the 16 - kNow newest bits of the state before it;
// after it, at one of 16 - kNext bits. Of the 16 bits of a state a thread has every value of the four oldest
// and of the two newest ones; the others are its own, of more than 4 fresh bits those after the oldest ones
// first: an edge comes in from states of several such slices, which are neighbouring lanes.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"

namespace quantloom::cuda {

template <int kEven>
struct RingPairs {
  static constexpr int kRings = 2;
  static constexpr int kWeights = 1;
  static constexpr int kTops = 16;
  static constexpr int kLows = 4;
  static constexpr int kSliceBits = kEven >= 4 ? kEven - 3 : 0;
  static constexpr bool kExactTargets = kEven >= 5;
  static constexpr int kTargetWords = kExactTargets ? 2 : 1;
  static constexpr int kTableFours = 0;  // with each thread, in shared memory
  static constexpr int kStride = half_copy_stride(kEven);
  static constexpr int kCopyWords = kStates >> kEven;

  static QUANTLOOM_TRELLIS int cost_words(int parity) { return kStates >> (kEven + parity); }

  // Where the cost of an edge is: a bit is turned, lest slices meet in a bank. Runs of eight stay together.
  static QUANTLOOM_TRELLIS int word_place(int edge) { return edge ^ ((edge >> 5 ^ edge >> 6) & 1) << 3; }
  // In halves of words.
  static QUANTLOOM_TRELLIS int cost_place(int edge, int ring) { return 2 * word_place(edge) + ring; }

  // A state's bits without the oldest and the newest.
  static QUANTLOOM_TRELLIS int middle_of(int thread) {
    const int slice = thread & ((1 << kSliceBits) - 1);
    return slice << (12 - kSliceBits) | thread >> kSliceBits << 2;
  }

  // A target of a step and what float16 lacks, for one ring, among the words of the step.
  static __device__ __forceinline__ void put_target(uint32_t* words, int ring, int /*weight*/, uint16_t high,
                                                    uint16_t low) {
    reinterpret_cast<uint16_t*>(words)[ring] = high;
    if constexpr (kExactTargets) reinterpret_cast<uint16_t*>(words + 1)[ring] = low;
  }

  // The weights that a thread holds.
  struct Values {
    uint32_t words[kTops * kLows / 2];

    __device__ __forceinline__ void load(const uint16_t* table, int thread, uint4* /*memory*/) {
      const auto* const pairs = reinterpret_cast<const uint32_t*>(table);
#pragma unroll
      for (int top = 0; top < kTops; ++top) {
        const int state = top << 12 | middle_of(thread);
        words[2 * top] = pairs[state / 2];
        words[2 * top + 1] = pairs[state / 2 + 1];
      }
    }
  };

  // The least costs that a thread finds: of edges in runs of kLows. kParity: that of the step.
  template <int kParity>
  struct Step {
    static constexpr int kNow = kEven + kParity;
    static constexpr int kNext = kEven + 1 - kParity;
    static constexpr int kInputBits = kNext < 4 ? kNext : 4;  // of the oldest bits, those that the edge drops
    static constexpr int kInputs = 1 << kInputBits;
    static constexpr int kRuns = kTops / kInputs;
    static constexpr int kSharedBits = kNext > 4 ? kNext - 4 : 0;  // slices that share an edge
    static constexpr int kEdges = kStates >> kNext;
    // What is left of a run when those slices have divided it among them.
    static constexpr int kOwnBits = kSharedBits < 2 ? 2 - kSharedBits : 0;
    static constexpr int kOwn = 1 << kOwnBits;

    uint32_t least[kRuns][kLows];

    __device__ __forceinline__ void find(const Values& values, const uint4* /*memory*/, const uint32_t* costs,
                                         const uint32_t* targets, int thread) {
      const int place = word_place(middle_of(thread) >> kNow);
      const uint32_t* const bases[2] = {costs + place, costs + (place ^ 8)};
      const uint32_t high = targets[0];
      const uint32_t low = kExactTargets ? targets[1] : 0;
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
            candidates(values.words + 2 * top, before, high, low, found[i]);
          }
#pragma unroll
          for (int j = 0; j < kLows; ++j) {
            least[run][j] = input == 0 ? pair_min(found[0][j], found[1][j])
                                       : pair_min(least[run][j], found[0][j], found[1][j]);
          }
        }
      }
      share(thread);
    }

    // Whether a thread is the first of those that have the same costs.
    static __device__ __forceinline__ bool writes(int thread) {
      constexpr int kSame = kSharedBits > 2 ? kSharedBits - 2 : 0;
      return (thread >> (kSliceBits - kSharedBits) & ((1 << kSame) - 1)) == 0;
    }
    __device__ __forceinline__ void store(int thread, uint32_t* costs) const {
      const int place = word_place(first_edge(thread));
#pragma unroll
      for (int run = 0; run < kRuns; ++run) write(run, costs + place + (run << 12));
    }
    // To a copy in memory, in the order of the edges.
    __device__ __forceinline__ void copy(int thread, uint32_t* to) const {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) write(run, to + first_edge(thread) + (run << 12));
    }

   private:
    static __device__ __forceinline__ void candidates(const uint32_t* weights, const uint32_t* before,
                                                      uint32_t high, uint32_t lacking,
                                                      uint32_t (&found)[kLows]) {
      uint32_t cost = before[0];
#pragma unroll
      for (int j = 0; j < kLows; ++j) {
        if (j > 0 && j % (1 << kNow) == 0) cost = before[j >> kNow];
        uint32_t d =
            j % 2 == 0 ? pair_subtract_low(high, weights[j / 2]) : pair_subtract_high(high, weights[j / 2]);
        if constexpr (kExactTargets) d = pair_add(d, lacking);
        found[j] = pair_square_add(d, cost);
      }
    }

    // After this the first kOwn costs of a run are those of edges from first_edge() on. By whole warps.
    __device__ __forceinline__ void share(int thread) {
      static_assert(kRuns == 1 || kSharedBits == 0);
#pragma unroll
      for (int i = 0; i < kSharedBits; ++i) {
        const int lanes = 1 << (kSliceBits - 1 - i);
        const int half = kLows >> (i + 1);
        const bool upper = (thread & lanes) != 0;
#pragma unroll
        for (int j = 0; j < kLows / 2; ++j) {
          if (j >= half) continue;
          const uint32_t kept = upper ? least[0][j + half] : least[0][j];
          const uint32_t sent = upper ? least[0][j] : least[0][j + half];
          least[0][j] = pair_min(kept, __shfl_xor_sync(0xFFFFFFFFU, sent, lanes));
        }
        if (half == 0) least[0][0] = pair_min(least[0][0], __shfl_xor_sync(0xFFFFFFFFU, least[0][0], lanes));
      }
    }
    static __device__ __forceinline__ int first_edge(int thread) {
      int edge = middle_of(thread) & (kEdges - 1);
#pragma unroll
      for (int i = 0; i < kSharedBits && kLows >> (i + 1) > 0; ++i) {
        if ((thread >> (kSliceBits - 1 - i) & 1) != 0) edge += kLows >> (i + 1);
      }
      return edge;
    }
    __device__ __forceinline__ void write(int run, uint32_t* to) const {
      if constexpr (kOwn == 4) {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(least[run][0], least[run][1], least[run][2], least[run][3]);
      } else if constexpr (kOwn == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(least[run][0], least[run][1]);
      } else {
        *to = least[run][0];
      }
    }
  };
};

}  // namespace quantloom::cuda
