// Decode attention straight from pages of codes ("flash decoding"): blocks take items of work (a run of pages
// of one KV head, for up to eight queries); one warp of a block copies records into shared memory ahead of
// the others, which decode them into operands of tensor cores and keep a running softmax each. What the warps
// found is added in order, and the block that finishes the last piece of a head adds the pieces, in order.
#pragma once

#include <cuda_bf16.h>

#include "kv_cache/attention_plan.cuh"
#include "kv_cache/page_copies.cuh"
#include "kv_cache/staged_rows.cuh"

namespace quantloom::kv_cache {

constexpr float kNothing = -__builtin_huge_valf();  // the largest of no scores

// Where things lie in shared memory, in bytes.
struct AttentionMemory {
  int record = 0;  // of a stage
  int stages = 0;
  int queries = 0;
  int staging = 0;  // of a warp: staging_bytes
  int staging_bytes = 0;
  int sums = 0;  // [kWarps, rows, head_dim]
  int rows = 0;
  int weights = 0;  // float2 [kWarps, kRows]
  int scales = 0;   // float [kRows]
  int tables = 0;   // float [2, 16]
  int barriers = 0;
  int finished = 0;
  int bytes = 0;
};

template <int kDim>
constexpr int kQueryWords = kDim / 2 + 4;  // of a row

// The multiplying warps alone.
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWarps * 32) : "memory");
}

// The transpose of an 8 x 8 matrix of 16 bits that a warp holds.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result = 0;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::f16) {
    static_cast<__half*>(data)[i] = __float2half_rn(value);
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

// The query of a row of an item: its token and head, or no row.
struct QueryRow {
  int token;
  int head;
  bool exists;
};
__device__ __forceinline__ QueryRow query_row(const AttentionPlan& plan, const AttentionItem& item, int row) {
  const int index = item.row_block * kRows + row;
  return {plan.first_token + index / plan.group, item.head * plan.group + index % plan.group,
          index < plan.rows};
}

// Queries of an item as float16, each over a power of two near its largest element, with the pairs of
// channels that keys come in: word d of a row is channels d and d + kDim / 2.
template <int kDim>
__device__ __forceinline__ void load_queries(const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionItem& item, uint32_t* words, float* scales) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kRows; row += kWarps) {
    const QueryRow from = query_row(plan, item, row);
    const int64_t start = item.sequence * q.strides[0] + from.head * q.strides[1] + from.token * q.strides[2];
    float x[kDim / 2 / 32 + 1][2];
    float largest = 0;
#pragma unroll
    for (int i = 0; i * 32 < kDim / 2; ++i) {
      const int d = i * 32 + lane;
      const bool exists = from.exists && d < kDim / 2;
      x[i][0] = exists ? cuda::load_float(q.data, q.dtype, start + d) : 0;
      x[i][1] = exists ? cuda::load_float(q.data, q.dtype, start + d + kDim / 2) : 0;
      largest = fmaxf(largest, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
    }
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
    // 2^exponent <= largest < 2^(exponent + 1); no scale for zeros and for what is not finite.
    int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    if (exponent < -100 || exponent > 100) exponent = 0;
    const float factor = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i * 32 < kDim / 2; ++i) {
      const int d = i * 32 + lane;
      if (d >= kDim / 2) continue;
      const __half2 pair = __floats2half2_rn(x[i][0] * factor, x[i][1] * factor);
      words[row * kQueryWords<kDim> + d] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    if (lane == 0) scales[row] = q.scale * 1.44269504F / factor;
  }
}

// Adds to the scores of a unit's two tiles.
template <int kDim, class Keys>
__device__ __forceinline__ void multiply_keys(const Keys& keys, const uint32_t* queries, Lane lane,
                                              float (&scores)[2][4]) {
  const uint32_t* row = queries + lane.g * kQueryWords<kDim> + lane.t * (kDim / 8);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[2][4];
    keys.step(k, a[0], a[1]);
    const auto b = *reinterpret_cast<const uint2*>(row + 2 * k);
    cuda::multiply_accumulate<__half>(scores[0], a[0], b.x, b.y);
    cuda::multiply_accumulate<__half>(scores[1], a[1], b.x, b.y);
  }
}

// Adds to the outputs the values of a tile with their weights.
template <int kDim, class Values>
__device__ __forceinline__ void multiply_values(const Values& values, const uint32_t (&weights)[2],
                                                float (&outputs)[kDim / 16][4]) {
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    uint32_t a[4];
    values.step(j, a);
    cuda::multiply_accumulate<__half>(outputs[j], a, weights[0], weights[1]);
  }
}

