// How attention is cut into items of work.
//
// The tokens of a sequence are taken by pages: first those of the tokens that are kept at its start, then its
// pages of codes and what is not yet coded, page_tokens each. An item is a run of consecutive pages, a piece,
// for some rows (queries of a KV head). How many pieces there are depends on the sequence's length alone.
#pragma once

#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

constexpr int kRows = 8;   // queries of an item: columns of an operand
constexpr int kWarps = 4;  // of a block that multiply; one more copies
constexpr int kThreads = (kWarps + 1) * 32;
constexpr int kBlocks = 3;  // of a processor
constexpr int kMostPieces = 128;

struct AttentionPlan {
  int pieces = 1;       // at most, of a sequence
  int row_blocks = 1;   // of a KV head, kRows each
  int group = 1;        // query heads of a KV head
  int first_token = 0;  // of the queries that are taken
  int rows = 1;         // of a KV head: query tokens times group
  int head_pages = 0;   // pages of the tokens kept exact at the start
  int items = 0;
};

// A result that is not yet divided by the sum of weights: `sums` [items, kRows, head_dim] and, for each row,
// the largest score (base 2) and the sum of weights. An item's place is pieces * (its head and row block) +
// piece.
struct AttentionWorkspace {
  float* sums = nullptr;
  float2* weights = nullptr;     // [items, kRows]
  unsigned* finished = nullptr;  // [items / pieces]: pieces that are done, 0 between launches
};

struct AttentionItem {
  int sequence;
  int head;
  int row_block;
  int piece;
  int pieces;  // of this sequence
  int length;
  int begin, end;  // pages
};

// Items in an order in which those of one head are far apart.
__device__ __forceinline__ AttentionItem attention_item(const KVView& view, const AttentionPlan& plan,
                                                        int index) {
  AttentionItem item;
  const int heads = plan.items / plan.pieces;
  item.piece = index / heads;
  int rest = index % heads;
  item.row_block = rest % plan.row_blocks;
  rest /= plan.row_blocks;
  item.head = rest % view.kv_heads;
  item.sequence = rest / view.kv_heads;
  item.length = static_cast<int>(view.lengths[item.sequence]);
  const int later = item.length > view.first ? item.length - view.first : 0;
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  const int pages = plan.head_pages + (later + page_tokens - 1) / page_tokens;
  const int run = max(1, (pages + plan.pieces - 1) / plan.pieces);
  item.pieces = max(1, (pages + run - 1) / run);
  item.begin = min(item.piece * run, pages);
  item.end = min(item.begin + run, pages);
  return item;
}

}  // namespace quantloom::kv_cache
