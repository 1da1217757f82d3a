// The rest of a sequence whose codes come in matrices: tokens that no run of pages holds.
#pragma once

#include "kv_cache/attention_pieces.cuh"
#include "kv_cache/exact_matrices.cuh"

namespace quantloom::kv_cache {

constexpr int kRestPieces = 2;

// Queries in natural order, for exact keys.
template <int kDim>
struct ExactQueries {
  static constexpr int kPairDistance = 1;
  static constexpr int kQueryWords = kDim / 2 + 4;  // of a row

  static __device__ __forceinline__ int place(int word) { return word; }
  static __device__ __forceinline__ int channel(int word) { return 2 * word; }
};

// Piece 0 is the tokens with exact values: those that are kept at the start, and the window. Piece 1 is those
// with coded values behind the last run. Keys are codes as far as they are: a unit has either. Warps take
// turns with units, which do not cross the borders of pages.
template <class Keys, class Values, int kDim>
__device__ __forceinline__ void attend_rest(const AttentionTask& task, const AttentionItem& item,
                                            std::byte* memory) {
  using Exact = ExactMatrices<kDim>;
  const int in_warp = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const KVView& view = task.view;
  const AttentionMemory& at = task.at;
  const AttentionPlan& plan = task.plan;
  const SequencePieces cut = item.cut;
  const int item_rows = plan.item_rows;
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* exact_queries = reinterpret_cast<uint32_t*>(memory + at.exact_queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  Queries<Keys, kDim>(task.q, plan, item).store(queries, scales);
  Queries<ExactQueries<kDim>, kDim>(task.q, plan, item).store(exact_queries, scales);
  __syncthreads();
  const int row = lane.g & (item_rows - 1);
  const int columns[2] = {2 * lane.t & (item_rows - 1), (2 * lane.t + 1) & (item_rows - 1)};
  const float scale[2] = {scales[columns[0]], scales[columns[1]]};
  int seen[2];
#pragma unroll
  for (int c = 0; c < 2; ++c)
    seen[c] = cut.length - task.q.tokens + query_row(plan, item, columns[c]).token + 1;

  std::byte* const own = memory + warp * at.warp;
  std::byte* const rows = own + at.keys;
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  const int64_t head_offset = item.head * view.layout.record_bytes;
  const int row_bytes = kDim * (view.dtype == DType::f32 ? 4 : 2);
  const int64_t exact_offset = (static_cast<int64_t>(item.sequence) * view.kv_heads + item.head) *
                               (view.first + view.window) * row_bytes;
  RunningSoftmax<kDim, Values::kParts> state;

  // The tokens [begin, end) of the unit from position `start` on.
  const auto take = [&](int piece, int start, int begin, int end) {
    const bool coded_keys = start >= view.first && start < cut.keys_coded;
    const int slot = (start - view.first) % page_tokens;
    // The exact row of a token of the unit: rows of the window go round.
    const int window_slot = start < view.first ? start : view.first + (start - view.first) % view.window;
    const auto exact_row = [&](const std::byte* from, int token) {
      int row = window_slot + token;
      if (start >= view.first && row >= view.first + view.window) row -= view.window;
      return from + exact_offset + row * row_bytes;
    };
    Keys keys(view, coded_keys ? slot : 0, own, queries + row * Keys::kQueryWords, lane, plan.mark);
    Values values(view, piece == 0 ? 0 : slot, own, item_rows, lane, plan.mark);
    const std::byte* record = nullptr;
    if (coded_keys) {
      const int page = (start - view.first) / page_tokens;
      record = view.pages[item.sequence * view.table_pages + page] + head_offset;
    }
    __syncwarp();
    // Without the hint that they are read once: of that, nvcc 13.0 makes a wrong instruction here.
    keys.template fetch<false>(0, record, coded_keys);
    values.template fetch<false>(at.keys, record, piece == 1);
    cuda::wait_for_copies();
    float products[2][4] = {};
    float least[2] = {};
    float factors[2] = {scale[0], scale[1]};
    if (coded_keys) {
      __syncwarp();
      keys.multiply(0, products, least);
      factors[0] /= Keys::kProduct, factors[1] /= Keys::kProduct;
    } else {
      Exact::template load<false>(rows, view.dtype, [&](int token) {
        const int position = start + token;
        return position < end ? exact_row(view.exact_keys, token) : nullptr;
      });
      Exact::multiply_keys(rows, exact_queries + row * ExactQueries<kDim>::kQueryWords, lane, products);
    }
    const float addends[2] = {least[0] * scale[0], least[1] * scale[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = start + 8 * i + lane.g;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (position < begin || position >= min(end, seen[c])) products[i / 2][i % 2 * 2 + c] = kNothing;
      }
    }
    typename Values::Loaded loaded;
    const uint32_t largest = piece == 1 ? values.load(at.keys, lane, loaded) : 0;
    uint32_t weights[2][2];
    state.template weigh<false>(products, factors, addends, largest, weights);
    if (piece == 1) {
      values.multiply(at.keys, loaded, weights, state.outputs, state.parts);
    } else {
      Exact::template load<true>(rows, view.dtype, [&](int token) {
        const int position = start + token;
        return position >= begin && position < end ? exact_row(view.exact_values, token) : nullptr;
      });
      sum_weights(weights[0], state.parts[0]);
      sum_weights(weights[1], state.parts[0]);
      Exact::multiply_values(rows, weights, state.outputs);
    }
  };

  for (int piece = item.first_piece; piece < min(item.last_piece, kRestPieces); ++piece) {
    state.clear();
    // Units of tokens that are kept, then those of the window; or those of codes.
    const int kept = piece == 0 ? min(view.first, cut.length) : 0;
    const int kept_units = (kept + kUnitTokens - 1) / kUnitTokens;
    const int begin = piece == 0 ? max(cut.values_coded, view.first) : view.first + cut.pages * page_tokens;
    const int end = piece == 0 ? cut.length : cut.values_coded;
    const int aligned = begin - (begin - view.first) % kUnitTokens;
#pragma unroll 1
    for (int unit = warp; unit < kept_units || aligned + (unit - kept_units) * kUnitTokens < end;
         unit += kWarps) {
      const bool keeps = unit < kept_units;
      const int start = keeps ? unit * kUnitTokens : aligned + (unit - kept_units) * kUnitTokens;
      take(piece, start, keeps ? 0 : begin, keeps ? kept : end);
    }
    Values values(view, 0, own, item_rows, lane, plan.mark);
    finish_piece<kDim, false>(
        state,
        [&](auto emit) {
          if (piece == 1) {
            values.for_sums(state.outputs, state.parts, item_rows, lane, emit);
          } else if (2 * lane.t < item_rows) {
            Exact::for_sums(state.outputs, lane, emit);
          }
        },
        task, item, piece, memory, lane);
  }
}

}  // namespace quantloom::kv_cache