// What one warp knows of the softmax of the queries 2 t and 2 t + 1 of an item.
template <int kDim>
struct RunningSoftmax {
  float outputs[kDim / 16][4];
  float largest[2];
  float sum[2];  // of this lane's tokens

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : outputs) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    largest[0] = largest[1] = kNothing;
    sum[0] = sum[1] = 0;
  }

  // Scores of a unit (base 2, or nothing) become weights, in pairs of tokens of a row as the product with
  // values takes them.
  __device__ __forceinline__ void add(const float (&scores)[2][4], uint32_t (&weights)[2][2]) {
    float most[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      most[c] = fmaxf(fmaxf(scores[0][c], scores[0][2 + c]), fmaxf(scores[1][c], scores[1][2 + c]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        most[c] = fmaxf(most[c], __shfl_xor_sync(0xFFFFFFFFU, most[c], step));
    }
    if (__any_sync(0xFFFFFFFFU, most[0] > largest[0] || most[1] > largest[1])) {
      float factor[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float now = fmaxf(largest[c], most[c]);
        factor[c] = now == kNothing ? 1.0F : exp2f(largest[c] - now);
        largest[c] = now;
        sum[c] *= factor[c];
      }
#pragma unroll
      for (auto& tile : outputs)
        tile[0] *= factor[0], tile[1] *= factor[1], tile[2] *= factor[0], tile[3] *= factor[1];
    }
    const float base[2] = {largest[0] == kNothing ? 0.0F : largest[0],
                           largest[1] == kNothing ? 0.0F : largest[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 pair =
            __floats2half2_rn(exp2f(scores[i][2 * half] - base[0]), exp2f(scores[i][2 * half + 1] - base[1]));
        const float2 rounded = __half22float2(pair);
        sum[0] += rounded.x;
        sum[1] += rounded.y;
        weights[i][half] = transpose(*reinterpret_cast<const uint32_t*>(&pair));
      }
    }
  }
};

// Of two weights of tokens, those of tokens that `keep` takes.
template <class Keep>
__device__ __forceinline__ uint32_t masked(uint32_t pair, int first, int second, Keep keep) {
  return pair & ((keep(first) ? 0x0000FFFFU : 0U) | (keep(second) ? 0xFFFF0000U : 0U));
}

// The tokens of a unit: its place in pages, and which of them are codes.
struct Unit {
  const std::byte* record;
  int slot;
  int position;      // of the first
  int end;           // positions from here on are not of this page's tokens
  int keys_coded;    // the first position after this page's codes of keys
  int values_coded;  // likewise
  const std::byte* exact_keys;
  const std::byte* exact_values;

  __device__ __forceinline__ UnitTokens keys(int first) const {
    return {record, slot, position, first, keys_coded, end, exact_keys};
  }
  __device__ __forceinline__ UnitTokens values(int first) const {
    return {record, slot, position, first, values_coded, end, exact_values};
  }
};

template <class Keys, int kDim>
__device__ __forceinline__ void score_unit(const KVView& view, const Unit& unit, const HeadRanges& tables,
                                           const uint32_t* queries, std::byte* staging, Lane lane,
                                           float (&scores)[2][4]) {
  const UnitTokens tokens = unit.keys(view.first);
  if constexpr (Keys::kStaged) {
    Keys keys;
    keys.stage(view, tables, tokens, staging, lane);
    multiply_keys<kDim>(keys, queries, lane, scores);
  } else {
    const bool coded = unit.position >= view.first && unit.position < unit.keys_coded;
    if (coded) {
      Keys keys;
      keys.load(view, unit.record, unit.slot, lane);
      multiply_keys<kDim>(keys, queries, lane, scores);
    }
    if (coded && unit.position + kUnitTokens <= unit.keys_coded) return;
    ExactKeys<kDim> keys;
    keys.dtype = view.dtype;
    keys.t = lane.t;
    const int at = unit.position + token_of_row(lane.g);
#pragma unroll
    for (int i = 0; i < 4; ++i) keys.rows[i] = tokens.exact_row(view, at + 8 * i);
    float exact[2][4] = {};
    multiply_keys<kDim>(keys, queries, lane, exact);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (keys.rows[i] == nullptr) continue;
      scores[i / 2][i % 2 * 2] = exact[i / 2][i % 2 * 2];
      scores[i / 2][i % 2 * 2 + 1] = exact[i / 2][i % 2 * 2 + 1];
    }
  }
}

