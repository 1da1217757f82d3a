// Decode attention straight from pages of codes ("flash decoding"): blocks take shares of all pieces of work
// (a run of pages of one KV head, for up to eight queries). Each warp copies the units of tokens that it will
// take next into shared memory, decodes them into operands of tensor cores, and keeps a running softmax. What
// the warps of a block found is added in order, and the block that finishes the last piece of a head adds the
// pieces, in order.
#pragma once

#include <type_traits>

#include "common/phases.cuh"
#include "kernels/overlap.cuh"
#include "kv_cache/attention_rest.cuh"
#include "kv_cache/attention_tables.cuh"
#include "kv_cache/code_runs.cuh"

namespace quantloom::kv_cache {

// An item without the rest: units that are codes alone, which all queries see. Units take turns with the
// parts of a warp's memory; runs are of an even number of pages, so that a piece begins with the first part.
template <class Keys, class Values, int kDim>
__device__ __forceinline__ void attend_codes(const AttentionTask& task, const AttentionItem& item,
                                             std::byte* memory) {
  const int in_warp = threadIdx.x % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const KVView& view = task.view;
  const AttentionMemory& at = task.at;
  const int item_rows = task.plan.item_rows;
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  const uint32_t barrier = cuda::shared_address(memory + at.barrier);
  // Constants where they do not depend on the layout.
  const int keys_bytes = Keys::kUnitBytes > 0 ? Keys::kUnitBytes : at.keys;
  const int unit_bytes = Keys::kUnitBytes > 0 ? Keys::kUnitBytes + Values::kUnitBytes : at.unit;
  // A warp takes a unit of each page.
  const int warp = threadIdx.x / 32;
  const int slot = warp * kUnitTokens;
  const bool works = slot < static_cast<int>(view.layout.page_tokens);
  const Queries<Keys, kDim> asked(task.q, task.plan, item);
  std::byte* const units = memory + warp * at.warp;
  Keys keys(view, slot, units, queries + (lane.g & (item_rows - 1)) * Keys::kQueryWords, lane,
            task.plan.mark);
  Values values(view, slot, units, item_rows, lane, task.plan.mark);
  const int first_piece = max(item.first_piece, task.plan.rest);
  const int first_page = item.begin(first_piece);
  const int64_t head_offset = item.head * view.layout.record_bytes;
  const std::byte* const* const pages = keep(view.pages + item.sequence * view.table_pages + first_page);
  const int last_page = item.begin(item.last_piece) - 1 - first_page;
  const auto address = [&](int page) {
    const std::byte* result = nullptr;
    asm("ld.global.u64 %0, [%1];" : "=l"(result) : "l"(pages + min(page, last_page)));
    return result;
  };
  const auto fetch = [&](const std::byte* page, bool exists, int unit) {
    keys.fetch(unit, page + head_offset, exists);
    values.fetch(unit + keys_bytes, page + head_offset, exists);
    cuda::commit_copies();
  };
  const std::byte* first[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) first[stage] = address(stage);
  const std::byte* next = address(kStages);  // is asked for a unit before it is used
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    fetch(first[stage], works && stage <= last_page, stage * unit_bytes);
    values.prepare(units + stage * unit_bytes + keys_bytes);
  }
  asked.store(queries, scales);
  __syncthreads();
  const float factors[2] = {scales[2 * lane.t & (item_rows - 1)] / Keys::kProduct,
                            scales[(2 * lane.t + 1) & (item_rows - 1)] / Keys::kProduct};
  RunningSoftmax<kDim, Values::kParts> state;
  int page = 0;
  // What warps find is added one piece later, when the others have stored it, too.
  for (int piece = first_piece;; ++piece) {
    const bool exists = piece < item.last_piece;
    state.clear();
    const int end = works && exists ? item.begin(piece + 1) - first_page : 0;
    for (; page < end; page += kStages) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        // All lanes agree, which a compiler does not know.
        if (stage > 0 && __any_sync(0xFFFFFFFFU, page + stage == end)) break;
        const int unit = stage * unit_bytes;
        cuda::wait_for_copies_but<kStages - 1>();
        __syncwarp();
        float products[2][4] = {};
        float least[2] = {};
        typename Values::Loaded loaded;
        uint32_t weights[2][2];
        keys.multiply(unit, products, least);
        const uint32_t largest = values.load(unit + keys_bytes, lane, loaded);
        const float addends[2] = {least[0] * Keys::kProduct * factors[0],
                                  least[1] * Keys::kProduct * factors[1]};
        state.template weigh<true>(products, factors, addends, largest, weights);
        values.multiply(unit + keys_bytes, loaded, weights, state.outputs, state.parts);
        __syncwarp();
        fetch(next, page + stage + kStages <= last_page, unit);
        next = address(page + stage + kStages + 1);
      }
    }
    if (piece > first_piece) {
      cuda::wait_for_phase(barrier, (item.phase + piece - 1 - first_piece) & 1);
      PieceSums<kDim>(task.plan, at, item, piece - 1, memory)
          .template add<false>(task.q, task.plan, task.workspace, item, piece - 1, at.rows);
    }
    if (!exists) break;
    PieceSums<kDim>(task.plan, at, item, piece, memory)
        .store(
            state, [&](auto emit) { values.for_sums(state.outputs, state.parts, item_rows, lane, emit); },
            item_rows, at.rows, lane);
    cuda::arrive_at_phase(barrier);
  }
}

