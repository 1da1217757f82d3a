// Scores by tensor cores: |c|^2 - 2 <c, u> of all entries c of a table for many targets u, of which each
// thread keeps the least in registers; then the best few again in float32.
//
// Entries are float16 as they stand. Targets are split into two float16 parts, so that an entry of up to 8
// elements and both parts of a target are one product of depth 16; the norm is added in float32: a score is
// off by about 2^-22 of its largest term. A thread keeps the least score of each 16 entries of which it holds
// scores; those of the best are scored once more, by the sums that decide.
#pragma once

#include <cuda_fp16.h>

#include "additive/code_walk.cuh"

namespace quantloom::cuda {

constexpr float kLargestFactor = 60000;  // that float16 holds
constexpr int kTileEntries = 8;
constexpr int kThreadEntries = 16;  // of kEntryTile, whose scores a thread holds

// sum = a b
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0F));
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

  // The operand of 16 states from `first` on, of which those below `states` count.
  static __device__ __forceinline__ void load_targets(const WalkMemory& memory, const float* factors,
                                                      int first, int states, int live,
                                                      uint32_t (&a)[kSteps][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int s = first + half * 8 + lane / 4;
      const bool active = s < states && s % memory.beam < live;
#pragma unroll
      for (int part = 0; part < kSteps; ++part) {  // of 8 elements
        float value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int element = part * 8 + lane % 4 * 2 + i;
          value[i] = active && element < memory.dim ? factors[s * memory.dim + element] : 0.0F;
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

  static constexpr int kTilesOfBlock = static_cast<int>(kEntryTile) / kTileEntries;

  // A thread's share of kEntryTile entries and their norms.
  struct Entries {
    uint32_t words[kTilesOfBlock][kSteps];
    float2 norms[kTilesOfBlock];

    __device__ __forceinline__ void load(const uint32_t* from, const float* norm, int block) {
#pragma unroll
      for (int tile = 0; tile < kTilesOfBlock; ++tile) {
        const int64_t entry = static_cast<int64_t>(block) * kEntryTile + tile * kTileEntries;
        norms[tile] = *reinterpret_cast<const float2*>(norm + entry);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) words[tile][step] = from[entry * kWords + 4 * step];
      }
    }
  };

  static __device__ __forceinline__ const uint32_t* words_of(const WalkTask<float>& task,
                                                             const ScoreTask<float>& scores, int book) {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    return task.halves + book * scores.padded * kWords + lane / 4 * kWords + lane % 4;
  }
  static __device__ __forceinline__ const float* norms_of(const ScoreTask<float>& scores) {
    return scores.norms + threadIdx.x % 4 * 2;
  }

  // What a thread looks at first; it needs no targets.
  __device__ __forceinline__ Entries prefetch(const WalkTask<float>& task, const WalkMemory& memory,
                                              const ScoreTask<float>& scores, int book) const {
    Entries entries;
    const auto split = static_cast<int>(threadIdx.x / 32);
    if (split < memory.splits) {
      entries.load(words_of(task, scores, book), norms_of(scores),
                   min(split, static_cast<int>(scores.padded / kEntryTile) - 1));
    }
    return entries;
  }

  // Keeps the least blocks of this warp's part of the entries.
  __device__ __forceinline__ void search(const WalkTask<float>& task, const WalkMemory& memory,
                                         const WalkState<float>& state, const ScoreTask<float>& scores,
                                         int book, int live, Entries next) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int split = static_cast<int>(threadIdx.x / 32);
    if (split >= memory.splits) return;
    uint32_t a[kTiles][kSteps][4];
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * (memory.states / memory.beam);
    const auto rows = static_cast<int>(
        min(max(task.count - first_row, int64_t{0}), static_cast<int64_t>(memory.states / memory.beam)));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      load_targets(memory, state.factors, t * 16, rows * memory.beam, live, a[t]);
    }
    Least<float, kKept> least[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      least[t][0].clear();
      least[t][1].clear();
    }
    const int blocks = static_cast<int>(scores.padded / kEntryTile);
    const uint32_t* const words = words_of(task, scores, book);
    const float* const norms = norms_of(scores);
    for (int block = split; block < blocks; block += memory.splits) {
      const Entries entries = next;
      next.load(words, norms, min(block + memory.splits, blocks - 1));
      float block_least[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) block_least[t][0] = block_least[t][1] = INFINITY;
#pragma unroll
      for (int tile = 0; tile < kTilesOfBlock; ++tile) {
        const float2 norm = entries.norms[tile];
        const uint32_t b0 = entries.words[tile][0];
        const uint32_t b1 = entries.words[tile][kSteps - 1];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float score[4];
          multiply(score, a[t][0], b0, b1);
          if constexpr (kSteps == 2) multiply_further(score, a[t][1], b0, b1);
          // Not the products' accumulators: each product would copy them.
          block_least[t][0] = fminf(block_least[t][0], fminf(score[0] + norm.x, score[1] + norm.y));
          block_least[t][1] = fminf(block_least[t][1], fminf(score[2] + norm.x, score[3] + norm.y));
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
        const int s = t * 16 + half * 8 + lane / 4;
        const int at = (s * memory.splits + split) * kKept;
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

  // The least of 16 lanes.
  static __device__ __forceinline__ void least_of_half(float& score, int& number) {
#pragma unroll
    for (int mask = 1; mask < kThreadEntries; mask *= 2) {
      const float other_score = __shfl_xor_sync(kWholeWarp, score, mask);
      const int other_number = __shfl_xor_sync(kWholeWarp, number, mask);
      if (other_score < score || (other_score == score && other_number < number)) {
        score = other_score;
        number = other_number;
      }
    }
  }

  // Whether the best candidate of a state is better than the present code, by half a warp.
  __device__ __forceinline__ void rank_one(const WalkMemory& memory, const WalkState<float>& state,
                                           const ScoreTask<float>& scores, int present, int s,
                                           bool real) const {
    const int lane = static_cast<int>(threadIdx.x % kThreadEntries);
    const float* const factors = state.factors + s * memory.dim;
    float score = INFINITY;
    int place = kNoCode;
    if (lane < memory.splits) {
      score = state.kept_scores[s * memory.splits + lane];
      place = state.kept_places[s * memory.splits + lane];
    }
    least_of_half(score, place);
    const int64_t candidate =
        static_cast<int64_t>(place / 4) * kEntryTile + lane / 2 * kTileEntries + place % 4 * 2 + lane % 2;
    const bool found = place != kNoCode && candidate < scores.entries;
    const float base = score_of(scores, factors, 1.0F, present);
    score = found ? score_of(scores, factors, 1.0F, candidate) : INFINITY;
    int code = found ? static_cast<int>(candidate) : kNoCode;
    least_of_half(score, code);
    const bool beyond = lane < memory.dim && !(fabsf(factors[lane]) <= kLargestFactor);
    unsigned any = __ballot_sync(kWholeWarp, beyond && real);
    if (lane == 0 && real) {
      state.bases[s] = base;
      state.scores[s] = score < base ? score : base;
      state.found[s] = score < base ? code : present;
    }
    // Where float16 does not hold the factors, the whole warp looks at all entries.
    while (any != 0) {
      const int half = __ffs(static_cast<int>(any)) - 1 < kThreadEntries ? 0 : 1;
      any &= half == 0 ? 0xffff0000U : 0U;
      const int own = __shfl_sync(kWholeWarp, s, half * kThreadEntries);
      const float own_base = __shfl_sync(kWholeWarp, base, half * kThreadEntries);
      const int own_code = __shfl_sync(kWholeWarp, present, half * kThreadEntries);
      __syncwarp();  // what the other half of the warp has written is overwritten
      score_all<float, 1>(scores, state.factors + own * memory.dim, 1.0F, 1, state.scores + own,
                          state.found + own);
      if (threadIdx.x % 32 == 0 && !(state.scores[own] < own_base)) {
        state.scores[own] = own_base;
        state.found[own] = own_code;
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
                                        const uint16_t* codes, int book, int states, int live,
                                        const Entries& first) const {
    search(task, memory, state, scores, book, live, first);
    __syncthreads();
    if constexpr (kKept == 1) {
      for (int s = static_cast<int>(threadIdx.x / kThreadEntries); s < memory.states;
           s += static_cast<int>(blockDim.x / kThreadEntries)) {
        rank_one(memory, state, scores, s < states ? codes[s * memory.run_codes] : 0,
                 max(min(s, states - 1), 0), s < states);
      }
    } else {
      const int warps = static_cast<int>(blockDim.x / 32);
      for (int s = static_cast<int>(threadIdx.x / 32); s < states; s += warps) {
        if (s % task.beam < live) rank(memory, state, scores, codes[s * memory.run_codes], s);
      }
    }
  }
};

}  // namespace quantloom::cuda
