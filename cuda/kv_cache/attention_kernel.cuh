// Decode attention straight from pages of codes ("flash decoding"): blocks take shares of all pieces of work
// (a run of pages of one KV head, for up to eight queries). Each warp copies the units of tokens that it will
// take next into shared memory, decodes them into operands of tensor cores, and keeps a running softmax. What
// the warps of a block found is added in order, and the block that finishes the last piece of a head adds the
// pieces, in order.
#pragma once

#include <climits>
#include <type_traits>

#include "common/load_float.cuh"
#include "common/store_float.cuh"
#include "kernels/overlap.cuh"
#include "kv_cache/attention_plan.cuh"
#include "kv_cache/staged_rows.cuh"

namespace quantloom::kv_cache {

constexpr float kNothing = -__builtin_huge_valf();  // the largest of no scores

// Where things lie in shared memory, in bytes.
struct AttentionMemory {
  int warp = 0;  // of each warp: kStages of keys, kStages of values; or rows that it decodes
  int keys = 0;  // of a unit
  int values = 0;
  int queries = 0;
  int sums = 0;  // [kWarps, rows, head_dim]
  int rows = 0;
  int weights = 0;  // float2 [kWarps, kRows]
  int scales = 0;   // float [kRows]
  int tables = 0;   // float [2, 16]
  int finished = 0;
  int bytes = 0;
};

template <int kDim>
constexpr int kQueryWords = kDim / 2 + 4;  // of a row

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
    // 2^(exponent - 1) <= largest < 2^exponent, so that products with scales are finite; no factor for zeros
    // and for what is not finite.
    int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 126;
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

// 2^x; numbers below 2^-126 are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A lane's part of a row of queries, as keys multiply it.
template <int kDim>
__device__ __forceinline__ const uint32_t* lane_queries(const uint32_t* queries, Lane lane) {
  return queries + lane.g * kQueryWords<kDim> + lane.t * (kDim / 8);
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
        factor[c] = now == kNothing ? 1.0F : power_of_two(largest[c] - now);
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
        const __half2 pair = __floats2half2_rn(power_of_two(scores[i][2 * half] - base[0]),
                                               power_of_two(scores[i][2 * half + 1] - base[1]));
        const float2 rounded = __half22float2(pair);
        sum[0] += rounded.x;
        sum[1] += rounded.y;
        weights[i][half] = transpose(*reinterpret_cast<const uint32_t*>(&pair));
      }
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

// Adds what the warps of a block found in a piece: the result, or a part of it in the workspace.
template <int kDim>
__device__ __forceinline__ void finish_piece(const RunningSoftmax<kDim>& state, const KVQueries& q,
                                             const AttentionPlan& plan, const AttentionWorkspace& workspace,
                                             const AttentionMemory& at, const AttentionItem& item, int piece,
                                             std::byte* memory, Lane lane) {
  auto* sums = reinterpret_cast<float*>(memory + at.sums);
  auto* weights = reinterpret_cast<float2*>(memory + at.weights);
  const int warp = threadIdx.x / 32;
  const int rows = min(kRows, plan.rows - item.row_block * kRows);
  float sum[2] = {state.sum[0], state.sum[1]};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum[c] += __shfl_xor_sync(0xFFFFFFFFU, sum[c], step);
    const int row = 2 * lane.t + c;
    if (lane.g == 0) weights[warp * kRows + row] = {state.largest[c], sum[c]};
    if (row >= rows) continue;
    float* to = sums + (warp * at.rows + row) * kDim + lane.g * (kDim / 8);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j)
      *reinterpret_cast<float2*>(to + 2 * j) = {state.outputs[j][c], state.outputs[j][2 + c]};
  }
  __syncthreads();
  const int64_t place = static_cast<int64_t>(item.place) * plan.pieces + piece;
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
      const auto part = *reinterpret_cast<const float4*>(sums + (w * at.rows + row) * kDim + d);
      value.x += factor * part.x, value.y += factor * part.y;
      value.z += factor * part.z, value.w += factor * part.w;
      total.y += factor * part_of.y;
    }
    if (item.cut.pieces == 1) {
      write_result<kDim>(q, plan, item, row, d, value, total.y);
      continue;
    }
    *reinterpret_cast<float4*>(workspace.sums + (place * kRows + row) * kDim + d) = value;
    if (d == 0) workspace.weights[place * kRows + row] = total;
  }
  __syncthreads();
}

