// The walk along a run of blocks, by thread blocks that own their rows: from one block to the next nothing
// leaves shared memory.
#pragma once

#include <cuda_fp16.h>

#include "additive/code_walk.hpp"
#include "additive/split_products.hpp"
#include "common/shared_memory.cuh"

namespace quantloom::cuda {

constexpr unsigned kWholeWarp = 0xffffffffU;
constexpr int kNoCode = 0x7fffffff;

// Where the state of a thread block lies in its shared memory. A state is a hypothesis of a group of rows;
// those of a group of rows follow each other.
struct WalkMemory {
  int states;
  int width;  // columns of a run
  int row;    // values of a state's products: out_group * width
  int dim;
  int run_codes;  // of a state
  int beam;
  int splits;  // parts that the entries of a table are searched in, of whose best candidates are kept:
  int kept;    // so many of each

  __host__ __device__ int sides() const { return beam > 1 ? 2 : 1; }
  __host__ __device__ int64_t product_values() const { return static_cast<int64_t>(sides()) * states * row; }
  template <class Real>
  int64_t bytes() const;
};

template <class Real>
struct WalkState {
  double* losses;      // [sides][states]
  Real* h;             // [width][width]
  Real* products;      // [sides][states][row]
  Real* factors;       // [states][dim]: of a code's entry in its score
  Real* changes;       // [states][dim]
  Real* scales;        // [states]: of the present block
  Real* worth;         // [states]: what a score of 1 is worth as a loss
  Real* bases;         // [states]: the score of the present code
  Real* squares;       // [states]: of a norm in a score
  Real* scores;        // [states][beam]
  int* found;          // [states][beam]
  int* origins;        // [sides][states]
  int* parents;        // [states]
  int* chosen;         // [states]
  float* kept_scores;  // [states][splits][kept]
  int* kept_places;
  uint16_t* codes;  // [sides][states][run_codes]
  const void* end;

  __host__ __device__ WalkState(const WalkMemory& m, void* memory) {
    losses = static_cast<double*>(memory);
    factors = reinterpret_cast<Real*>(losses + m.sides() * m.states);  // at a multiple of 16 bytes
    changes = factors + m.states * m.dim;
    h = changes + m.states * m.dim;
    products = h + m.width * m.width;
    scales = products + m.product_values();
    worth = scales + m.states;
    bases = worth + m.states;
    squares = bases + m.states;
    scores = squares + m.states;
    found = reinterpret_cast<int*>(scores + m.states * m.beam);
    origins = found + m.states * m.beam;
    parents = origins + m.sides() * m.states;
    chosen = parents + m.states;
    kept_scores = reinterpret_cast<float*>(chosen + m.states);
    kept_places = reinterpret_cast<int*>(kept_scores + m.states * m.splits * m.kept);
    codes = reinterpret_cast<uint16_t*>(kept_places + m.states * m.splits * m.kept);
    end = codes + m.sides() * m.states * m.run_codes;
  }
};

template <class Real>
int64_t WalkMemory::bytes() const {
  constexpr uintptr_t kAnywhere = 4096;  // nothing is read there
  const WalkState<Real> state(*this, reinterpret_cast<void*>(kAnywhere));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(state.end) - kAnywhere) + 16;
}

// The least of all lanes' scores; of equal ones that of the lowest number.
template <class Real>
__device__ __forceinline__ void least_of_warp(Real& score, int& number) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const Real other_score = __shfl_xor_sync(kWholeWarp, score, mask);
    const int other_number = __shfl_xor_sync(kWholeWarp, number, mask);
    if (other_score < score || (other_score == score && other_number < number)) {
      score = other_score;
      number = other_number;
    }
  }
}