// The same by code for its number of groups, where there is some.
template <class Keys, class Values, int kDim>
__device__ __forceinline__ void attend_item(const AttentionTask& task, const AttentionItem& item,
                                            std::byte* memory) {
  if constexpr (Values::kDividesGroups) {
    if (task.view.layout.values.group == kDim / 4)
      return attend_codes<Keys, typename Values::OfFourGroups, kDim>(task, item, memory);
  }
  attend_codes<Keys, Values, kDim>(task, item, memory);
}

// Values void: pieces by rows in shared memory, Keys which; else those of codes. A launch for the rest of
// sequences and one for their codes may run at the same time.
template <class Keys, class Values, int kDim>
__global__ void __launch_bounds__(kThreads, kDim > 128 ? 2 : kBlocks)
    attend_kernel(const __grid_constant__ KVView view, const __grid_constant__ KVQueries q,
                  const __grid_constant__ AttentionPlan plan,
                  const __grid_constant__ AttentionWorkspace workspace,
                  const __grid_constant__ AttentionMemory at) {
  // A launch for codes beside one for the rest need not wait: that one has waited.
  const bool beside = plan.skipped > 0;
  if (!beside) cuda::wait_for_previous();
  cuda::let_next_begin();
  auto* memory = cuda::dynamic_shared_memory<std::byte>();
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  if constexpr (has_tables<Keys>) fill_tables<kDim>(view, memory + at.tables);
  const AttentionTask task = {view, q, plan, workspace, at};
  auto& walk = *reinterpret_cast<AttentionWalk*>(memory + at.walk);
  const AttentionItem& item = walk.item;
  if (threadIdx.x < 32) walk.begin(view, q, plan);
  if (threadIdx.x == 0) cuda::start_phases(cuda::shared_address(memory + at.barrier), kThreads);
  while (true) {
    __syncwarp();
    if (threadIdx.x == 0) walk.next(view, q, plan);
    __syncthreads();
    if (item.place < 0) break;
    if constexpr (std::is_void_v<Values>) {
      for (int piece = item.first_piece; piece < item.last_piece; ++piece) {
        RowPieces<Keys, kDim>::attend(task, item, piece, memory, [&] {
          if (piece > item.first_piece) return;
          Queries<RowQueries<kDim>, kDim>(q, plan, item).store(queries, scales);
          __syncthreads();
        });
        __syncthreads();  // rows take the place of sums
      }
    } else {
      if constexpr (Keys::kTakesRest) {
        if (item.first_piece < plan.rest) attend_rest<Keys, Values, kDim>(task, item, memory);
      }
      if (item.last_piece > plan.rest) attend_item<Keys, Values, kDim>(task, item, memory);
    }
    if (item.cut.pieces > 1 && item.first_piece < item.last_piece) finish_place<kDim>(task, item, memory);
    __syncthreads();
  }
  if (beside) cuda::wait_for_previous();
}

}  // namespace quantloom::kv_cache
