// The forward pass of the Viterbi search. Neighbouring outgoing edges lie in the lanes of a vector; the
// states of a row leave by them and came in by at most as many incoming edges, whose costs are spread to the
// lanes.
#include <algorithm>
#include <bit>
#include <limits>

#include "formats/trellis_search.hpp"
#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "formats/trellis_forward.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::trellis::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, SearchTable::kLanes>;
using VF = hn::VFromD<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// kOneEdge: all states of a vector come in by one edge.
template <int kWeights, int kRings, bool kOneEdge>
void forward_rings(const ForwardStep& step, int first_ring) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const SearchTable& table = *step.table;
  const int window = table.shape().window;
  const int low_bits = window - step.next_bits;
  const int64_t forgotten = int64_t{1} << step.next_bits;
  const int64_t edges = int64_t{1} << low_bits;
  const float* HWY_RESTRICT rows = table.rows(step.next_bits);
  const auto spread = hn::IndicesFromVec(df, hn::ShiftRightSame(hn::Iota(di, 0), kOneEdge ? 0 : step.bits));
  VF target[kRings][kWeights];
  const float* HWY_RESTRICT costs[kRings];
  float* HWY_RESTRICT next[kRings];
  for (int r = 0; r < kRings; ++r) {
    for (int w = 0; w < kWeights; ++w) target[r][w] = hn::Set(df, step.targets[first_ring + r][w]);
    costs[r] = step.costs[first_ring + r];
    next[r] = step.next[first_ring + r];
  }
  for (int64_t edge = 0; edge < edges; edge += kLanes) {
    // kLanes of the SearchTable::kLanes columns of a block of rows.
    const float* HWY_RESTRICT row = rows +
                                    edge / SearchTable::kLanes * forgotten * kWeights * SearchTable::kLanes +
                                    edge % SearchTable::kLanes;
    VF least[kRings];
    for (int r = 0; r < kRings; ++r) least[r] = hn::Set(df, std::numeric_limits<float>::infinity());
    for (int64_t h = 0; h < forgotten; ++h, row += kWeights * SearchTable::kLanes) {
      const int64_t from = (h << low_bits | edge) >> step.bits;
      const VF weight = hn::LoadU(df, row);
      VF second = weight;
      if (kWeights == 2) second = hn::LoadU(df, row + SearchTable::kLanes);
      for (int r = 0; r < kRings; ++r) {
        const VF cost = kOneEdge ? hn::Set(df, costs[r][from])
                                 : hn::TableLookupLanes(hn::LoadU(df, costs[r] + from), spread);
        const VF difference = hn::Sub(weight, target[r][0]);
        VF error = hn::Mul(difference, difference);
        if (kWeights == 2) {
          const VF other = hn::Sub(second, target[r][kWeights - 1]);
          error = hn::Add(error, hn::Mul(other, other));
        }
        least[r] = hn::Min(least[r], hn::Add(cost, error));
      }
    }
    for (int r = 0; r < kRings; ++r) hn::StoreU(least[r], df, next[r] + edge);
  }
}

template <int kWeights, bool kOneEdge>
void forward_groups(const ForwardStep& step) {
  int ring = 0;
  for (; ring + 4 <= step.count; ring += 4) forward_rings<kWeights, 4, kOneEdge>(step, ring);
  for (; ring + 2 <= step.count; ring += 2) forward_rings<kWeights, 2, kOneEdge>(step, ring);
  for (; ring < step.count; ++ring) forward_rings<kWeights, 1, kOneEdge>(step, ring);
}

void forward_vectors(const ForwardStep& step) {
  const bool one_edge = 1 << step.bits >= kLanes;
  if (step.table->shape().weights_per_step == 2) {
    one_edge ? forward_groups<2, true>(step) : forward_groups<2, false>(step);
  } else {
    one_edge ? forward_groups<1, true>(step) : forward_groups<1, false>(step);
  }
}

}  // namespace quantloom::trellis::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::trellis {

HWY_EXPORT(forward_vectors);

void forward(const ForwardStep& step) {
  if (step.table->shape().window - step.next_bits < std::countr_zero(unsigned{SearchTable::kLanes})) {
    return forward_reference(step);
  }
  HWY_DYNAMIC_DISPATCH(forward_vectors)(step);
}

void forward_reference(const ForwardStep& step) {
  const SearchTable& table = *step.table;
  const int low_bits = table.shape().window - step.next_bits;
  for (int r = 0; r < step.count; ++r) {
    for (int64_t edge = 0; edge < int64_t{1} << low_bits; ++edge) {
      float least = std::numeric_limits<float>::infinity();
      for (int64_t h = 0; h < int64_t{1} << step.next_bits; ++h) {
        const auto state = static_cast<uint32_t>(h << low_bits | edge);
        const float cost = step.costs[r][state >> step.bits];
        least = std::min(least, cost + table.error(state, step.targets[r]));
      }
      step.next[r][edge] = least;
    }
  }
}

}  // namespace quantloom::trellis
#endif  // HWY_ONCE