// The least few of what is put in; of equal ones those that came first.
template <class Real, int kKept>
struct Least {
  Real scores[kKept];
  int numbers[kKept];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      scores[i] = static_cast<Real>(INFINITY);
      numbers[i] = kNoCode;
    }
  }
  __device__ __forceinline__ void put(Real score, int number) {
    if (!(score < scores[kKept - 1])) return;
    scores[kKept - 1] = score;
    numbers[kKept - 1] = number;
#pragma unroll
    for (int i = kKept - 1; i > 0; --i) {
      if (!(scores[i] < scores[i - 1])) break;
      const Real lower = scores[i];
      scores[i] = scores[i - 1];
      scores[i - 1] = lower;
      const int moved = numbers[i];
      numbers[i] = numbers[i - 1];
      numbers[i - 1] = moved;
    }
  }
  __device__ __forceinline__ void drop_first() {
#pragma unroll
    for (int i = 0; i + 1 < kKept; ++i) {
      scores[i] = scores[i + 1];
      numbers[i] = numbers[i + 1];
    }
    scores[kKept - 1] = static_cast<Real>(INFINITY);
    numbers[kKept - 1] = kNoCode;
  }
};

// Scores of one table's entries for the states of a thread block.
template <class Real>
struct ScoreTask {
  const Real* elements;   // [dim][padded]
  const Real* norms;      // [padded]
  const Real* penalties;  // [padded], or null
  int64_t entries;
  int64_t padded;
  int dim;
};

template <class Real>
__device__ __forceinline__ Real score_of(const ScoreTask<Real>& task, const Real* factors, Real square,
                                         int64_t entry) {
  Real score = square * task.norms[entry];
  if (task.penalties != nullptr) score += task.penalties[entry];
#pragma unroll 8
  for (int i = 0; i < task.dim; ++i) score = fma(factors[i], task.elements[i * task.padded + entry], score);
  return score;
}

// A warp scores all entries for one state.
template <class Real, int kKept>
__device__ void score_all(const ScoreTask<Real>& task, const Real* factors, Real square, int beam,
                          Real* scores, int* found) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Least<Real, kKept> least;
  least.clear();
  for (int64_t entry = lane; entry < task.entries; entry += 32) {
    least.put(score_of(task, factors, square, entry), static_cast<int>(entry));
  }
  for (int i = 0; i < beam; ++i) {
    Real score = least.scores[0];
    int code = least.numbers[0];
    least_of_warp(score, code);
    if (code == least.numbers[0]) least.drop_first();
    if (lane == 0) {
      scores[i] = score;
      found[i] = code;
    }
  }
}

template <class Real>
__device__ __forceinline__ Real error_at(const WalkTask<Real>& task, int64_t at) {
  return sizeof(Real) == 4 ? task.errors[at] + task.errors_low[at] : task.errors[at];
}
template <class Real>
__device__ __forceinline__ void store_error(const WalkTask<Real>& task, int64_t at, Real error) {
  if constexpr (sizeof(Real) == 4) {
    task.errors[at] = tf32_part(error);
    task.errors_low[at] = error - tf32_part(error);
  } else {
    task.errors[at] = error;
  }
}

// What scorers without anything to load beforehand have loaded.
struct Nothing {};

