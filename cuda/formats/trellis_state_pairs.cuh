// A step of the Viterbi search for two weights a state, of kStepBits fresh bits (2 to 8), for one ring or
// two. Half of the weights stay in the registers of a block, half in its shared memory.
//
// A path is at an edge, the 16 - kStepBits newest bits of the state before a step. A word holds the costs of
// edges that differ in their newest bit, so those of states that differ in bit kStepBits; the words of two
// rings lie next to each other. Of the 16 bits of a state a thread has every value of the four oldest, of
// that bit and of the newest; the others are its own, of more than 4 fresh bits those after the oldest ones
// first: an edge comes in from states of several such slices, which are neighbouring lanes.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"

namespace quantloom::cuda {

template <int kStepBits, int kRingCount>
struct StatePairs {
  static constexpr int kRings = kRingCount;
  static constexpr int kWeights = 2;
  static constexpr int kTops = 16;
  static constexpr int kLows = 2;
  // With 8 bits both states of a pair lead to the same edge, and with them half of the slices.
  static constexpr bool kSameEdge = kStepBits == 8;
  static constexpr int kSliceBits = kStepBits <= 4 ? 0 : kSameEdge ? 3 : kStepBits - 4;
  static constexpr int kTargetWords = 2 * kRings;
  static constexpr int kTableFours = kTops / 2;  // with each thread, in shared memory
  static constexpr int kStride = 1;
  static constexpr int kEdges = kStates >> kStepBits;
  static constexpr int kCopyWords = kEdges / 2 * kRings;

  static QUANTLOOM_TRELLIS int cost_words(int /*parity*/) { return kCopyWords; }

  // The bits that are turned in the number of a word of costs, lest lanes meet in a bank.
  static QUANTLOOM_TRELLIS int turned(int word) {
    constexpr int kTurn = kRings == 2 && kStepBits <= 5 ? 4 : 3;
    return (word >> 5 & 1) << kTurn ^ (word >> 6 & 1) << 4;
  }
  static QUANTLOOM_TRELLIS int word_place(int word) { return word ^ turned(word); }
  // Of a cost, in halves of words.
  static QUANTLOOM_TRELLIS int cost_place(int edge, int ring) {
    return 2 * word_place((edge >> 1) * kRings + ring) + (edge & 1);
  }

  // A state's bits without those of which a thread has every value.
  static QUANTLOOM_TRELLIS int middle_of(int thread) {
    const int slice = thread & ((1 << kSliceBits) - 1);
    const int rest = thread >> kSliceBits;
    const int below = rest & ((1 << (kStepBits - 1)) - 1);
    return slice << (12 - kSliceBits) | rest >> (kStepBits - 1) << (kStepBits + 1) | below << 1;
  }

  static __device__ __forceinline__ void put_target(uint32_t* words, int ring, int weight, uint16_t high,
                                                    uint16_t /*low*/) {
    words[2 * ring + weight] = high * 0x10001U;
  }

  // The weights that a thread holds: of the two states of a pair the first weights, then the second ones; for
  // even top bits here, for odd ones in `memory`, where threads lie next to each other.
  struct Values {
    uint32_t words[kTops / 2][2 * kLows];

    __device__ __forceinline__ void load(const uint16_t* table, int thread, uint4* memory) {
      const auto* const states = reinterpret_cast<const uint32_t*>(table);
#pragma unroll
      for (int top = 0; top < kTops; ++top) {
        uint32_t pairs[2 * kLows];
#pragma unroll
        for (int low = 0; low < kLows; ++low) {
          const int state = top << 12 | middle_of(thread) | low;
          const uint32_t one = states[state];
          const uint32_t other = states[state | 1 << kStepBits];
          pairs[2 * low] = low_halves(one, other);
          pairs[2 * low + 1] = high_halves(one, other);
        }
        if (top % 2 == 1) {
          memory[top / 2 * kSearchThreads + thread] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 2 * kLows; ++i) words[top / 2][i] = pairs[i];
      }
    }
  };

  // The least costs that a thread finds.
  template <int kParity>
  struct Step {
    static constexpr int kInputBits =
        kStepBits < 4 ? kStepBits : 4;  // of the oldest bits, those that edges drop
    static constexpr int kInputs = 1 << kInputBits;
    static constexpr int kRuns = kTops / kInputs;
    static constexpr int kWords = (kSameEdge ? 1 : 2) * kRings;  // of a run
    static constexpr int kWordBits = kWords / 2;
    static constexpr int kOwn = kSliceBits < kWordBits ? kWords >> kSliceBits : 1;  // when slices have shared

    // Of edges that differ in the newest bit; the rings next to each other, then the edges with bit
    // kStepBits.
    uint32_t least[kRuns][kWords];

