// Scores of small tables in float32: each thread has entries of its own, and scores them for one state after
// the other.
#pragma once

#include "additive/code_walk.cuh"

namespace quantloom::cuda {

constexpr int kEntryThreads = 256;
constexpr int kEntriesOfThread = 2;
constexpr int64_t kMostThreadEntries = int64_t{kEntryThreads} * kEntriesOfThread;

// A number that rises as the score does.
__device__ __forceinline__ uint32_t rising_bits(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
}

// kPadded: elements of an entry, at most.
template <int kPadded, int kKept>
struct ThreadScorer {
  static __device__ __forceinline__ float factor_of(float wanted, float scale, float /*unit*/) {
    return -2 * scale * wanted;
  }
  static __device__ __forceinline__ float worth_of(float /*scale*/, float /*unit*/) { return 1; }
  static __device__ __forceinline__ float square_of(float scale) { return scale * scale; }

  __device__ __forceinline__ Nothing prefetch(const WalkTask<float>& /*task*/, const WalkMemory& /*memory*/,
                                              const ScoreTask<float>& /*scores*/, int /*book*/) const {
    return {};
  }

  __device__ __forceinline__ void score(const WalkTask<float>& task, const WalkMemory& memory,
                                        const WalkState<float>& state, const ScoreTask<float>& scores,
                                        const uint16_t* codes, int /*book*/, int states, int live,
                                        Nothing /*first*/) const {
    const int tid = static_cast<int>(threadIdx.x);
    const int lane = tid % 32;
    const int warp = tid / 32;
    float entry[kEntriesOfThread][kPadded];
    float norm[kEntriesOfThread];
    float penalty[kEntriesOfThread];
#pragma unroll
    for (int j = 0; j < kEntriesOfThread; ++j) {
      const int number = tid + j * kEntryThreads;
      const bool real = number < scores.entries;
      norm[j] = real ? scores.norms[number] : 0.0F;
      penalty[j] = real && scores.penalties != nullptr ? scores.penalties[number] : 0.0F;
#pragma unroll
      for (int i = 0; i < kPadded; ++i) {
        entry[j][i] = real && i < memory.dim ? scores.elements[i * scores.padded + number] : 0.0F;
      }
    }
#pragma unroll 2
    for (int s = 0; s < states; ++s) {
      if (kKept > 1 && s % task.beam >= live) continue;
      float factor[kPadded];
      if (memory.dim == kPadded) {
#pragma unroll
        for (int i = 0; i < kPadded; i += 4) {
          *reinterpret_cast<float4*>(factor + i) =
              *reinterpret_cast<const float4*>(state.factors + s * kPadded + i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPadded; ++i) {
          factor[i] = i < memory.dim ? state.factors[s * memory.dim + i] : 0.0F;
        }
      }
      const int present = codes[s * memory.run_codes];
      float own[kEntriesOfThread];
#pragma unroll
      for (int j = 0; j < kEntriesOfThread; ++j) {
        const int number = tid + j * kEntryThreads;
        own[j] = INFINITY;
        if (number >= scores.entries) continue;
        float score = fmaf(state.squares[s], norm[j], penalty[j]);
#pragma unroll
        for (int i = 0; i < kPadded; ++i) score = fmaf(factor[i], entry[j][i], score);
        own[j] = score;
        if (number == present) state.bases[s] = score;
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i >= task.beam) break;
        const bool second = own[1] < own[0];
        const float mine = second ? own[1] : own[0];
        const uint32_t key = rising_bits(mine);
        const uint32_t least = __reduce_min_sync(kWholeWarp, key);
        if (lane == __ffs(static_cast<int>(__ballot_sync(kWholeWarp, key == least))) - 1) {
          const int at = (s * memory.splits + warp) * kKept + i;
          state.kept_scores[at] = mine;
          state.kept_places[at] = mine < INFINITY ? tid + (second ? kEntryThreads : 0) : kNoCode;
          own[0] = second ? own[0] : INFINITY;
          own[1] = second ? INFINITY : own[1];
        }
      }
    }
    __syncthreads();
    if constexpr (kKept == 1) {
      if (tid < states) merge_one(memory, state, codes[tid * memory.run_codes], tid);
    } else {
      for (int s = warp; s < states; s += kEntryThreads / 32) {
        if (s % task.beam < live) merge(memory, state, s);
      }
    }
  }

 private:
  static __device__ __forceinline__ void merge_one(const WalkMemory& memory, const WalkState<float>& state,
                                                   int present, int s) {
    float score = state.bases[s];
    int code = present;
    for (int split = 0; split < memory.splits; ++split) {
      const int at = s * memory.splits + split;
      if (state.kept_scores[at] < score) {
        score = state.kept_scores[at];
        code = state.kept_places[at];
      }
    }
    state.scores[s] = score;
    state.found[s] = code;
  }

  // By a warp: each lane has the candidates of one of the parts.
  static __device__ __forceinline__ void merge(const WalkMemory& memory, const WalkState<float>& state,
                                               int s) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    int next = 0;
    for (int i = 0; i < memory.beam; ++i) {
      float score = INFINITY;
      int code = kNoCode;
      if (lane < memory.splits && next < memory.beam) {
        const int at = (s * memory.splits + lane) * kKept + next;
        score = state.kept_scores[at];
        code = state.kept_places[at];
      }
      const int own = code;
      least_of_warp(score, code);
      if (own == code) ++next;
      if (lane == 0) {
        state.scores[s * memory.beam + i] = score;
        state.found[s * memory.beam + i] = code;
      }
    }
  }
};

}  // namespace quantloom::cuda
