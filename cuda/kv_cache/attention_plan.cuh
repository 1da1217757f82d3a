// How attention is cut into pieces of work.
//
// A sequence's first piece, or its first two, are the rest: tokens that are kept at its start, and those
// after its last page that is codes alone and seen by all queries. The pages between are cut into runs. How
// many pieces a sequence has depends on its length and on the number of query tokens alone. Blocks of threads
// take equal shares of all pieces, counted in pages, each a run of consecutive ones.
#pragma once

#include "common/divisor.cuh"
#include "kv_cache/code_pairs.cuh"
#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

constexpr int kRows = 8;   // queries of an item at most: columns of an operand
constexpr int kWarps = 4;  // of a block: take turns with the units of a page
constexpr int kThreads = kWarps * 32;
constexpr int kBlocks = 3;  // of a processor
constexpr int kStages = 2;  // units of a warp in shared memory or on their way
constexpr int kMostPieces = 128;
constexpr int kWorthwhilePages = 8;
constexpr int kRestPages = 4;  // about as many take as long as a piece of the rest

struct AttentionPlan {
  int pieces = 1;           // at most, of a sequence
  int row_blocks = 1;       // of a KV head, item_rows each
  int group = 1;            // query heads of a KV head
  int first_token = 0;      // of the queries that are taken
  int rows = 1;             // of a KV head: query tokens times group
  int item_rows = kRows;    // of an item
  int places = 0;           // of row blocks: sequences * kv_heads * row_blocks
  int rest = 1;             // pieces of the rest
  int skipped = 0;          // pieces of each sequence that a launch leaves out: 0, or the rest
  bool rest_alone = false;  // the launch takes the rest and nothing else
  cuda::Divisor by_group;
  cuda::Divisor by_row_blocks;
  cuda::Divisor by_page_tokens;
  cuda::Divisor by_window;
  cuda::Divisor by_runs;             // runs that a sequence has at most
  uint32_t mark = Halves::kInteger;  // code_pair()'s, not known when this is compiled
};

// Results of pieces: sums that are not yet divided, [places, pieces, item_rows, head_dim], and for each row
// the largest score (base 2) and the sum of weights.
struct AttentionWorkspace {
  float* sums = nullptr;
  float2* weights = nullptr;     // [places, pieces, item_rows]
  unsigned* finished = nullptr;  // [places]: pieces that are done, 0 between launches
};

// How one sequence is cut.
struct SequencePieces {
  int length = 0;
  int keys_coded = 0;  // positions from here on have exact keys
  int values_coded = 0;
  int pages = 0;  // in runs
  int run = 1;    // pages of a piece
  int rest = 1;   // pieces of the rest
  int pieces = 1;

  SequencePieces() = default;
  __device__ __forceinline__ SequencePieces(const KVView& view, const KVQueries& queries,
                                            const AttentionPlan& plan, int sequence)
      : length(static_cast<int>(view.lengths[sequence])) {
    const auto in_window = [&](int tokens) { return plan.by_window.remainder(tokens); };
    keys_coded = view.first + view.coded(KVSide::keys, length, in_window);
    values_coded = view.first + view.coded(KVSide::values, length, in_window);
    const int seen = length - queries.tokens + plan.first_token + 1;
    const int later = min(min(keys_coded, values_coded), seen) - view.first;
    pages = plan.by_page_tokens.quotient(max(0, later));
    // Few pages make short pieces, so that there are some; more, pieces worth their ends.
    const int most_runs = plan.pieces - plan.rest;
    run = max(min(kWorthwhilePages, (pages + 13) / 14), plan.by_runs.quotient(pages + most_runs - 1));
    run = max((run + kStages - 1) / kStages, 1) * kStages;
    rest = plan.rest;
    pieces = rest + (pages + run - 1) / run;
  }
};

// Consecutive pieces of one place.
struct AttentionItem {
  int sequence;
  int head;
  int row_block;
  int place;
  int first_piece, last_piece;  // without the last one
  int phase;                    // pieces of codes that the block took before
  SequencePieces cut;

  // The first page of a piece that is not the rest, and of the one after.
  __device__ __forceinline__ int begin(int piece) const {
    return min(max(piece - cut.rest, 0) * cut.run, cut.pages);
  }
};