    __device__ __forceinline__ void find(const Values& values, const uint4* memory, const uint32_t* costs,
                                         const uint32_t* targets, int thread) {
      const int place = word_place((middle_of(thread) >> (kStepBits + 1)) * kRings);
      uint32_t wanted[kTargetWords];
#pragma unroll
      for (int i = 0; i < kTargetWords; ++i) wanted[i] = targets[i];
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        uint32_t best[kLows][kRings] = {};
#pragma unroll
        for (int input = 0; input < kInputs; input += 2) {
          uint32_t found[2][kLows][kRings];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int top = (input + i) << (4 - kInputBits) | run;
            candidates(values, memory, costs, wanted, place, top, thread, found[i]);
          }
#pragma unroll
          for (int low = 0; low < kLows; ++low) {
#pragma unroll
            for (int ring = 0; ring < kRings; ++ring) {
              const uint32_t one = found[0][low][ring];
              const uint32_t other = found[1][low][ring];
              best[low][ring] = input == 0 ? pair_min(one, other) : pair_min(best[low][ring], one, other);
            }
          }
        }
#pragma unroll
        for (int ring = 0; ring < kRings; ++ring) {
          const uint32_t without = low_halves(best[0][ring], best[1][ring]);
          const uint32_t with = high_halves(best[0][ring], best[1][ring]);
          if constexpr (kSameEdge) {
            least[run][ring] = pair_min(without, with);
          } else {
            least[run][ring] = without;
            least[run][kRings + ring] = with;
          }
        }
      }
      share(thread);
    }

    // Whether a thread is the first of those that have the same costs.
    static __device__ __forceinline__ bool writes(int thread) {
      constexpr int kSame = kSliceBits > kWordBits ? kSliceBits - kWordBits : 0;
      return (thread & ((1 << kSame) - 1)) == 0;
    }
    __device__ __forceinline__ void store(int thread, uint32_t* costs) const {
      write(thread, [costs](int word) { return costs + word_place(word); });
    }
    // To a copy in memory, in the order of the words.
    __device__ __forceinline__ void copy(int thread, uint32_t* to) const {
      write(thread, [to](int word) { return to + word; });
    }

   private:
    static __device__ __forceinline__ void candidates(const Values& values, const uint4* memory,
                                                      const uint32_t* costs,
                                                      const uint32_t (&targets)[kTargetWords], int place,
                                                      int top, int thread, uint32_t (&found)[kLows][kRings]) {
      uint32_t weights[2 * kLows];
      if (top % 2 == 1) {
        const uint4 four = memory[top / 2 * kSearchThreads + thread];
        weights[0] = four.x;
        weights[1] = four.y;
        weights[2] = four.z;
        weights[3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kLows; ++i) weights[i] = values.words[top / 2][i];
      }
      // The bits of `top` are none of those in `place`.
      const int offset = (top << (11 - kStepBits)) * kRings;
      const uint32_t* const at =
          turned(offset) == 0 ? costs + place + offset : costs + (place ^ word_place(offset));
      uint32_t before[kRings];
      if constexpr (kRings == 2) {
        const uint2 words = *reinterpret_cast<const uint2*>(at);
        before[0] = words.x;
        before[1] = words.y;
      } else {
        before[0] = *at;
      }
#pragma unroll
      for (int low = 0; low < kLows; ++low) {
#pragma unroll
        for (int ring = 0; ring < kRings; ++ring) {
          const uint32_t first = pair_subtract(targets[2 * ring], weights[2 * low]);
          const uint32_t second = pair_subtract(targets[2 * ring + 1], weights[2 * low + 1]);
          found[low][ring] = pair_square_add(second, pair_square_add(first, before[ring]));
        }
      }
    }

    // After this the first kOwn words are the thread's. By whole warps.
    __device__ __forceinline__ void share(int thread) {
      static_assert(kRuns == 1 || kSliceBits == 0);
#pragma unroll
      for (int i = 0; i < kSliceBits; ++i) {
        const int lanes = 1 << (kSliceBits - 1 - i);
        const int half = kWords >> (i + 1);
        const bool upper = (thread & lanes) != 0;
#pragma unroll
        for (int j = 0; j < kWords / 2; ++j) {
          if (j >= half) continue;
          const uint32_t kept = upper ? least[0][j + half] : least[0][j];
          const uint32_t sent = upper ? least[0][j] : least[0][j + half];
          least[0][j] = pair_min(kept, __shfl_xor_sync(0xFFFFFFFFU, sent, lanes));
        }
        if (half == 0) least[0][0] = pair_min(least[0][0], __shfl_xor_sync(0xFFFFFFFFU, least[0][0], lanes));
      }
    }
    // Where a word of a thread is: that of its first edge, and of the one with bit kStepBits.
    template <class Place>
    __device__ __forceinline__ void write(int thread, const Place& place) const {
      int word = ((middle_of(thread) & (kEdges - 1)) >> 1) * kRings;
#pragma unroll
      for (int i = 0; i < kSliceBits && kWords >> (i + 1) > 0; ++i) {
        if ((thread >> (kSliceBits - 1 - i) & 1) != 0) word += away(kWords >> (i + 1));
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const int first = word + (run << 11) * kRings;
        if constexpr (kOwn == 1) {
          *place(first) = least[run][0];
        } else if constexpr (kRings == 1) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) *place(first + away(j)) = least[run][j];
        } else {
#pragma unroll
          for (int j = 0; j < kOwn; j += 2) {
            *reinterpret_cast<uint2*>(place(first + away(j))) = make_uint2(least[run][j], least[run][j + 1]);
          }
        }
      }
    }
    // How far word j of a run is from its first.
    static QUANTLOOM_TRELLIS int away(int j) {
      return j % kRings + j / kRings * ((1 << (kStepBits - 1)) * kRings);
    }
  };
};

}  // namespace quantloom::cuda