template <class Values, int kDim>
__device__ __forceinline__ void weigh_unit(const KVView& view, const Unit& unit, const HeadRanges& tables,
                                           std::byte* staging, Lane lane, const uint32_t (&weights)[2][2],
                                           float (&outputs)[kDim / 16][4]) {
  const UnitTokens tokens = unit.values(view.first);
  Values values;
  if constexpr (Values::kStaged) values.stage(view, tables, tokens, staging);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = unit.position + 16 * i;
    if constexpr (Values::kStaged) {
      values.load(staging, 16 * i, lane);
      multiply_values<kDim>(values, weights[i], outputs);
    } else {
      const bool coded = at >= view.first && at < unit.values_coded;
      const bool all = coded && at + 16 <= unit.values_coded;
      if (coded) {
        const auto keep = [&](int token) { return at + token < unit.values_coded; };
        const uint32_t kept[2] = {all ? weights[i][0] : masked(weights[i][0], lane.t, lane.t + 4, keep),
                                  all ? weights[i][1] : masked(weights[i][1], lane.t + 8, lane.t + 12, keep)};
        values.load(view, unit.record, unit.slot + 16 * i, lane);
        multiply_values<kDim>(values, kept, outputs);
      }
      if (all) continue;
      ExactValues<kDim> exact;
      exact.dtype = view.dtype;
      exact.g = lane.g;
#pragma unroll
      for (int n = 0; n < 4; ++n) exact.rows[n] = tokens.exact_row(view, at + lane.t + 4 * n);
      multiply_values<kDim>(exact, weights[i], outputs);
    }
  }
}

