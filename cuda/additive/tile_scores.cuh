// Scores by tensor cores: |c|^2 - 2 <c, u> of all entries c of a table for many targets u, of which each
// thread keeps the least in registers; then the best few again in float32.
//
// Entries are float16 as they stand. Targets are split into two float16 parts, so that an entry of up to 8
// elements and both parts of a target are one product of depth 16, onto the norm in float32: a score is off
// by about 2^-22 of its largest term. A thread keeps the least score of each 16 entries of which it holds
// scores; those of the best are scored once more, by the sums that decide.
#pragma once

#include <cuda_fp16.h>

#include "additive/code_walk.cuh"

namespace quantloom::cuda {

constexpr float kLargestFactor = 60000;  // that float16 holds
constexpr int kTileEntries = 8;
constexpr int kThreadEntries = 16;  // of kEntryTile, whose scores a thread holds

// sum = norms + a b
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         float2 norms) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%10,%11};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(norms.x), "f"(norms.y));
}
__device__ __forceinline__ void multiply_further(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  const __half2 pair = __halves2half2(__float2half_rn(low), __float2half_rn(high));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float high_part(float value) {
  return __half2float(__float2half_rn(value));
}

// kTiles: of 16 states, for each warp. kSteps: 1 for entries of up to 8 elements, 2 for more.
template <int kTiles, int kSteps, int kKept>
struct TileScorer {
  static constexpr int kWords = 4 * kSteps;  // of an entry

  static __device__ __forceinline__ float factor_of(float wanted, float scale, float unit) {
    return scale == 0 ? 0.0F : -2 * unit * (wanted / scale);
  }
  static __device__ __forceinline__ float worth_of(float scale, float unit) { return scale * scale / unit; }
  static __device__ __forceinline__ float square_of(float /*scale*/) { return 1; }

  // The operand of 16 states from `first` on.
  static __device__ __forceinline__ void load_targets(const WalkTask<float>& task, const WalkMemory& memory,
                                                      const WalkState<float>& state, int first, int states,
                                                      int live, uint32_t (&a)[kSteps][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int s = first + half * 8 + lane / 4;
      const bool active = s < states && s % task.beam < live;
#pragma unroll
      for (int part = 0; part < kSteps; ++part) {  // of 8 elements
        float value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int element = part * 8 + lane % 4 * 2 + i;
          value[i] = active && element < memory.dim ? state.factors[s * memory.dim + element] : 0.0F;
          value[i] = fminf(fmaxf(value[i], -kLargestFactor), kLargestFactor);
        }
        const float high[2] = {high_part(value[0]), high_part(value[1])};
        const uint32_t upper = half_pair(high[0], high[1]);
        const uint32_t lower = half_pair(value[0] - high[0], value[1] - high[1]);
        if constexpr (kSteps == 1) {
          a[0][half] = upper;
          a[0][2 + half] = lower;
        } else {
          a[0][2 * part + half] = upper;
          a[1][2 * part + half] = lower;
        }
      }
    }
  }

  // Keeps the least blocks of this warp's part of the entries.
  __device__ __forceinline__ void search(const WalkTask<float>& task, const WalkMemory& memory,
                                         const WalkState<float>& state, const ScoreTask<float>& scores,
                                         int book, int states, int live) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int row_parts = memory.states / (16 * kTiles);
    const int first = warp % row_parts * 16 * kTiles;
    const int split = warp / row_parts;
    if (split >= memory.splits) return;
    uint32_t a[kTiles][kSteps][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      load_targets(task, memory, state, first + 16 * t, states, live, a[t]);
    }
    Least<float, kKept> least[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      least[t][0].clear();
      least[t][1].clear();
    }
    const int blocks = static_cast<int>(scores.padded / kEntryTile);
    const uint32_t* const words = task.halves + book * scores.padded * kWords + lane / 4 * kWords + lane % 4;
    const float* const norms = scores.norms + lane % 4 * 2;
    constexpr int kTilesOfBlock = static_cast<int>(kEntryTile) / kTileEntries;
    for (int block = split; block < blocks; block += memory.splits) {
      float block_least[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) block_least[t][0] = block_least[t][1] = INFINITY;
#pragma unroll
      for (int tile = 0; tile < kTilesOfBlock; ++tile) {
        const int64_t entry = static_cast<int64_t>(block) * kEntryTile + tile * kTileEntries;
        const float2 norm = *reinterpret_cast<const float2*>(norms + entry);
        const uint32_t b0 = words[entry * kWords];
        const uint32_t b1 = kSteps == 1 ? b0 : words[entry * kWords + 4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float score[4];
          multiply(score, a[t][0], b0, b1, norm);
          if constexpr (kSteps == 2) multiply_further(score, a[t][1], b0, b1);
          block_least[t][0] = fminf(block_least[t][0], fminf(score[0], score[1]));
          block_least[t][1] = fminf(block_least[t][1], fminf(score[2], score[3]));
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        least[t][0].put(block_least[t][0], block);
        least[t][1].put(block_least[t][1], block);
      }
    }
    // The four threads of a state hold the scores of different entries.
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = ((first + t * 16 + half * 8 + lane / 4) * memory.splits + split) * kKept;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          float score = least[t][half].scores[0];
          const int own =
              least[t][half].numbers[0] == kNoCode ? kNoCode : least[t][half].numbers[0] * 4 + lane % 4;
          int place = own;
#pragma unroll
          for (int mask = 1; mask < 4; mask *= 2) {
            const float other = __shfl_xor_sync(kWholeWarp, score, mask);
            const int other_place = __shfl_xor_sync(kWholeWarp, place, mask);
            if (other < score || (other == score && other_place < place)) {
              score = other;
              place = other_place;
            }
          }
          if (place == own) least[t][half].drop_first();
          if (lane % 4 == 0) {
            state.kept_scores[at + i] = score;
            state.kept_places[at + i] = place;
          }
        }
      }
    }
  }

  // The order of a state's best candidates, by a warp.
  __device__ __forceinline__ void rank(const WalkMemory& memory, const WalkState<float>& state,
                                       const ScoreTask<float>& scores, int present, int s) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float* const factors = state.factors + s * memory.dim;
    float* const found_scores = state.scores + s * memory.beam;
    int* const found = state.found + s * memory.beam;
    const float base = score_of(scores, factors, 1.0F, present);
    const bool beyond = lane < memory.dim && !(fabsf(factors[lane]) <= kLargestFactor);
    if (__any_sync(kWholeWarp, beyond)) {
      score_all<float, kKept>(scores, factors, 1.0F, memory.beam, found_scores, found);
    } else {
      int best[kKept];
      int next = 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        float score = INFINITY;
        int place = kNoCode;
        if (lane < memory.splits && next < kKept) {
          const int at = (s * memory.splits + lane) * kKept + next;
          score = state.kept_scores[at];
          place = state.kept_places[at];
        }
        const int own = place;
        least_of_warp(score, place);
        if (own == place) ++next;
        best[i] = i < memory.beam ? place : kNoCode;
      }
      constexpr int kSlots = (kKept + 1) / 2;  // of 32 entries: those of two places
      float slot_scores[kSlots + 1];
      int slot_entries[kSlots + 1];
      bool seen = false;
