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
  return {plan.first_token + index / plan.group, item.head * plan.group + index % plan.group,
          row < plan.item_rows && index < plan.rows};
}

// Queries of an item as float16, each over a power of two a little above its largest element, in the pairs of
// channels that keys come in.
template <class Keys, int kDim>
__device__ __forceinline__ void load_queries(const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionItem& item, uint32_t* words, float* scales) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < plan.item_rows; row += kWarps) {
    const QueryRow from = query_row(plan, item, row);
    const int64_t start = item.sequence * q.strides[0] + from.head * q.strides[1] + from.token * q.strides[2];
    float x[kDim / 2 / 32 + 1][2];
    const auto load = [&]<class T>(const T* data) {
#pragma unroll
      for (int i = 0; i * 32 < kDim / 2; ++i) {
        const int d = Keys::channel(i * 32 + lane);
        const bool exists = from.exists && i * 32 + lane < kDim / 2;
        x[i][0] = exists ? static_cast<float>(data[start + d]) : 0;
        x[i][1] = exists ? static_cast<float>(data[start + d + Keys::kPairDistance]) : 0;
      }
    };
    if (q.dtype == DType::f16) {
      load(static_cast<const __half*>(q.data));
    } else if (q.dtype == DType::bf16) {
      load(static_cast<const __nv_bfloat16*>(q.data));
    } else {
      load(static_cast<const float*>(q.data));
    }
    float largest = 0;
#pragma unroll
    for (int i = 0; i * 32 < kDim / 2; ++i) largest = fmaxf(largest, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
    // All are below 1/4, so that products with scales are finite even where they are taken four times; no
    // factor for zeros and for what is not finite.
    int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 124;
    if (exponent < -100 || exponent > 100) exponent = 0;
    const float factor = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i * 32 < kDim / 2; ++i) {
      if (i * 32 + lane >= kDim / 2) continue;
      words[row * Keys::kQueryWords + Keys::place(i * 32 + lane)] =
          halves_of(x[i][0] * factor, x[i][1] * factor);
    }
    if (lane == 0) scales[row] = q.scale * 1.44269504F / factor;
  }
}

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
template <int kDim>
struct RunningSoftmax {
  static constexpr int kMostExponent = 15;
  static constexpr int kFirstExponent = 8;  // of the largest weight when the base moves

  float outputs[kDim / 16][4];
  float parts[4];  // [2, 3]: sums of weights; [0, 1]: what values add
  float base[2];
  int exponent;
  uint32_t most_scale;  // 2^exponent, in both halves
  uint32_t most_weight;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : outputs) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    parts[0] = parts[1] = parts[2] = parts[3] = 0;
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
      parts[c] *= factor[c], parts[2 + c] *= factor[c];
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

// Floats of a row of sums in shared memory: rows of neighbouring lanes lie in different banks.
template <int kDim>
constexpr int kSumsRow = kDim + 8;