// Counts an item's pieces, and adds all of its place in order if they were the last ones.
template <int kDim>
__device__ __forceinline__ void finish_place(const KVQueries& q, const AttentionPlan& plan,
                                             const AttentionWorkspace& workspace, const AttentionMemory& at,
                                             const AttentionItem& item, std::byte* memory) {
  auto* factors = reinterpret_cast<float2*>(memory + at.sums);
  auto* finished = reinterpret_cast<unsigned*>(memory + at.finished);
  const auto pieces = static_cast<unsigned>(item.cut.pieces);
  const int rows = min(kRows, plan.rows - item.row_block * kRows);
  if (threadIdx.x == 0) {
    __threadfence();
    const auto done = static_cast<unsigned>(item.last_piece - item.first_piece);
    *finished = atomicAdd(workspace.finished + item.place, done) + done;
    if (*finished == pieces) workspace.finished[item.place] = 0;
    __threadfence();
  }
  __syncthreads();
  if (*finished == pieces) {
    const int64_t place = static_cast<int64_t>(item.place) * plan.pieces;
    const auto weight_of = [&](int piece, int row) {
      return __ldcg(workspace.weights + (place + piece) * kRows + row);
    };
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
      float largest = kNothing;
      for (int piece = lane; piece < item.cut.pieces; piece += 32)
        largest = fmaxf(largest, weight_of(piece, row).x);
      for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFU, largest, step));
      for (int piece = lane; piece < item.cut.pieces; piece += 32) {
        const float2 weight = weight_of(piece, row);
        const float factor = weight.x == kNothing ? 0.0F : power_of_two(weight.x - largest);
        factors[row * item.cut.pieces + piece] = {factor, factor * weight.y};
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (kDim / 4); i += kWarps * 32) {
      const int row = i / (kDim / 4);
      const int d = i % (kDim / 4) * 4;
      const float* from = workspace.sums + (place * kRows + row) * kDim + d;
      float4 value = {0, 0, 0, 0};
      float total = 0;
#pragma unroll 8
      for (int piece = 0; piece < item.cut.pieces; ++piece) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(from + piece * kRows * kDim));
        const float2 factor = factors[row * item.cut.pieces + piece];
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

