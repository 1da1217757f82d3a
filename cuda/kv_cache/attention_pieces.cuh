// What pieces of attention share: their queries, the running softmax of a warp, and their ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "common/store_float.cuh"
#include "kv_cache/attention_plan.cuh"
#include "kv_cache/code_matrices.cuh"

namespace quantloom::kv_cache {

constexpr float kNothing = -__builtin_huge_valf();  // the largest of no scores
constexpr float kLow = -__FLT_MAX__;                // no score is lower; kNothing - kLow is no NaN

// Where things lie in shared memory, in bytes.
struct AttentionMemory {
  int warp = 0;  // of each warp: kStages units, keys and values; or rows that it decodes
  int unit = 0;
  int keys = 0;  // of a unit
  int queries = 0;
  int exact_queries = 0;  // of pieces of the rest
  int sums = 0;           // [kWarps, rows, head_dim]
  int turn = 0;           // bytes from the sums of a piece to those of the next
  int rows = 0;
  int weights = 0;  // float2 [kWarps, kRows]
  int scales = 0;   // float [kRows]
  int tables = 0;   // float [2, 16]
  int finished = 0;
  int barrier = 0;  // 64 bits
  int walk = 0;
  int bytes = 0;
};

// The transpose of an 8 x 8 matrix of 16 bits that a warp holds.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result = 0;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// The query of a row of an item: its token and head, or no row.
struct QueryRow {
  int token;
  int head;
  bool exists;
};
__device__ __forceinline__ QueryRow query_row(const AttentionPlan& plan, const AttentionItem& item, int row) {
  const int index = item.row_block * plan.item_rows + row;
  return {plan.first_token + plan.by_group.quotient(index),
          item.head * plan.group + plan.by_group.remainder(index), row < plan.item_rows && index < plan.rows};
}

// Queries of an item as float16, each over a power of two a little above its largest element, in the pairs of
// channels that keys come in. They are asked for first, and stored when they are here.
template <class Keys, int kDim>
class Queries {
 public:
  __device__ __forceinline__ Queries(const KVQueries& q, const AttentionPlan& plan, const AttentionItem& item)
      : dtype_(q.dtype), rows_(plan.item_rows), scale_(q.scale) {
    const bool wide = q.dtype == DType::f32;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const QueryRow from = query_row(plan, item, row(turn));
      const int64_t start =
          item.sequence * q.strides[0] + from.head * q.strides[1] + from.token * q.strides[2];
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
        // Some element for those that do not exist, without a branch.
        const bool exists = from.exists && word(i) < kDim / 2;
        const int64_t first = exists ? start + Keys::channel(word(i)) : 0;
        const int distance = exists ? Keys::kPairDistance : 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          uint32_t bits = 0;
          if (wide) {
            bits = static_cast<const uint32_t*>(q.data)[first + c * distance];
          } else {
            bits = static_cast<const uint16_t*>(q.data)[first + c * distance];
          }
          bits_[turn][i][c] = exists ? bits : 0;
        }
      }
    }
  }

  __device__ __forceinline__ void store(uint32_t* words, float* scales) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (row(turn) >= rows_) break;
      float x[kLaneWords][2];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t bits = bits_[turn][i][c];
          x[i][c] = dtype_ == DType::f16 ? Halves::low(bits)
                                         : __uint_as_float(dtype_ == DType::f32 ? bits : bits << 16);
          largest = fmaxf(largest, fabsf(x[i][c]));
        }
      }
      for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
      // All are below 1/4, so that products with scales are finite even where they are taken four times; no
      // factor for zeros and for what is not finite.
      int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 124;
      if (exponent < -100 || exponent > 100) exponent = 0;
      const float factor = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
      const float inverse = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) {
        if (word(i) >= kDim / 2) continue;
        words[row(turn) * Keys::kQueryWords + Keys::place(word(i))] =
            halves_of(x[i][0] * factor, x[i][1] * factor);
      }
      if (threadIdx.x % 32 == 0) scales[row(turn)] = scale_ * 1.44269504F * inverse;
    }
  }

 private:
  static constexpr int kTurns = kRows / kWarps;
  static constexpr int kLaneWords = (kDim / 2 + 31) / 32;

  static __device__ __forceinline__ int row(int turn) {
    return static_cast<int>(threadIdx.x) / 32 + turn * kWarps;
  }
  static __device__ __forceinline__ int word(int i) {
    return static_cast<int>(threadIdx.x) % 32 + i * 32;
  }

  DType dtype_;
  int rows_;
  float scale_;
  uint32_t bits_[kTurns][kLaneWords][2];
};