// Adds what the warps of a block found in a piece: the result, or a part of it in the workspace. The warp's
// sums of channels come from for_sums(emit(channel, column c, sums of some neighbouring channels)). Pieces
// take turns with two parts of shared memory, so that a warp need not wait for those that still add.
template <int kDim, class ForSums>
__device__ __forceinline__ void finish_piece(const RunningSoftmax<kDim>& state, const ForSums& for_sums,
                                             const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionWorkspace& workspace, const AttentionMemory& at,
                                             const AttentionItem& item, int piece, std::byte* memory,
                                             Lane lane) {
  const int turn = piece & 1;
  auto* sums = reinterpret_cast<float*>(memory + at.sums + turn * at.turn);
  auto* weights = reinterpret_cast<float2*>(memory + at.weights) + turn * kWarps * kRows;
  const int warp = threadIdx.x / 32;
  const int rows = min(plan.item_rows, plan.rows - item.row_block * plan.item_rows);
  const int first_row = 2 * lane.t & (plan.item_rows - 1);
  float* const to = sums + (warp * at.rows + first_row) * kSumsRow<kDim>;
  for_sums([&](int channel, int c, auto some) {
    if (first_row + c < rows) *reinterpret_cast<decltype(some)*>(to + c * kSumsRow<kDim> + channel) = some;
  });
#pragma unroll
  for (int c = 0; c < 2; ++c)
    if (lane.g == 0) weights[warp * kRows + 2 * lane.t + c] = {state.base[c], state.parts[2 + c]};
  __syncthreads();
  const auto part = static_cast<unsigned>(item.place * plan.pieces + piece);
  for (int i = threadIdx.x; i < rows * (kDim / 4); i += kWarps * 32) {
    const int row = i / (kDim / 4);
    const int d = i % (kDim / 4) * 4;
    float2 total = {kNothing, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total.x = fmaxf(total.x, weights[w * kRows + row].x);
    float4 value = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part_of = weights[w * kRows + row];
      const float factor = part_of.x == kNothing ? 0.0F : power_of_two(part_of.x - total.x);
      const auto more = *reinterpret_cast<const float4*>(sums + (w * at.rows + row) * kSumsRow<kDim> + d);
      value.x += factor * more.x, value.y += factor * more.y;
      value.z += factor * more.z, value.w += factor * more.w;
      total.y += factor * part_of.y;
    }
    if (item.cut.pieces == 1) {
      write_result<kDim>(q, plan, item, row, d, value, total.y);
      continue;
    }
    const size_t first = static_cast<size_t>(part) * static_cast<unsigned>(plan.item_rows * kDim);
    reinterpret_cast<float4*>(workspace.sums + first)[i] = value;
    if (d == 0) workspace.weights[part * static_cast<size_t>(plan.item_rows) + row] = total;
  }
}

// Counts an item's pieces, and adds all of its place in order if they were the last ones.
template <int kDim>
__device__ __forceinline__ void finish_place(const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionWorkspace& workspace, const AttentionMemory& at,
                                             const AttentionItem& item, std::byte* memory) {
  auto* factors = reinterpret_cast<float2*>(memory + at.sums);
  auto* finished = reinterpret_cast<unsigned*>(memory + at.finished);
  const int pieces = item.cut.pieces;
  const int rows = min(plan.item_rows, plan.rows - item.row_block * plan.item_rows);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const auto done = static_cast<unsigned>(item.last_piece - item.first_piece);
    *finished = atomicAdd(workspace.finished + item.place, done) + done;
    if (*finished == static_cast<unsigned>(pieces)) workspace.finished[item.place] = 0;
    __threadfence();
  }
  __syncthreads();
  if (*finished == static_cast<unsigned>(pieces)) {
    const int64_t place = static_cast<int64_t>(item.place) * plan.pieces;
    const auto weight_of = [&](int piece, int row) {
      return __ldcg(workspace.weights + (place + piece) * plan.item_rows + row);
    };
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
      float2 weights[kMostPieces / 32];
      float largest = kNothing;
#pragma unroll
      for (int i = 0; i < kMostPieces / 32; ++i) {
        const int piece = i * 32 + lane;
        weights[i] = piece < pieces ? weight_of(piece, row) : float2{kNothing, 0};
        largest = fmaxf(largest, weights[i].x);
      }
      for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
#pragma unroll
      for (int i = 0; i < kMostPieces / 32; ++i) {
        const int piece = i * 32 + lane;
        const float factor = weights[i].x == kNothing ? 0.0F : power_of_two(weights[i].x - largest);
        if (piece < pieces) factors[row * pieces + piece] = {factor, factor * weights[i].y};
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (kDim / 4); i += kWarps * 32) {
      const int row = i / (kDim / 4);
      const int d = i % (kDim / 4) * 4;
      const float* from = workspace.sums + (place * plan.item_rows + row) * kDim + d;
      float4 value = {0, 0, 0, 0};
      float total = 0;
#pragma unroll 32
      for (int piece = 0; piece < pieces; ++piece) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(from + piece * plan.item_rows * kDim));
        const float2 factor = factors[row * pieces + piece];
        value.x += factor.x * part.x, value.y += factor.x * part.y;
        value.z += factor.x * part.z, value.w += factor.x * part.w;
        total += factor.y;
      }
      write_result<kDim>(q, plan, item, row, d, value, total);
    }
  }
  __syncthreads();
}

// The arguments of a kernel.
struct AttentionTask {
  const KVView& view;
  const KVQueries& q;
  const AttentionPlan& plan;
  const AttentionWorkspace& workspace;
  const AttentionMemory& at;
};

}  // namespace quantloom::kv_cache