// The thread block's way along its run. Scorer: what fills scores, found and bases.
template <class Real, class Scorer>
__device__ void walk(const WalkTask<Real>& task, const WalkMemory& memory, const Scorer& scorer) {
  const WalkState<Real> state(memory, dynamic_shared_memory<double>());
  const int tid = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int beam = task.beam;
  const int g = task.in_group;
  const int dim = memory.dim;
  const int width = memory.width;
  const int run_codes = memory.run_codes;
  const int rows_here = memory.states / beam;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows_here;
  const int rows =
      static_cast<int>(min(static_cast<int64_t>(rows_here), max(task.count - first_row, int64_t{0})));
  const int states = rows * beam;
  const int64_t first_column = task.first_block * g;
  const int64_t row_codes = task.blocks * task.codebooks;
  const auto group_of = [&](int s) {
    const int64_t at = first_row + s / beam;
    return task.rows == nullptr ? at : static_cast<int64_t>(task.rows[at]);
  };
  // Of arrays [hypothesis][group of rows].
  const auto place_of = [&](int s) { return (s % beam) * task.count + first_row + s / beam; };

  for (int i = tid; i < width * width; i += threads) {
    state.h[i] = task.h[(first_column + i / width) * task.columns + first_column + i % width];
  }
  for (int i = tid; i < states * memory.row; i += threads) {
    const int s = i / memory.row;
    if (s % beam >= task.live) continue;
    const int64_t row = place_of(s) * task.out_group + i % memory.row / width;
    state.products[i] = task.products[row * task.product_stride + i % width];
  }
  for (int i = tid; i < states * run_codes; i += threads) {
    const int s = i / run_codes;
    state.codes[i] =
        task.start[(first_row + s / beam) * row_codes + task.first_block * task.codebooks + i % run_codes];
  }
  for (int s = tid; s < states; s += threads) {
    state.losses[s] = s % beam < task.live ? task.losses[place_of(s)] : 0.0;
    state.origins[s] = s % beam;
  }
  __syncthreads();

  int side = 0;
  int live = task.live;
  for (int block = 0; block < task.run_blocks; ++block) {
    const int64_t position = task.first_block + block;
    const int64_t scale_column = task.block_order[position] * static_cast<int64_t>(g) / task.scale_columns;
    const int column = block * g;
    const Real unit = task.units[block];
    if (block == 0 || task.scale_count > 1) {
      for (int s = tid; s < states; s += threads) {
        state.scales[s] = task.scales[group_of(s) * task.scale_count + scale_column];
      }
      __syncthreads();
    }
    for (int turn = 0; turn < task.codebooks; ++turn) {
      const int book = task.table_order[position * task.codebooks + turn];
      const Real* const table = task.tables + book * task.entries * dim;
      const ScoreTask<Real> scores{task.elements + book * dim * task.padded,
                                   task.norms + (block * task.codebooks + book) * task.padded,
                                   task.penalties == nullptr ? nullptr : task.penalties + book * task.padded,
                                   task.entries,
                                   task.padded,
                                   dim};
      Real* const products = state.products + side * memory.states * memory.row;
      uint16_t* const codes = state.codes + side * memory.states * run_codes;
      double* const losses = state.losses + side * memory.states;

      const auto first = scorer.prefetch(task, memory, scores, book);
      // What is wanted of this code: the product without the present one's share.
      for (int i = tid; i < states * dim; i += threads) {
        const int s = i / dim;
        const int a = i % dim / g;
        const int c = i % g;
        if (s % beam >= live) continue;
        const Real factor = state.scales[s];
        const Real* const own = table + codes[s * run_codes + block * task.codebooks + book] * dim + a * g;
        Real target = 0;
        for (int j = 0; j < g; ++j) target = fma(own[j], state.h[(column + j) * width + column + c], target);
        const Real wanted = fma(factor, target, products[s * memory.row + a * width + column + c]);
        state.factors[i] = Scorer::factor_of(wanted, factor, unit);
        if (i % dim == 0) {
          state.worth[s] = Scorer::worth_of(factor, unit);
          state.squares[s] = Scorer::square_of(factor);
        }
      }
      __syncthreads();
      scorer.score(task, memory, state, scores, codes + block * task.codebooks + book, book, states, live,
                   first);
      __syncthreads();

      // The best candidates of each group of rows, of all its hypotheses.
      double* const new_losses = state.losses + (memory.sides() - 1 - side) * memory.states;
      int* const new_origins = state.origins + (memory.sides() - 1 - side) * memory.states;
      const int* const origins = state.origins + side * memory.states;
      if (beam == 1) {
        for (int s = tid; s < states; s += threads) {
          state.parents[s] = s;
          state.chosen[s] = state.found[s];
        }
      } else {
        const int lane = tid % 32;
        for (int row = tid / 32; row < rows; row += threads / 32) {
          const int own = row * beam + lane;
          int next = 0;
          for (int i = 0; i < beam; ++i) {
            double loss = INFINITY;
            int code = kNoCode;
            if (lane < live && next < beam) {
              loss = losses[own] + (static_cast<double>(state.scores[own * beam + next]) -
                                    static_cast<double>(state.bases[own])) *
                                       static_cast<double>(state.worth[own]);
              code = state.found[own * beam + next];
            }
            double least = loss;
            int from = lane;
#pragma unroll
            for (int mask = 1; mask < kMostBeam; mask *= 2) {
              const double other = __shfl_xor_sync(kWholeWarp, least, mask);
              const int other_from = __shfl_xor_sync(kWholeWarp, from, mask);
              if (other < least || (other == least && other_from < from)) {
                least = other;
                from = other_from;
              }
            }
            // Of losses that are no numbers none is less: a hypothesis then stays as it is.
            const int best = __shfl_sync(kWholeWarp, code, from);
            if (lane == from) ++next;
            if (lane == 0) {
              const int to = row * beam + i;
              const int parent = row * beam + (from < live ? from : 0);
              state.parents[to] = parent;
              state.chosen[to] =
                  best == kNoCode ? codes[parent * run_codes + block * task.codebooks + book] : best;
              new_losses[to] = best == kNoCode ? losses[parent] : least;
              new_origins[to] = origins[parent];
            }
          }
        }
      }
      __syncthreads();

      for (int i = tid; i < states * dim; i += threads) {
        const int s = i / dim;
        const int parent = state.parents[s];
        const int present = codes[parent * run_codes + block * task.codebooks + book];
        state.changes[i] =
            state.scales[s] * (table[state.chosen[s] * dim + i % dim] - table[present * dim + i % dim]);
      }
      __syncthreads();
      const int other = memory.sides() - 1 - side;
      Real* const new_products = state.products + other * memory.states * memory.row;
      uint16_t* const new_codes = state.codes + other * memory.states * run_codes;
      // A warp takes two states at once, so that each element of H serves both.
      const int warps = threads / 32;
      for (int s = tid / 32; s < states; s += 2 * warps) {
        const int t = min(s + warps, memory.states - 1);
        const bool both = s + warps < states;
        for (int a = 0; a < task.out_group; ++a) {
          const Real* const first = state.changes + s * dim + a * g;
          const Real* const second = state.changes + t * dim + a * g;
          const int own = state.parents[s] * memory.row + a * width;
          const int next = both ? state.parents[t] * memory.row + a * width : own;
          for (int c = column + tid % 32; c < width; c += 32) {
            Real value = products[own + c];
            Real other_value = products[next + c];
            for (int j = 0; j < g; ++j) {
              const Real h = state.h[(column + j) * width + c];
              value = fma(-first[j], h, value);
              other_value = fma(-second[j], h, other_value);
            }
            new_products[s * memory.row + a * width + c] = value;
            if (both) new_products[t * memory.row + a * width + c] = other_value;
          }
        }
      }
      if (beam == 1) {
        for (int s = tid; s < states; s += threads) {
          codes[s * run_codes + block * task.codebooks + book] = static_cast<uint16_t>(state.chosen[s]);
        }
      } else {
        for (int i = tid; i < states * run_codes; i += threads) {
          const int s = i / run_codes;
          new_codes[i] = i % run_codes == block * task.codebooks + book
                             ? static_cast<uint16_t>(state.chosen[s])
                             : codes[state.parents[s] * run_codes + i % run_codes];
        }
        side = other;
        live = beam;
      }
      __syncthreads();
    }
  }

  const uint16_t* const codes = state.codes + side * memory.states * run_codes;
  for (int i = tid; i < states * run_codes; i += threads) {
    task.codes[place_of(i / run_codes) * row_codes + task.first_block * task.codebooks + i % run_codes] =
        codes[i];
  }
  for (int s = tid; s < states && beam > 1; s += threads) {
    task.losses[place_of(s)] = state.losses[side * memory.states + s];
    task.origins[place_of(s)] = state.origins[side * memory.states + s];
  }
  for (int i = tid; i < states * memory.row; i += threads) {
    const int s = i / memory.row;
    const int a = i % memory.row / width;
    const int c = i % width;
    const int64_t natural = task.block_order[task.first_block + c / g];
    const int64_t group = group_of(s);
    Real sum = 0;
    for (int book = 0; book < task.codebooks; ++book) {
      const int code = codes[s * run_codes + c / g * task.codebooks + book];
      sum += task.tables[(book * task.entries + code) * dim + a * g + c % g];
    }
    const Real factor = task.scales[group * task.scale_count + natural * g / task.scale_columns];
    const auto wanted =
        static_cast<Real>(task.weights[(group * task.out_group + a) * task.columns + natural * g + c % g]);
    const int64_t row = place_of(s) * task.out_group + a;
    const int64_t at = row * task.columns + first_column + c;
    if (task.error_changes != nullptr) {
      task.error_changes[row * width + c] = (wanted - factor * sum) - error_at(task, at);
    }
    store_error(task, at, wanted - factor * sum);
  }
}

}  // namespace quantloom::cuda