// 2^x; numbers below 2^-126 are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^exponent in both halves, or the largest float16.
__device__ __forceinline__ uint32_t half_power(int exponent) {
  return exponent > 15 ? 0x7BFF7BFFU : static_cast<uint32_t>(15 + exponent) * 0x04000400U;
}

// What one warp knows of the softmax of the queries of columns 2 t and 2 t + 1 of an item.
//
// Weights are 2^(score - base), as float16. They, and their products with scales of values, stay below 2^15:
// where those scales are not all at most 2^exponent, or weights at most 2^(15 - exponent), the limits or the
// base move. A base that has not been set makes weights infinite.
template <int kDim, int kParts = 1>
struct RunningSoftmax {
  static constexpr int kMostExponent = 15;
  static constexpr int kFirstExponent = 8;  // of the largest weight when the base moves

  float outputs[kDim / 16][4];
  float parts[kParts][4];  // [0][2, 3]: sums of weights; others: what values add
  float base[2];
  int exponent;
  uint32_t most_scale;  // 2^exponent, in both halves
  uint32_t most_weight;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : outputs) tile[0] = tile[1] = tile[2] = tile[3] = 0;
#pragma unroll
    for (auto& part : parts) part[0] = part[1] = part[2] = part[3] = 0;
    base[0] = base[1] = kNothing;
    exponent = 0;
    most_scale = Halves::kOne;
    most_weight = half_power(kMostExponent);
  }

  // Moves the bases to what the scores of a unit and the scales of its values need.
  __device__ __forceinline__ void move(const float (&products)[2][4], const float (&factors)[2],
                                       const float (&addends)[2], uint32_t scales) {
    float widest = fmaxf(Halves::low(scales), Halves::high(scales));
    for (int step = 16; step > 0; step /= 2)
      widest = fmaxf(widest, __shfl_xor_sync(0xFFFFFFFFU, widest, step));
    const int needed = widest > 1.0F ? static_cast<int>(__float_as_uint(widest) >> 23) - 126 : 0;
    exponent = max(exponent, needed);
    most_scale = half_power(exponent);
    most_weight = half_power(kMostExponent - exponent);
    const bool was_set = base[0] != kNothing || base[1] != kNothing;
    float factor[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float most =
          fmaxf(fmaxf(products[0][c], products[0][2 + c]), fmaxf(products[1][c], products[1][2 + c]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFU, most, step));
      most = fmaf(most, factors[c], addends[c]);
      const float now = fmaxf(base[c], most + static_cast<float>(exponent - kFirstExponent));
      factor[c] = base[c] == kNothing ? 1.0F : power_of_two(base[c] - now);
      base[c] = now;
#pragma unroll
      for (auto& part : parts) part[c] *= factor[c], part[2 + c] *= factor[c];
    }
    if (!__any_sync(0xFFFFFFFFU, was_set)) return;
#pragma unroll
    for (auto& tile : outputs)
      tile[0] *= factor[0], tile[1] *= factor[1], tile[2] *= factor[0], tile[3] *= factor[1];
  }

  // Scores of a unit (base 2, or nothing) are products * factors + addends. They become weights, in pairs of
  // tokens of a row as the product with values takes them, whose scales are `scales` at most. kAll: whether
  // each query has a score in every unit.
  template <bool kAll>
  __device__ __forceinline__ void weigh(const float (&products)[2][4], const float (&factors)[2],
                                        const float (&addends)[2], uint32_t scales,
                                        uint32_t (&weights)[2][2]) {
    uint32_t pairs[4];
    const auto compute = [&] {
      const float from[2] = {addends[0] - (!kAll && base[0] == kNothing ? 0.0F : base[0]),
                             addends[1] - (!kAll && base[1] == kNothing ? 0.0F : base[1])};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const two = products[i / 2] + i % 2 * 2;
        pairs[i] = halves_of(power_of_two(fmaf(two[0], factors[0], from[0])),
                             power_of_two(fmaf(two[1], factors[1], from[1])));
      }
    };
    const auto turn = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i / 2][i % 2] = transpose(pairs[i]);
    };
    compute();
    const uint32_t largest =
        larger_halves(larger_halves(pairs[0], pairs[1]), larger_halves(pairs[2], pairs[3]));
    bool moves =
        larger_halves(largest, most_weight) != most_weight || larger_halves(scales, most_scale) != most_scale;
    if constexpr (!kAll) moves = moves || base[0] == kNothing || base[1] == kNothing;
    // Turned while the warp agrees.
    turn();
    if (__any_sync(0xFFFFFFFFU, moves)) [[unlikely]] {
      move(products, factors, addends, scales);
      compute();
      turn();
    }
  }
};