// A piece by rows in shared memory; the rest of a sequence is piece 0. Warps take turns with units, which do
// not cross the borders of pages, nor that of the tokens kept at the start.
template <int kDim>
__device__ __forceinline__ void attend_staged(const AttentionTask& task, const AttentionItem& item, int piece,
                                              std::byte* memory) {
  const KVView& view = task.view;
  const AttentionMemory& at = task.at;
  const SequencePieces& cut = item.cut;
  const int warp = threadIdx.x / 32;
  const int in_warp = threadIdx.x % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const auto* queries = reinterpret_cast<const uint32_t*>(memory + at.queries);
  const auto* scales = reinterpret_cast<const float*>(memory + at.scales);
  const auto* tables = reinterpret_cast<const float*>(memory + at.tables);
  std::byte* rows = memory + warp * at.warp;
  const HeadRanges key_tables = {tables, view.key_ranges + item.head * kDim};
  const HeadRanges value_tables = {tables + 16, nullptr};
  const int64_t pair = static_cast<int64_t>(item.sequence) * view.kv_heads + item.head;
  const int64_t exact_offset = pair * (view.first + view.window) * kDim * (view.dtype == DType::f32 ? 4 : 2);
  RunningSoftmax<kDim> state;
  state.clear();
  // A unit from position `start` on, at `slot` of a record; tokens from `end` on are none of its.
  const auto take = [&](int start, int slot, const std::byte* record, int end) {
    const UnitTokens keys = {
        record, slot, start, view.first, min(cut.keys_coded, end), end, view.exact_keys + exact_offset};
    const UnitTokens values = {
        record, slot, start, view.first, min(cut.values_coded, end), end, view.exact_values + exact_offset};
    float scores[2][4] = {};
    StagedKeys<kDim> staged_keys;
    staged_keys.stage(view, key_tables, keys, rows, lane);
    staged_keys.multiply(lane_queries<kDim>(queries, lane), scores);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float scale = scales[2 * lane.t + c];
      const int seen =
          min(end, cut.length - task.q.tokens + query_row(task.plan, item, 2 * lane.t + c).token + 1);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        float& score = scores[row / 2][row % 2 * 2 + c];
        score = start + token_of_row(lane.g) + 8 * row < seen ? score * scale : kNothing;
      }
    }
    uint32_t weights[2][2];
    state.add(scores, weights);
    StagedValues<kDim> staged_values;
    staged_values.stage(view, value_tables, values, rows);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      staged_values.load(rows, 16 * tile, lane);
      multiply_values<kDim>(staged_values, weights[tile], state.outputs);
    }
  };
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  const int units = (page_tokens + kUnitTokens - 1) / kUnitTokens;
  const int coded = max(cut.keys_coded, cut.values_coded);
  const int kept = piece == 0 ? min(view.first, cut.length) : 0;
  for (int start = warp * kUnitTokens; start < kept; start += kWarps * kUnitTokens)
    take(start, 0, nullptr, kept);
  const int last_page = piece == 0 ? INT_MAX : item.begin(piece + 1);
  int turn = 0;
  for (int page = piece == 0 ? cut.pages : item.begin(piece); page < last_page; ++page) {
    const int start = view.first + page * page_tokens;
    if (start >= cut.length) break;
    const int end = min(start + page_tokens, cut.length);
    const std::byte* record = nullptr;
    if (start < coded) {
      record = view.pages[item.sequence * view.table_pages + page] + item.head * view.layout.record_bytes;
    }
    for (int unit = 0; unit < units; ++unit, ++turn) {
      const int slot = unit * kUnitTokens;
      if (turn % kWarps == warp && start + slot < end) take(start + slot, slot, record, end);
    }
  }
  finish_piece<kDim>(state, task.q, task.plan, task.workspace, at, item, piece, memory, lane);
}

// The units of a warp in the pages of an item, in order.
struct UnitWalk {
  int page;
  int unit;

  __device__ __forceinline__ void advance(int units) {
    unit += kWarps;
    if (unit < units) return;
    unit = threadIdx.x / 32;
    ++page;
  }
};

