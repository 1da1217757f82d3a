// Pieces of codes into tables (kvquant), by rows in shared memory: units of codes alone, which all queries
// see.
#pragma once

#include "kv_cache/attention_rows.cuh"

namespace quantloom::kv_cache {

// Keys and values with tables of the same width, whose keys are not turned, or in registers.
template <int kBits>
struct TableRows {
  static constexpr bool kTables = true;
};

// A piece that is not the rest. Each warp has one unit of each page.
template <int kBits, int kDim, class Begin>
__device__ __forceinline__ void attend_tables(const AttentionTask& task, const AttentionItem& item, int piece,
                                              std::byte* memory, const Begin& begin) {
  constexpr int kRowBytes = (kDim * kBits + 31) / 32 * 4;
  constexpr int kCodeBytes = kUnitTokens * kRowBytes;
  constexpr int kRangeBytes = kUnitTokens * 4;
  const KVView& view = task.view;
  const KVPart& keys = view.layout.keys;
  const KVPart& values = view.layout.values;
  const AttentionMemory& at = task.at;
  const int in_warp = static_cast<int>(threadIdx.x) % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const int slot = static_cast<int>(threadIdx.x) / 32 * kUnitTokens;
  const auto* queries =
      reinterpret_cast<const uint32_t*>(memory + at.queries) + lane.g * RowQueries<kDim>::kQueryWords;
  const auto* scales = reinterpret_cast<const float*>(memory + at.scales);
  const std::byte* tables = memory + at.tables;
  const StagedTables<kDim> table_at(view.layout);
  const StagedMemory<kDim> own_at(view.layout);
  std::byte* const rows = memory + static_cast<int>(threadIdx.x) / 32 * at.warp;
  std::byte* const own_position = rows + own_at.position;
  std::byte* const own_keys = rows + own_at.keys;
  std::byte* const own_values = rows + own_at.values;
  const bool turned = view.rotated > 0;
  const __half2* const channels = view.key_ranges + item.head * kDim;
  const UnitOutliers key_outliers(keys, kDim, slot, kUnitTokens);
  const UnitOutliers value_outliers(values, kDim, slot, kUnitTokens);
  const auto entries_of = [](const std::byte* copied, const UnitOutliers& outliers) {
    return reinterpret_cast<const uint32_t*>(copied) + outliers.skipped;
  };
  const auto copy_outliers = [](std::byte* to, const std::byte* record, const UnitOutliers& outliers) {
    if (outliers.count > 0)
      copy_bytes(to, record + outliers.begin, (outliers.skipped + outliers.count + 3) / 4 * 16);
  };

  const int last_page = item.begin(piece + 1);
  int page = item.begin(piece);
  std::byte* const* const pages = view.pages + item.sequence * view.table_pages;
  const int64_t head_offset = item.head * view.layout.record_bytes;
  const auto record_of = [&](int of) -> const std::byte* {
    return of < last_page ? pages[of] + head_offset : nullptr;
  };
  const auto copy_keys = [&](const std::byte* record, int of) {
    if (record != nullptr) {
      copy_run<kCodeBytes>(own_keys, record + keys.codes + slot * kRowBytes);
      copy_outliers(own_keys + kCodeBytes, record, key_outliers);
      if (turned) {
        const int64_t from = static_cast<int64_t>(view.first + of * kWarps * kUnitTokens + slot) * (kDim / 2);
        copy_run<kDim * 2>(own_position, reinterpret_cast<const std::byte*>(view.cosines + from));
        copy_run<kDim * 2>(own_position + kDim * 2, reinterpret_cast<const std::byte*>(view.sines + from));
      }
    }
    cuda::commit_copies();
  };
  const auto copy_values = [&](const std::byte* record) {
    if (record != nullptr) {
      copy_run<kCodeBytes>(own_values, record + values.codes + slot * kRowBytes);
      copy_run<kRangeBytes>(own_values + kCodeBytes, record + values.parameters + slot * 4);
      copy_outliers(own_values + kCodeBytes + kRangeBytes, record, value_outliers);
    }
    cuda::commit_copies();
  };
  const std::byte* record = record_of(page);
  copy_keys(record, page);
  copy_values(record);
  record = record_of(page + 1);
  begin();
  const float factors[2] = {scales[2 * lane.t], scales[2 * lane.t + 1]};
  RunningSoftmax<kDim> state;
  state.clear();
  for (; page < last_page; ++page) {
    const std::byte* const following = record;
    record = record_of(page + 2);
    cuda::wait_for_copies_but<1>();
    __syncwarp();
    decode_by_table<kBits, kDim, KVSide::keys>(own_keys, tables + table_at.pairs[0], channels, kUnitTokens,
                                               rows);
    __syncwarp();
    if (key_outliers.count > 0) {
      add_outliers<kDim>(entries_of(own_keys + kCodeBytes, key_outliers), key_outliers.count, slot, rows);
      __syncwarp();
    }
    float products[2][4] = {};
    if (turned) {
      multiply_keys<true, kDim>(rows, tables + table_at.turns, own_position, queries, lane, products);
    } else {
      multiply_keys<false, kDim>(rows, nullptr, nullptr, queries, lane, products);
    }
    __syncwarp();
    copy_keys(following, page + 1);
    uint32_t weights[2][2];
    state.template weigh<true>(products, factors, {0.0F, 0.0F}, 0, weights);
    cuda::wait_for_copies_but<1>();
    __syncwarp();
    decode_by_table<kBits, kDim, KVSide::values>(own_values, tables + table_at.pairs[1], nullptr, kUnitTokens,
                                                 rows);
    __syncwarp();
    if (value_outliers.count > 0) {
      add_outliers<kDim>(entries_of(own_values + kCodeBytes + kRangeBytes, value_outliers),
                         value_outliers.count, slot, rows);
      __syncwarp();
    }
    copy_values(following);
    multiply_rows<kDim>(rows, weights, lane, state.outputs);
    sum_weights(weights[0], state.parts[0]);
    sum_weights(weights[1], state.parts[0]);
    __syncwarp();
  }
  __syncthreads();  // sums take the place of rows
  finish_piece<kDim, true>(
      state, [&](auto emit) { for_row_sums<kDim>(state.outputs, task.plan.item_rows, lane, emit); }, task,
      item, piece, memory, lane);
}

// Any piece.
template <class Rows, int kDim>
struct RowPieces {
  template <class Begin>
  static __device__ __forceinline__ void attend(const AttentionTask& task, const AttentionItem& item,
                                                int piece, std::byte* memory, const Begin& begin) {
    attend_staged<Rows, kDim>(task, item, piece, memory, begin);
  }
};
template <int kBits, int kDim>
struct RowPieces<TableRows<kBits>, kDim> {
  template <class Begin>
  static __device__ __forceinline__ void attend(const AttentionTask& task, const AttentionItem& item,
                                                int piece, std::byte* memory, const Begin& begin) {
    if (piece < task.plan.rest) {
      attend_staged<AnyRows, kDim>(task, item, piece, memory, begin);
    } else {
      attend_tables<kBits, kDim>(task, item, piece, memory, begin);
    }
  }
};

}  // namespace quantloom::kv_cache
