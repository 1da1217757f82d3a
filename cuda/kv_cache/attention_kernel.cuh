// Decode attention straight from pages of codes ("flash decoding"): blocks take shares of all pieces of work
// (a run of pages of one KV head, for up to eight queries). Each warp copies the units of tokens that it will
// take next into shared memory, decodes them into operands of tensor cores, and keeps a running softmax. What
// the warps of a block found is added in order, and the block that finishes the last piece of a head adds the
// pieces, in order.
#pragma once

#include <type_traits>

#include "kernels/overlap.cuh"
#include "kv_cache/attention_rest.cuh"
#include "kv_cache/attention_tables.cuh"
#include "kv_cache/code_runs.cuh"

namespace quantloom::kv_cache {

// An item without the rest: units that are codes alone, which all queries see. kStages units of a warp are in
// shared memory or on their way.
template <class Keys, class Values, int kDim, int kStages>
__device__ __forceinline__ void attend_codes(const AttentionTask& task, const AttentionItem& item,
                                             std::byte* memory) {
  const int in_warp = threadIdx.x % 32;
  const Lane lane = {in_warp / 4, in_warp % 4};
  const KVView& view = task.view;
  const AttentionMemory& at = task.at;
  const int item_rows = task.plan.item_rows;
  auto* queries = reinterpret_cast<uint32_t*>(memory + at.queries);
  auto* scales = reinterpret_cast<float*>(memory + at.scales);
  // A warp takes a unit of each page.
  const int warp = threadIdx.x / 32;
  const int slot = warp * kUnitTokens;
  const bool works = slot < static_cast<int>(view.layout.page_tokens);
  Keys keys(view, slot, queries + (lane.g & (item_rows - 1)) * Keys::kQueryWords, lane, task.plan.mark);
  Values values(view, slot, item_rows, lane, task.plan.mark);
  const int first_piece = max(item.first_piece, task.plan.rest);
  const int first_page = item.begin(first_piece);
  std::byte* const own = memory + warp * at.warp;
  std::byte* const last_stage = own + (kStages - 1) * at.unit;
  const int64_t head_offset = item.head * view.layout.record_bytes;
  const std::byte* const* const pages = keep(view.pages + item.sequence * view.table_pages + first_page);
  const int last_page = item.begin(item.last_piece) - 1 - first_page;
  int asked = 0;  // of the addresses of pages, which are used two steps later
  const auto next_page = [&] {
    const std::byte* page = nullptr;
    asm("ld.global.u64 %0, [%1];" : "=l"(page) : "l"(pages + min(asked, last_page)));
    ++asked;
    return page;
  };
  const auto fetch = [&](const std::byte* page, bool exists, std::byte* to) {
    keys.fetch(to, page + head_offset, exists);
    values.fetch(to + at.keys, page + head_offset, exists);
    cuda::commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    std::byte* const unit = own + stage * at.unit;
    fetch(next_page(), works && stage <= last_page, unit);
    values.prepare(unit + at.keys);
  }
  const std::byte* ahead[2] = {next_page(), next_page()};
  load_queries<Keys, kDim>(task.q, task.plan, item, queries, scales);
  __syncthreads();
  const float scale[2] = {scales[2 * lane.t & (item_rows - 1)], scales[(2 * lane.t + 1) & (item_rows - 1)]};
  const float factors[2] = {scale[0] / Keys::kProduct, scale[1] / Keys::kProduct};
  RunningSoftmax<kDim> state;
  std::byte* from = own;
  for (int piece = first_piece; piece < item.last_piece; ++piece) {
    state.clear();
    // The page that is taken is kStages + 2 less than `asked`.
    const int end = works ? item.begin(piece + 1) - first_page + kStages + 2 : 0;
    while (asked < end) {
      const std::byte* const page = ahead[0];
      ahead[0] = ahead[1];
      ahead[1] = next_page();
      cuda::wait_for_copies_but<kStages - 1>();
      __syncwarp();
      float products[2][4] = {};
      float least[2] = {};
      typename Values::Loaded loaded;
      uint32_t weights[2][2];
      keys.multiply(from, products, least);
      const uint32_t largest = values.load(from + at.keys, lane, loaded);
      state.template weigh<true>(products, factors, {least[0] * scale[0], least[1] * scale[1]}, largest,
                                 weights);
      values.multiply(from + at.keys, loaded, weights, state.outputs, state.parts);
      __syncwarp();
      fetch(page, asked - 3 <= last_page, from);
      from = from == last_stage ? own : from + at.unit;
    }
    finish_piece<kDim>(
        state, [&](auto emit) { values.for_sums(state.outputs, state.parts, item_rows, lane, emit); }, task.q,
        task.plan, task.workspace, at, item, piece, memory, lane);
  }
}

// The same by code for its number of groups, where there is some.
template <class Keys, class Values, int kDim, int kStages>
__device__ __forceinline__ void attend_item(const AttentionTask& task, const AttentionItem& item,
                                            std::byte* memory) {
  if constexpr (Values::kDividesGroups) {
    if (task.view.layout.values.groups == 4)
      return attend_codes<Keys, typename Values::OfFourGroups, kDim, kStages>(task, item, memory);
  }
  attend_codes<Keys, Values, kDim, kStages>(task, item, memory);
}

// Values void: pieces by rows in shared memory, Keys which; else those of codes. A launch for the rest of
// sequences and one for their codes may run at the same time.
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
  if constexpr (has_tables<Keys>) fill_tables<kDim>(view, memory + at.tables);
  const AttentionTask task = {view, q, plan, workspace, at};
  auto& walk = *reinterpret_cast<AttentionWalk*>(memory + at.walk);
  const AttentionItem& item = walk.item;
  if (threadIdx.x < 32) walk.begin(view, q, plan);
  while (true) {
    __syncwarp();
    if (threadIdx.x == 0) walk.next(view, q, plan);
    __syncthreads();
    if (item.place < 0) break;
    if constexpr (std::is_void_v<Values>) {
      for (int piece = item.first_piece; piece < item.last_piece; ++piece) {
        RowPieces<Keys, kDim>::attend(task, item, piece, memory, [&] {
          if (piece > item.first_piece) return;
          load_queries<RowQueries<kDim>, kDim>(q, plan, item, queries, scales);
          __syncthreads();
        });
        __syncthreads();  // rows take the place of sums
      }
    } else {
      if constexpr (Keys::kTakesRest) {
        if (item.first_piece < plan.rest) attend_rest<Keys, Values, kDim>(task, item, memory);
      }
      if (item.last_piece > plan.rest) attend_item<Keys, Values, kDim, kStages>(task, item, memory);
    }
    if (item.cut.pieces > 1 && item.first_piece < item.last_piece)
      finish_place<kDim>(q, plan, workspace, at, item, memory);
    __syncthreads();
  }
  cuda::wait_for_previous();
}

}  // namespace quantloom::kv_cache
