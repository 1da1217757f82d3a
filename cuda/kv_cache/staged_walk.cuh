// The units that the warps of a block take of a piece by rows.
#pragma once

#include <climits>

#include "kv_cache/attention_plan.cuh"

namespace quantloom::kv_cache {

// A unit of a piece by rows: tokens from `position` on, at `slot` of a record (null: none are codes). Tokens
// from `end` on are none of its.
struct StagedUnit {
  const std::byte* record;
  int position;
  int slot;
  int end;

  __device__ __forceinline__ bool exists() const { return position < end; }
};

// The units of a warp in a piece, in order: those of the tokens kept at the start, if it is the first one,
// then those of its pages. Units do not cross the borders of pages.
class StagedWalk {
 public:
  __device__ __forceinline__ StagedWalk(const KVView& view, const AttentionItem& item, int piece)
      : view_(view),
        item_(item),
        kept_(piece == 0 ? min(view.first, item.cut.length) : 0),
        start_(static_cast<int>(threadIdx.x) / 32 * kUnitTokens),
        page_(piece == 0 ? item.cut.pages : item.begin(piece)),
        last_page_(piece == 0 ? INT_MAX : item.begin(piece + 1)),
        page_tokens_(static_cast<int>(view.layout.page_tokens)),
        units_((page_tokens_ + kUnitTokens - 1) / kUnitTokens),
        unit_(static_cast<int>(threadIdx.x) / 32) {}

  __device__ __forceinline__ StagedUnit next() {
    if (start_ < kept_) {
      const int start = start_;
      start_ += kWarps * kUnitTokens;
      return {nullptr, start, 0, kept_};
    }
    while (unit_ >= units_) unit_ -= units_, ++page_;
    const int start = view_.first + page_ * page_tokens_;
    if (page_ >= last_page_ || start >= item_.cut.length) return {nullptr, 0, 0, 0};
    const int slot = unit_ * kUnitTokens;
    unit_ += kWarps;
    const std::byte* record = nullptr;
    if (start < max(item_.cut.keys_coded, item_.cut.values_coded)) {
      record =
          view_.pages[item_.sequence * view_.table_pages + page_] + item_.head * view_.layout.record_bytes;
    }
    const int end = min(start + page_tokens_, item_.cut.length);
    // The last page may have fewer units, of which this is none.
    return {record, min(start + slot, end), slot, end};
  }

 private:
  const KVView& view_;
  const AttentionItem& item_;
  int kept_;
  int start_;
  int page_;
  int last_page_;
  int page_tokens_;
  int units_;
  int unit_;
};

}  // namespace quantloom::kv_cache
