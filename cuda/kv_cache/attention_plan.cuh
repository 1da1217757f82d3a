// How attention is cut into pieces of work.
//
// A sequence's first piece is the rest: tokens that are kept at its start, and those after its last page that
// is codes alone and seen by all queries. The pages between are cut into runs. How many pieces a sequence has
// depends on its length and on the number of query tokens alone. Blocks of threads take equal shares of all
// pieces, each a run of consecutive ones.
#pragma once

#include "kv_cache/code_pairs.cuh"
#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

constexpr int kRows = 8;   // queries of an item: columns of an operand
constexpr int kWarps = 4;  // of a block: take turns with the units of a page
constexpr int kThreads = kWarps * 32;
constexpr int kBlocks = 3;  // of a processor
constexpr int kMostPieces = 128;
constexpr int kWorthwhilePages = 8;

struct AttentionPlan {
  int pieces = 1;                    // at most, of a sequence
  int row_blocks = 1;                // of a KV head, kRows each
  int group = 1;                     // query heads of a KV head
  int first_token = 0;               // of the queries that are taken
  int rows = 1;                      // of a KV head: query tokens times group
  int places = 0;                    // of row blocks: sequences * kv_heads * row_blocks
  int skipped = 0;                   // pieces of each sequence that a launch leaves out: 0, or 1 for the rest
  bool rest_alone = false;           // the launch takes the rest and nothing else
  uint32_t mark = Halves::kInteger;  // code_pair()'s, not known when this is compiled
};

// Results of pieces: sums that are not yet divided, [places, pieces, kRows, head_dim], and for each row the
// largest score (base 2) and the sum of weights.
struct AttentionWorkspace {
  float* sums = nullptr;
  float2* weights = nullptr;     // [places, pieces, kRows]
  unsigned* finished = nullptr;  // [places]: pieces that are done, 0 between launches
};

// How one sequence is cut.
struct SequencePieces {
  int length = 0;
  int keys_coded = 0;  // positions from here on have exact keys
  int values_coded = 0;
  int pages = 0;  // in runs
  int run = 1;    // pages of a piece
  int pieces = 1;

  __device__ __forceinline__ SequencePieces(const KVView& view, const KVQueries& queries,
                                            const AttentionPlan& plan, int sequence)
      : length(static_cast<int>(view.lengths[sequence])) {
    keys_coded = view.first + view.coded(KVSide::keys, length);
    values_coded = view.first + view.coded(KVSide::values, length);
    const int seen = length - queries.tokens + plan.first_token + 1;
    const int later = min(min(keys_coded, values_coded), seen) - view.first;
    pages = max(0, later) / static_cast<int>(view.layout.page_tokens);
    // Few pages make pieces of one or two, so that there are some; more, pieces worth their ends.
    run = max(min(kWorthwhilePages, (pages + 15) / 16), (pages + plan.pieces - 2) / (plan.pieces - 1));
    run = max(run, 1);
    pieces = 1 + (pages + run - 1) / run;
  }
};

// Consecutive pieces of one place.
struct AttentionItem {
  int sequence;
  int head;
  int row_block;
  int place;
  int first_piece, last_piece;  // without the last one
  SequencePieces cut;

  // The first page of a piece that is not the rest, and of the one after.
  __device__ __forceinline__ int begin(int piece) const {
    return min(max(piece - 1, 0) * cut.run, cut.pages);
  }
};

// The share of a block, item by item; used by whole warps.
class AttentionWalk {
 public:
  __device__ __forceinline__ AttentionWalk(const KVView& view, const KVQueries& queries,
                                           const AttentionPlan& plan)
      : view_(view), queries_(queries), plan_(plan), heads_(view.kv_heads * plan.row_blocks) {
    const int lane = threadIdx.x % 32;
    const auto count_of = [&](int s) {
      return s < view.sequences ? pieces_of(SequencePieces(view, queries, plan, s)) * heads_ : 0;
    };
    int total = 0;
    for (int base = 0; base < view.sequences; base += 32) total += count_of(base + lane);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xFFFFFFFFU, total, step);
    const auto blocks = static_cast<int64_t>(gridDim.x);
    const auto begin = static_cast<int>(total * static_cast<int64_t>(blockIdx.x) / blocks);
    left_ = static_cast<int>(total * static_cast<int64_t>(blockIdx.x + 1) / blocks) - begin;
    if (left_ == 0) return;
    // The sequence that holds piece `begin`.
    int before = 0;
    for (int base = 0; base < view.sequences; base += 32) {
      int end = count_of(base + lane);
      const int count = end;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFU, end, step);
        if (lane >= step) end += other;
      }
      const unsigned holds = __ballot_sync(0xFFFFFFFFU, begin < before + end);
      if (holds != 0) {
        const int first = __ffs(static_cast<int>(holds)) - 1;
        sequence_ = base + first;
        offset_ = begin - before - __shfl_sync(0xFFFFFFFFU, end - count, first);
        return;
      }
      before += __shfl_sync(0xFFFFFFFFU, end, 31);
    }
  }

  __device__ __forceinline__ bool done() const { return left_ == 0; }
  __device__ __forceinline__ AttentionItem next() {
    AttentionItem item = {sequence_, 0, 0, 0, 0, 0, SequencePieces(view_, queries_, plan_, sequence_)};
    while (offset_ == pieces_of(item.cut) * heads_) {
      item.sequence = ++sequence_;
      item.cut = SequencePieces(view_, queries_, plan_, sequence_);
      offset_ = 0;
    }
    const int count = pieces_of(item.cut);
    const int head = offset_ / count;
    const int first = offset_ % count;
    const int taken = min(count - first, left_);
    item.first_piece = plan_.skipped + first;
    item.last_piece = item.first_piece + taken;
    item.head = head / plan_.row_blocks;
    item.row_block = head % plan_.row_blocks;
    item.place = sequence_ * heads_ + head;
    left_ -= taken;
    offset_ += taken;
    return item;
  }

 private:
  __device__ __forceinline__ int pieces_of(const SequencePieces& cut) const {
    return plan_.rest_alone ? 1 : cut.pieces - plan_.skipped;
  }

  const KVView& view_;
  const KVQueries& queries_;
  const AttentionPlan& plan_;
  int heads_;
  int sequence_ = 0;
  int offset_ = 0;  // pieces of the sequence before the next one
  int left_ = 0;
};

}  // namespace quantloom::kv_cache