// Adds what the warps of a block found, and what the pieces are together if this one is the last.
template <int kDim>
__device__ __forceinline__ void finish_item(const RunningSoftmax<kDim>& state, const KVQueries& q,
                                            const AttentionPlan& plan, const AttentionWorkspace& workspace,
                                            const AttentionMemory& at, const AttentionItem& item,
                                            std::byte* memory, Lane lane) {
  auto* sums = reinterpret_cast<float*>(memory + at.sums);
  auto* weights = reinterpret_cast<float2*>(memory + at.weights);
  auto* finished = reinterpret_cast<unsigned*>(memory + at.finished);
  const int warp = threadIdx.x / 32;
  const int rows = min(kRows, plan.rows - item.row_block * kRows);
  float sum[2] = {state.sum[0], state.sum[1]};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum[c] += __shfl_xor_sync(0xFFFFFFFFU, sum[c], step);
    if (lane.g == 0) weights[warp * kRows + 2 * lane.t + c] = {state.largest[c], sum[c]};
  }
  meet();
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = 2 * lane.t + c;
    if (row >= rows) continue;
    float largest = kNothing;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, weights[w * kRows + row].x);
    const float factor = state.largest[c] == kNothing ? 0.0F : exp2f(state.largest[c] - largest);
    float* to = sums + (warp * at.rows + row) * kDim + lane.g * (kDim / 8);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      const float2 two = {state.outputs[j][c] * factor, state.outputs[j][2 + c] * factor};
      *reinterpret_cast<float2*>(to + 2 * j) = two;
    }
  }
  meet();
  const int head = (item.sequence * (q.heads / plan.group) + item.head) * plan.row_blocks + item.row_block;
  const int64_t place = static_cast<int64_t>(head) * plan.pieces;
  const auto total_of = [&](int row) {
    float2 total = {kNothing, 0};
    for (int w = 0; w < kWarps; ++w) total.x = fmaxf(total.x, weights[w * kRows + row].x);
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = weights[w * kRows + row];
      if (part.x != kNothing) total.y += exp2f(part.x - total.x) * part.y;
    }
    return total;
  };
  const auto write = [&](int row, int d, float4 value, float sum_of) {
    const QueryRow query = query_row(plan, item, row);
    const int64_t to =
        ((static_cast<int64_t>(item.sequence) * q.tokens + query.token) * q.heads + query.head) * kDim + d;
    const float one = sum_of > 0 || sum_of != sum_of ? 1.0F / sum_of : 0.0F;
    store_float(q.out, q.dtype, to, value.x * one);
    store_float(q.out, q.dtype, to + 1, value.y * one);
    store_float(q.out, q.dtype, to + 2, value.z * one);
    store_float(q.out, q.dtype, to + 3, value.w * one);
  };
  for (int i = threadIdx.x; i < rows * (kDim / 4); i += kWarps * 32) {
    const int row = i / (kDim / 4);
    const int d = i % (kDim / 4) * 4;
    float4 value = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const auto part = *reinterpret_cast<const float4*>(sums + (w * at.rows + row) * kDim + d);
      value.x += part.x, value.y += part.y, value.z += part.z, value.w += part.w;
    }
    const float2 total = total_of(row);
    if (item.pieces == 1) {
      write(row, d, value, total.y);
      continue;
    }
    const int64_t at_row = (place + item.piece) * kRows + row;
    *reinterpret_cast<float4*>(workspace.sums + at_row * kDim + d) = value;
    if (d == 0) workspace.weights[at_row] = total;
  }
  if (item.pieces == 1) {
    meet();
    return;
  }
  __threadfence();
  meet();
  if (threadIdx.x == 0) {
    *finished = atomicAdd(workspace.finished + head, 1U) + 1;
    if (*finished == static_cast<unsigned>(item.pieces)) workspace.finished[head] = 0;
    __threadfence();
  }
  meet();
  if (*finished == static_cast<unsigned>(item.pieces)) {
    // Each row's factors of the pieces, then their sums.
    const auto of_piece = [&](int piece, int row) {
      return __ldcg(workspace.weights + (place + piece) * kRows + row);
    };
    for (int row = warp; row < rows; row += kWarps) {
      float largest = kNothing;
      for (int piece = static_cast<int>(threadIdx.x) % 32; piece < item.pieces; piece += 32)
        largest = fmaxf(largest, of_piece(piece, row).x);
      for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
      for (int piece = static_cast<int>(threadIdx.x) % 32; piece < item.pieces; piece += 32) {
        const float2 weight = of_piece(piece, row);
        const float factor = weight.x == kNothing ? 0.0F : exp2f(weight.x - largest);
        sums[2 * (row * item.pieces + piece)] = factor;
        sums[2 * (row * item.pieces + piece) + 1] = factor * weight.y;
      }
    }
    meet();
    for (int i = threadIdx.x; i < rows * (kDim / 4); i += kWarps * 32) {
      const int row = i / (kDim / 4);
      const int d = i % (kDim / 4) * 4;
      const float* factors = sums + 2 * row * item.pieces;
      float4 value = {0, 0, 0, 0};
      float total = 0;
#pragma unroll 8
      for (int piece = 0; piece < item.pieces; ++piece) {
        const float4 part = __ldcg(
            reinterpret_cast<const float4*>(workspace.sums + ((place + piece) * kRows + row) * kDim + d));
        const float factor = factors[2 * piece];
        value.x += factor * part.x, value.y += factor * part.y;
        value.z += factor * part.z, value.w += factor * part.w;
        total += factors[2 * piece + 1];
      }
      write(row, d, value, total);
    }
  }
  meet();
}

