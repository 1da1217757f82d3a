// Pieces by rows of float16 in shared memory: of any keys and values.
#pragma once

#include "kv_cache/attention_pieces.cuh"
#include "kv_cache/code_runs.cuh"
#include "kv_cache/staged_rows.cuh"
#include "kv_cache/staged_walk.cuh"

namespace quantloom::kv_cache {

// A piece by rows in shared memory; the rest of a sequence is piece 0. Warps take turns with units. begin()
// is called after the first copies have begun: queries are there when it returns.
template <class Rows, int kDim, class Begin>
__device__ __forceinline__ void attend_staged(const AttentionTask& task, const AttentionItem& item, int piece,
                                              std::byte* memory, const Begin& begin) {
  const KVView& view = task.view;
  const KVLayout& layout = view.layout;
  const AttentionMemory& at = task.at;
  const SequencePieces& cut = item.cut;
  const int in_warp = static_cast<int>(threadIdx.x) % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const auto* queries =
      reinterpret_cast<const uint32_t*>(memory + at.queries) + lane.g * RowQueries<kDim>::kQueryWords;
  const auto* scales = reinterpret_cast<const float*>(memory + at.scales);
  const std::byte* tables = memory + at.tables;
  const StagedTables<kDim> table_at(layout);
  const StagedMemory<kDim> own_at(layout);
  std::byte* const rows = memory + static_cast<int>(threadIdx.x) / 32 * at.warp;
  const bool turned = Rows::kTables && turns_in_registers<kDim>(view);
  const __half2* const channels =
      layout.keys.codec == KVCodec::channel_table ? view.key_ranges + item.head * kDim : nullptr;
  const int64_t pair = static_cast<int64_t>(item.sequence) * view.kv_heads + item.head;
  const int64_t exact_offset = pair * (view.first + view.window) * kDim * (view.dtype == DType::f32 ? 4 : 2);
  const bool copied[2] = {copies_units(layout, layout.keys), copies_units(layout, layout.values)};
  // Of a unit's tokens, the first whose keys or values are codes.
  const auto coded_of = [&](const StagedUnit& unit, int coded_end) {
    return unit.record == nullptr ? 0 : max(0, min(kUnitTokens, min(coded_end, unit.end) - unit.position));
  };
  const auto tokens_of = [&](const StagedUnit& unit, int coded_end, const std::byte* exact) {
    return UnitTokens{unit.record,
                      unit.slot,
                      unit.position,
                      coded_of(unit, coded_end),
                      min(kUnitTokens, unit.end - unit.position),
                      exact + exact_offset};
  };
  const auto copy_keys = [&](const StagedUnit& unit) {
    if (turned && unit.exists()) {
      const int64_t from = static_cast<int64_t>(unit.position) * (kDim / 2);
      copy_bytes(rows + own_at.position, reinterpret_cast<const std::byte*>(view.cosines + from), kDim * 2);
      copy_bytes(rows + own_at.position + kDim * 2, reinterpret_cast<const std::byte*>(view.sines + from),
                 kDim * 2);
    }
    const UnitTokens tokens = tokens_of(unit, cut.keys_coded, view.exact_keys);
    if (copied[0] && tokens.coded > 0)
      copy_unit<kDim>(layout, layout.keys, unit.record, unit.slot, rows + own_at.keys);
    if (tokens.coded < tokens.end) prefetch_exact<kDim>(view, tokens);
    cuda::commit_copies();
  };
  const auto copy_values = [&](const StagedUnit& unit) {
    const UnitTokens tokens = tokens_of(unit, cut.values_coded, view.exact_values);
    if (copied[1] && tokens.coded > 0)
      copy_unit<kDim>(layout, layout.values, unit.record, unit.slot, rows + own_at.values);
    if (tokens.coded < tokens.end) prefetch_exact<kDim>(view, tokens);
    cuda::commit_copies();
  };
  RunningSoftmax<kDim> state;
  state.clear();
  StagedWalk walk(view, item, piece);
  StagedUnit unit = walk.next();
  copy_keys(unit);
  copy_values(unit);
  begin();
  while (unit.exists()) {
    const StagedUnit following = walk.next();
    const UnitTokens keys = tokens_of(unit, cut.keys_coded, view.exact_keys);
    const UnitTokens values = tokens_of(unit, cut.values_coded, view.exact_values);
    float scores[2][4] = {};
    if (!Rows::kTables && takes_exact_runs<kDim>(view, keys)) {
      copy_exact<kDim>(view, values, rows);
      cuda::commit_copies();
      multiply_exact<kDim>(view, keys, queries, lane, scores);
    } else {
      if (keys.coded < kUnitTokens) {
        copy_exact<kDim>(view, keys, rows);
        cuda::wait_for_copies();
      } else {
        cuda::wait_for_copies_but<1>();
      }
      __syncwarp();
      if (copied[0] && keys.coded > 0) {
        decode_unit<kDim, KVSide::keys, Rows::kTables>(layout, rows + own_at.keys, unit.slot, keys.coded,
                                                       tables + table_at.pairs[0], channels, rows);
      } else if (keys.coded > 0) {
        decode_rows<kDim>(layout.keys, keys, rows);
      }
      if (keys.coded < kUnitTokens) finish_exact<kDim>(view, keys, rows);
      __syncwarp();
      if (Rows::kTables && view.rotated > 0 && !turned) rotate_rows<kDim>(view, keys, rows);
      if (turned) {
        multiply_keys<true, kDim>(rows, tables + table_at.turns, rows + own_at.position, queries, lane,
                                  scores);
      } else {
        multiply_keys<false, kDim>(rows, nullptr, nullptr, queries, lane, scores);
      }
      __syncwarp();
      if (values.coded < kUnitTokens) copy_exact<kDim>(view, values, rows);
      cuda::commit_copies();
    }
    copy_keys(following);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float scale = scales[2 * lane.t + c];
      const int seen =
          min(unit.end, cut.length - task.q.tokens + query_row(task.plan, item, 2 * lane.t + c).token + 1);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        float& score = scores[row / 2][row % 2 * 2 + c];
        score = unit.position + lane.g + 8 * row < seen ? score * scale : kNothing;
      }
    }
    uint32_t weights[2][2];
    state.template weigh<false>(scores, {1.0F, 1.0F}, {0.0F, 0.0F}, 0, weights);
    cuda::wait_for_copies_but<1>();
    __syncwarp();
    if (copied[1] && values.coded > 0) {
      decode_unit<kDim, KVSide::values, Rows::kTables>(layout, rows + own_at.values, unit.slot, values.coded,
                                                       tables + table_at.pairs[1], nullptr, rows);
    } else if (values.coded > 0) {
      decode_rows<kDim>(layout.values, values, rows);
    }
    if (values.coded < kUnitTokens) finish_exact<kDim>(view, values, rows);
    __syncwarp();
    copy_values(following);
    multiply_rows<kDim>(rows, weights, lane, state.outputs);
    sum_weights(weights[0], state.parts[0]);
    sum_weights(weights[1], state.parts[0]);
    __syncwarp();
    unit = following;
  }
  __syncthreads();  // sums take the place of rows
  finish_piece<kDim, true>(
      state, [&](auto emit) { for_row_sums<kDim>(state.outputs, task.plan.item_rows, lane, emit); }, task,
      item, piece, memory, lane);
}

}  // namespace quantloom::kv_cache