// Four numbers of the result of a row of an item.
template <int kDim>
__device__ __forceinline__ void write_result(const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionItem& item, int row, int d, float4 value,
                                             float sum) {
  const QueryRow query = query_row(plan, item, row);
  const int64_t to =
      ((static_cast<int64_t>(item.sequence) * q.tokens + query.token) * q.heads + query.head) * kDim + d;
  const float one = sum == 0 ? 0.0F : 1.0F / sum;
  cuda::store_float(q.out, q.dtype, to, value.x * one);
  cuda::store_float(q.out, q.dtype, to + 1, value.y * one);
  cuda::store_float(q.out, q.dtype, to + 2, value.z * one);
  cuda::store_float(q.out, q.dtype, to + 3, value.w * one);
}

// The arguments of a kernel.
struct AttentionTask {
  const KVView& view;
  const KVQueries& q;
  const AttentionPlan& plan;
  const AttentionWorkspace& workspace;
  const AttentionMemory& at;
};

// Floats of a row of sums in shared memory: rows of neighbouring lanes lie in different banks.
template <int kDim>
constexpr int kSumsRow = kDim + 8;

// The parts of shared memory for sums of a piece; two pieces take turns.
template <int kDim>
struct PieceSums {
  float* sums;
  float2* weights;  // (base, sum) of the rows of each warp
  int rows;         // that exist

  __device__ __forceinline__ PieceSums(const AttentionPlan& plan, const AttentionMemory& at,
                                       const AttentionItem& item, int piece, std::byte* memory)
      : sums(reinterpret_cast<float*>(memory + at.sums + (piece & 1) * at.turn)),
        weights(reinterpret_cast<float2*>(memory + at.weights) + (piece & 1) * kWarps * kRows),
        rows(min(plan.item_rows, plan.rows - item.row_block * plan.item_rows)) {}

  // What this warp found. Sums come from for_sums(emit(channel, column c, sums of some neighbouring
  // channels)).
  template <class State, class ForSums>
  __device__ __forceinline__ void store(const State& state, const ForSums& for_sums, int item_rows,
                                        int warp_rows, Lane lane) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int first_row = 2 * lane.t & (item_rows - 1);
    float* const to = sums + (warp * warp_rows + first_row) * kSumsRow<kDim>;
    for_sums([&](int channel, int c, auto some) {
      if (first_row + c < rows) *reinterpret_cast<decltype(some)*>(to + c * kSumsRow<kDim> + channel) = some;
    });
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (lane.g == 0) weights[warp * kRows + 2 * lane.t + c] = {state.base[c], state.parts[0][2 + c]};
  }

  // Adds what all warps stored: the result, if there is no other piece (kAlone: there may be none), or a part
  // of it in the workspace.
  template <bool kAlone>
  __device__ __forceinline__ void add(const KVQueries& q, const AttentionPlan& plan,
                                      const AttentionWorkspace& workspace, const AttentionItem& item,
                                      int piece, int warp_rows) const {
    const auto part = static_cast<unsigned>(item.place * plan.pieces + piece);
    float4* const part_sums = reinterpret_cast<float4*>(
        workspace.sums + static_cast<size_t>(part) * static_cast<unsigned>(plan.item_rows * kDim));
    float2* const part_weights = workspace.weights + static_cast<size_t>(part) * plan.item_rows;
    for (int i = static_cast<int>(threadIdx.x); i < rows * (kDim / 4); i += kThreads) {
      const int row = i / (kDim / 4);
      const int d = i % (kDim / 4) * 4;
      float2 of_warp[kWarps];
      float2 total = {kLow, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        of_warp[w] = weights[w * kRows + row];
        total.x = fmaxf(total.x, of_warp[w].x);
      }
      float4 value = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = power_of_two(of_warp[w].x - total.x);
        const auto more = *reinterpret_cast<const float4*>(sums + (w * warp_rows + row) * kSumsRow<kDim> + d);
        value.x += factor * more.x, value.y += factor * more.y;
        value.z += factor * more.z, value.w += factor * more.w;
        total.y += factor * of_warp[w].y;
      }
      if (kAlone && item.cut.pieces == 1) {
        write_result<kDim>(q, plan, item, row, d, value, total.y);
        continue;
      }
      part_sums[i] = value;
      if (d == 0) part_weights[row] = total;
    }
  }
};