// An item without the rest: units that are codes alone, which all queries see. kStages units of a warp are in
// shared memory or on their way, in groups of copies: keys and values in turn.
template <class Keys, class Values, int kDim, int kStages>
__device__ __forceinline__ void attend_codes(const AttentionTask& task, const AttentionItem& item,
                                             std::byte* memory) {
  const int in_warp = threadIdx.x % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  Keys keys(task.view, lane, task.plan.mark);
  Values values(task.view, lane, task.plan.mark);
  const KVView& view = task.view;
  const AttentionMemory& at = task.at;
  const int units = static_cast<int>(view.layout.page_tokens) / kUnitTokens;
  const int warp = threadIdx.x / 32;
  const int last_page = item.begin(item.last_piece);
  const auto* queries = reinterpret_cast<const uint32_t*>(memory + at.queries);
  const auto* scales = reinterpret_cast<const float*>(memory + at.scales);
  std::byte* const own = memory + warp * at.warp;
  std::byte* const own_values = own + kStages * at.keys;
  const int64_t head_offset = item.head * view.layout.record_bytes;
  std::byte* const* pages = view.pages + item.sequence * view.table_pages;
  const auto record_of = [&](int page) { return page < last_page ? pages[page] : nullptr; };
  const auto fetch_keys = [&](const std::byte* record, int stage, int unit) {
    if (record != nullptr) keys.fetch(own + stage * at.keys, record + head_offset, unit * kUnitTokens);
    cuda::commit_copies();
  };
  const auto fetch_values = [&](const std::byte* record, int stage, int unit) {
    if (record != nullptr)
      values.fetch(own_values + stage * at.values, record + head_offset, unit * kUnitTokens);
    cuda::commit_copies();
  };
  UnitWalk ahead = {item.begin(item.first_piece), warp};
  if (warp >= units) ahead.page = last_page;
  for (int stage = 0; stage < kStages; ++stage) {
    const std::byte* record = record_of(ahead.page);
    fetch_keys(record, stage, ahead.unit);
    fetch_values(record, stage, ahead.unit);
    ahead.advance(units);
  }
  const std::byte* ahead_record = record_of(ahead.page);
  const float scale[2] = {scales[2 * lane.t], scales[2 * lane.t + 1]};
  RunningSoftmax<kDim> state;
  int stage = 0;
  for (int piece = item.first_piece; piece < item.last_piece; ++piece) {
    state.clear();
    int left = warp < units
                   ? (item.begin(piece + 1) - item.begin(piece)) * ((units - warp + kWarps - 1) / kWarps)
                   : 0;
    for (; left > 0; --left) {
      const std::byte* record = ahead_record;
      const int unit = ahead.unit;
      ahead.advance(units);
      ahead_record = record_of(ahead.page);
      float scores[2][4] = {};
      cuda::wait_for_copies_but<2 * kStages - 1>();
      __syncwarp();
      keys.load(own + stage * at.keys);
      keys.multiply(lane_queries<kDim>(queries, lane), scores);
      __syncwarp();
      fetch_keys(record, stage, unit);
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= scale[i % 2];
      uint32_t weights[2][2];
      state.add(scores, weights);
      cuda::wait_for_copies_but<2 * kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        values.load(own_values + stage * at.values, 16 * tile);
        multiply_values<kDim>(values, weights[tile], state.outputs);
      }
      __syncwarp();
      fetch_values(record, stage, unit);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    finish_piece<kDim>(state, task.q, task.plan, task.workspace, at, item, piece, memory, lane);
  }
}

// Keys void: pieces by rows in shared memory; else those of codes alone. A launch for the rest of sequences
// and one for their codes may run at the same time.
template <class Keys, class Values, int kDim, int kStages>
__global__ void __launch_bounds__(kThreads, kDim > 128 ? 2 : kBlocks)
    attend_kernel(const __grid_constant__ KVView view, const __grid_constant__ KVQueries q,
                  const __grid_constant__ AttentionPlan plan,
                  const __grid_constant__ AttentionWorkspace workspace,
                  const __grid_constant__ AttentionMemory at) {
  cuda::let_next_begin();
  auto* memory = cuda::dynamic_shared_memory<std::byte>();
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  if constexpr (std::is_void_v<Keys>) {
    auto* tables = reinterpret_cast<float*>(memory + at.tables);
    if (view.key_values != nullptr && threadIdx.x < 32) {
      const int side = static_cast<int>(threadIdx.x) / 16;
      const int i = static_cast<int>(threadIdx.x) % 16;
      const KVPart& part = side == 0 ? view.layout.keys : view.layout.values;
      if (i < 1 << part.bits) tables[threadIdx.x] = (side == 0 ? view.key_values : view.value_values)[i];
    }
  }
  const AttentionTask task = {view, q, plan, workspace, at};
  AttentionWalk walk(view, q, plan);
  while (!walk.done()) {
    const AttentionItem item = walk.next();
    load_queries<kDim>(q, plan, item, queries, scales);
    __syncthreads();
    if constexpr (std::is_void_v<Keys>) {
      for (int piece = item.first_piece; piece < item.last_piece; ++piece)
        attend_staged<kDim>(task, item, piece, memory);
    } else {
      attend_codes<Keys, Values, kDim, kStages>(task, item, memory);
    }
    if (item.cut.pieces > 1) finish_place<kDim>(q, plan, workspace, at, item, memory);
  }
  cuda::wait_for_previous();
}

}  // namespace quantloom::kv_cache