template <class Keys, class Values, int kDim>
__global__ void __launch_bounds__(kThreads) attend_kernel(KVView view, KVQueries q, AttentionPlan plan,
                                                          AttentionWorkspace workspace, AttentionMemory at) {
  auto* memory = cuda::dynamic_shared_memory<std::byte>();
  const int warp = threadIdx.x / 32;
  const auto barriers = static_cast<uint32_t>(__cvta_generic_to_shared(memory + at.barriers));
  const auto full = [&](int stage) { return barriers + static_cast<uint32_t>(16 * stage); };
  const auto empty = [&](int stage) { return barriers + static_cast<uint32_t>(16 * stage + 8); };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < at.stages; ++stage) {
      start_barrier(full(stage), kCopyArrivals);
      start_barrier(empty(stage), kWarps);
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cuda::publish_barriers();
#endif
  }
  auto* tables = reinterpret_cast<float*>(memory + at.tables);
  if (view.key_values != nullptr && threadIdx.x < 32) {
    const int side = static_cast<int>(threadIdx.x) / 16;
    const int i = static_cast<int>(threadIdx.x) % 16;
    const KVPart& part = side == 0 ? view.layout.keys : view.layout.values;
    if (i < 1 << part.bits) tables[threadIdx.x] = (side == 0 ? view.key_values : view.value_values)[i];
  }
  __syncthreads();
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  int turn = 0;  // pages that this block has taken
  if (warp == kWarps) {
    const int lane = threadIdx.x % 32;
    const auto record_bytes = static_cast<int>(view.layout.record_bytes);
    for (int index = blockIdx.x; index < plan.items; index += gridDim.x) {
      const AttentionItem item = attention_item(view, plan, index);
      if (item.piece >= item.pieces) continue;
      const int coded = max(view.coded(KVSide::keys, item.length), view.coded(KVSide::values, item.length));
      std::byte* const* table = view.pages + item.sequence * view.table_pages;
      for (int base = item.begin; base < item.end; base += 32) {
        const int page = base + lane - plan.head_pages;
        const bool copied = base + lane < item.end && page >= 0 && page * page_tokens < coded;
        std::byte* mine = copied ? table[page] : nullptr;
        for (int i = 0; i < min(32, item.end - base); ++i, ++turn) {
          const auto from = reinterpret_cast<const std::byte*>(
              __shfl_sync(0xFFFFFFFFU, reinterpret_cast<unsigned long long>(mine), i));
          const int stage = turn % at.stages;
          wait_for_phase(empty(stage), (turn / at.stages & 1) ^ 1);
          if (from == nullptr) {
            skip_record(full(stage));
          } else {
            copy_record(memory + stage * at.record, from + static_cast<int64_t>(item.head) * record_bytes,
                        record_bytes, full(stage));
          }
        }
      }
    }
    return;
  }
  const int in_warp = threadIdx.x % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  std::byte* staging = memory + at.staging + warp * at.staging_bytes;
  const int units = (page_tokens + kUnitTokens - 1) / kUnitTokens;
  RunningSoftmax<kDim> state;
  for (int index = blockIdx.x; index < plan.items; index += gridDim.x) {
    const AttentionItem item = attention_item(view, plan, index);
    if (item.piece >= item.pieces) continue;
    load_queries<kDim>(q, plan, item, queries, scales);
    meet();
    state.clear();
    const int64_t pair = static_cast<int64_t>(item.sequence) * view.kv_heads + item.head;
    const int64_t exact_offset =
        pair * (view.first + view.window) * kDim * (view.dtype == DType::f32 ? 4 : 2);
    float scale[2];
    int limits[2];  // positions from here on are not seen
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      scale[c] = scales[2 * lane.t + c];
      limits[c] = item.length - q.tokens + query_row(plan, item, 2 * lane.t + c).token + 1;
    }
    const int keys_coded = view.first + view.coded(KVSide::keys, item.length);
    const int values_coded = view.first + view.coded(KVSide::values, item.length);
    const HeadRanges key_tables = {tables, view.key_ranges + item.head * kDim};
    const HeadRanges value_tables = {tables + 16, nullptr};
    for (int page = item.begin; page < item.end; ++page, ++turn) {
      const int stage = turn % at.stages;
      wait_for_phase(full(stage), turn / at.stages & 1);
      const bool kept = page < plan.head_pages;
      Unit unit;
      unit.record = memory + stage * at.record;
      unit.exact_keys = view.exact_keys + exact_offset;
      unit.exact_values = view.exact_values + exact_offset;
      const int start = kept ? page * page_tokens : view.first + (page - plan.head_pages) * page_tokens;
      unit.end = min(start + page_tokens, kept ? min(item.length, view.first) : item.length);
      unit.keys_coded = min(keys_coded, unit.end);
      unit.values_coded = min(values_coded, unit.end);
      for (int i = warp; i < units; i += kWarps) {
        unit.slot = i * kUnitTokens;
        unit.position = start + unit.slot;
        if (unit.position >= unit.end) break;
        float scores[2][4] = {};
        score_unit<Keys, kDim>(view, unit, key_tables, queries, staging, lane, scores);
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          const int position = unit.position + token_of_row(lane.g) + 8 * row;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& score = scores[row / 2][row % 2 * 2 + c];
            score = position < min(unit.end, limits[c]) ? score * scale[c] : kNothing;
          }
        }
        uint32_t weights[2][2];
        state.add(scores, weights);
        weigh_unit<Values, kDim>(view, unit, value_tables, staging, lane, weights, state.outputs);
      }
      __syncwarp();
      if (in_warp == 0) arrive(empty(stage));
    }
    finish_item<kDim>(state, q, plan, workspace, at, item, memory, lane);
  }
}

}  // namespace quantloom::kv_cache