// Adds what the warps of a block found in a piece. Pieces take turns with two parts of shared memory, so that
// a warp need not wait for those that still add.
template <int kDim, bool kAlone, class State, class ForSums>
__device__ __forceinline__ void finish_piece(const State& state, const ForSums& for_sums,
                                             const AttentionTask& task, const AttentionItem& item, int piece,
                                             std::byte* memory, Lane lane) {
  const PieceSums<kDim> sums(task.plan, task.at, item, piece, memory);
  sums.store(state, for_sums, task.plan.item_rows, task.at.rows, lane);
  __syncthreads();
  sums.template add<kAlone>(task.q, task.plan, task.workspace, item, piece, task.at.rows);
}

// Adds all pieces of a place in order. Every thread copies what it adds into shared memory, many pieces at a
// time, and meanwhile warps find what the sums of pieces count.
template <int kDim>
__device__ __forceinline__ void add_pieces(const AttentionTask& task, const AttentionItem& item,
                                           std::byte* memory) {
  constexpr int kMostParts = (kRows * (kDim / 4) + kThreads - 1) / kThreads;  // of a thread
  const AttentionPlan& plan = task.plan;
  const int pieces = item.cut.pieces;
  const int rows = min(plan.item_rows, plan.rows - item.row_block * plan.item_rows);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t place = static_cast<int64_t>(item.place) * plan.pieces;
  const auto* from =
      reinterpret_cast<const float4*>(task.workspace.sums) + place * plan.item_rows * (kDim / 4);
  auto* factors = reinterpret_cast<float2*>(memory);
  const int count = rows * (kDim / 4);
  const int begin = whole_lines(rows * pieces * static_cast<int>(sizeof(float2)));
  auto* parts = reinterpret_cast<float4*>(memory + begin);
  const int room = (task.at.scales - begin) / (count * static_cast<int>(sizeof(float4)));
  const auto copy = [&](int first, int last) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
#pragma unroll 4
      for (int piece = first; piece < last; ++piece)
        cuda::copy_async(parts + (piece - first) * count + i, from + piece * plan.item_rows * (kDim / 4) + i);
    }
  };
  copy(0, min(room, pieces));
  for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kWarps) {
    float2 weights[kMostPieces / 32];
    float largest = kLow;
#pragma unroll
    for (int i = 0; i < kMostPieces / 32; ++i) {
      const int piece = i * 32 + lane;
      weights[i] = piece < pieces ? __ldcg(task.workspace.weights + (place + piece) * plan.item_rows + row)
                                  : float2{kLow, 0};
      largest = fmaxf(largest, weights[i].x);
    }
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
#pragma unroll
    for (int i = 0; i < kMostPieces / 32; ++i) {
      const int piece = i * 32 + lane;
      const float factor = power_of_two(weights[i].x - largest);
      if (piece < pieces) factors[row * pieces + piece] = {factor, factor * weights[i].y};
    }
  }
  __syncthreads();
  float4 values[kMostParts] = {};
  float totals[kMostParts] = {};
  for (int first = 0; first < pieces; first += room) {
    const int last = min(first + room, pieces);
    if (first > 0) copy(first, last);
    cuda::wait_for_copies();
#pragma unroll
    for (int part = 0; part < kMostParts; ++part) {
      const int i = static_cast<int>(threadIdx.x) + part * kThreads;
      if (i >= count) break;
      const int row = i / (kDim / 4);
#pragma unroll 4
      for (int piece = first; piece < last; ++piece) {
        const float4 some = parts[(piece - first) * count + i];
        const float2 factor = factors[row * pieces + piece];
        values[part].x += factor.x * some.x, values[part].y += factor.x * some.y;
        values[part].z += factor.x * some.z, values[part].w += factor.x * some.w;
        totals[part] += factor.y;
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kMostParts; ++part) {
    const int i = static_cast<int>(threadIdx.x) + part * kThreads;
    if (i >= count) break;
    write_result<kDim>(task.q, plan, item, i / (kDim / 4), i % (kDim / 4) * 4, values[part], totals[part]);
  }
}

// Counts an item's pieces, and adds all of its place if they were the last ones.
template <int kDim>
__device__ __forceinline__ void finish_place(const AttentionTask& task, const AttentionItem& item,
                                             std::byte* memory) {
  auto* finished = reinterpret_cast<unsigned*>(memory + task.at.finished);
  const auto pieces = static_cast<unsigned>(item.cut.pieces);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const auto done = static_cast<unsigned>(item.last_piece - item.first_piece);
    *finished = atomicAdd(task.workspace.finished + item.place, done) + done;
    if (*finished == pieces) {
      task.workspace.finished[item.place] = 0;
      __threadfence();
    }
  }
  __syncthreads();
  if (*finished == pieces) add_pieces<kDim>(task, item, memory);
  __syncthreads();
}

}  // namespace quantloom::kv_cache