// The share of a block, item by item, in shared memory. A warp calls begin(), one of its threads next().
struct AttentionWalk {
  AttentionItem item;  // place -1: there is no more
  SequencePieces cut;
  int sequence;
  int offset;  // cost of the sequence before the next piece
  int left;
  int phase;  // as many pieces of codes as came before

  __device__ __forceinline__ void begin(const KVView& view, const KVQueries& queries,
                                        const AttentionPlan& plan) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int heads = view.kv_heads * plan.row_blocks;
    int begin = 0;
    int cost = 0;
    SequencePieces lane_cut;
    // First the cost of all sequences; then the one that holds place `begin` of it.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      int before = 0;
#pragma unroll 1
      for (int base = 0; base < view.sequences; base += 32) {
        if (pass == 0 || view.sequences > 32) {
          cost = 0;
          if (base + lane < view.sequences) {
            lane_cut = SequencePieces(view, queries, plan, base + lane);
            cost = place_cost(plan, lane_cut) * heads;
          }
        }
        int end = cost;
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xFFFFFFFFU, end, step);
          if (lane >= step) end += other;
        }
        const unsigned holds = pass == 0 ? 0 : __ballot_sync(0xFFFFFFFFU, begin < before + end);
        if (holds != 0) {
          if (lane != __ffs(static_cast<int>(holds)) - 1) return;
          sequence = base + lane;
          offset = begin - before - (end - cost);
          cut = lane_cut;
          return;
        }
        before += __shfl_sync(0xFFFFFFFFU, end, 31);
      }
      if (pass == 1) return;
      // total * block / blocks, rounded down, without numbers of 64 bits.
      const auto total = static_cast<unsigned>(before);
      const unsigned blocks = gridDim.x;
      const unsigned share = total / blocks;
      const unsigned more = total % blocks;
      // Shares of a place go to blocks far apart, so that the blocks of a processor have different ones.
      unsigned block = blockIdx.x;
      const auto places = static_cast<unsigned>(plan.places);
      if (blocks % places == 0) block = block % places * (blocks / places) + block / places;
      const unsigned rest = block * more;
      begin = static_cast<int>(block * share + rest / blocks);
      if (lane == 0) {
        left = static_cast<int>(share + (rest % blocks + more) / blocks);
        phase = 0;
      }
    }
  }

  // The next pieces of a place, perhaps none.
  __device__ __forceinline__ void next(const KVView& view, const KVQueries& queries,
                                       const AttentionPlan& plan) {
    if (left == 0) {
      item.place = -1;
      return;
    }
    const int heads = view.kv_heads * plan.row_blocks;
    int cost = place_cost(plan, cut);
    while (offset == cost * heads) {
      cut = SequencePieces(view, queries, plan, ++sequence);
      cost = place_cost(plan, cut);
      offset = 0;
    }
    const int head = offset / cost;
    const int begin = offset % cost;
    const int taken = min(cost - begin, left);
    item.sequence = sequence;
    item.head = plan.by_row_blocks.quotient(head);
    item.row_block = plan.by_row_blocks.remainder(head);
    item.place = sequence * heads + head;
    item.first_piece = first_from(plan, cut, begin);
    item.last_piece = first_from(plan, cut, begin + taken);
    item.phase = phase;
    item.cut = cut;
    phase += max(item.last_piece - max(item.first_piece, plan.rest), 0);
    offset += taken;
    left -= taken;
  }

 private:
  // Costs, in pages, of pieces of the rest.
  static __device__ __forceinline__ int rest_cost(const AttentionPlan& plan) {
    return plan.skipped == 0 ? plan.rest * kRestPages : 0;
  }
  static __device__ __forceinline__ int place_cost(const AttentionPlan& plan, const SequencePieces& cut) {
    return rest_cost(plan) + (plan.rest_alone ? 0 : cut.pages);
  }
  // The piece that begins nearest to a cost; the end of all costs is the end of all pieces.
  static __device__ __forceinline__ int first_from(const AttentionPlan& plan, const SequencePieces& cut,
                                                   int cost) {
    const int pages = cost - rest_cost(plan);
    if (pages == cut.pages) return cut.pieces;
    if (pages > 0) return min(plan.rest + (pages + cut.run / 2) / cut.run, cut.pieces);
    return plan.rest - (-pages) / kRestPages;
  }
};

}  // namespace quantloom::kv_cache