#pragma unroll
      for (int m = 0; m < kSlots; ++m) {
        const int second = 2 * m + 1 < kKept ? best[2 * m + 1 < kKept ? 2 * m + 1 : 0] : kNoCode;
        const int place = lane < 16 ? best[2 * m] : second;
        const int64_t entry = static_cast<int64_t>(place / 4) * kEntryTile + lane % 16 / 2 * kTileEntries +
                              place % 4 * 2 + lane % 2;
        const bool real = place != kNoCode && entry < scores.entries;
        slot_scores[m] = real ? score_of(scores, factors, 1.0F, entry) : INFINITY;
        slot_entries[m] = real ? static_cast<int>(entry) : kNoCode;
        seen = seen || slot_entries[m] == present;
      }
      const bool missing = __ballot_sync(kWholeWarp, seen) == 0;
      slot_scores[kSlots] = missing && lane == 0 ? base : INFINITY;
      slot_entries[kSlots] = missing && lane == 0 ? present : kNoCode;
      for (int i = 0; i < memory.beam; ++i) {
        float score = INFINITY;
        int entry = kNoCode;
#pragma unroll
        for (int m = 0; m <= kSlots; ++m) {
          if (slot_scores[m] < score || (slot_scores[m] == score && slot_entries[m] < entry)) {
            score = slot_scores[m];
            entry = slot_entries[m];
          }
        }
        least_of_warp(score, entry);
#pragma unroll
        for (int m = 0; m <= kSlots; ++m) {
          if (slot_entries[m] == entry) slot_scores[m] = INFINITY, slot_entries[m] = kNoCode;
        }
        if (lane == 0) {
          found_scores[i] = score;
          found[i] = entry;
        }
      }
    }
    if (lane == 0) {
      state.bases[s] = base;
      if (memory.beam == 1 && !(found_scores[0] < base)) {
        found_scores[0] = base;
        found[0] = present;
      }
    }
  }

  __device__ __forceinline__ void score(const WalkTask<float>& task, const WalkMemory& memory,
                                        const WalkState<float>& state, const ScoreTask<float>& scores,
                                        const uint16_t* codes, int book, int states, int live) const {
    search(task, memory, state, scores, book, states, live);
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x / 32);
    for (int s = static_cast<int>(threadIdx.x / 32); s < states; s += warps) {
      if (s % task.beam < live) rank(memory, state, scores, codes[s * memory.run_codes], s);
    }
  }
};

}  // namespace quantloom::cuda
