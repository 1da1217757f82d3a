// The search in the plainest way: what the fast one is compared with, and timed against.
#include <limits>

#include "formats/trellis_search.hpp"

namespace quantloom::trellis {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One pass of `steps` steps from `first` on. costs: by state; predecessors [steps][states], by incoming edge.
// start: the edge to begin with, or kNoEdge.
void pass(const SearchTable& table, int64_t first, int64_t steps, int64_t start, const float* targets,
          std::vector<float>& costs, std::vector<uint32_t>& predecessors) {
  const TrellisShape& shape = table.shape();
  const int64_t states = int64_t{1} << shape.window;
  costs.resize(static_cast<size_t>(states));
  predecessors.resize(static_cast<size_t>(steps * states));
  std::vector<float> before(costs.size());
  for (int64_t i = 0; i < steps; ++i) {
    const int bits = table.step_bits(first + i);
    const int64_t edges = states >> bits;
    const float* target = targets + (first + i) % shape.steps() * shape.weights_per_step;
    before.swap(costs);
    for (int64_t edge = 0; edge < edges; ++edge) {
      float least = kInfinity;
      uint32_t predecessor = 0;
      if (i == 0) {
        least = start == kNoEdge || start == edge ? 0.0F : kInfinity;
      } else {
        for (int64_t h = 0; h < int64_t{1} << bits; ++h) {
          const int64_t p = h * edges + edge;
          const float cost = before[static_cast<size_t>(p)];
          if (cost < least) {
            least = cost;
            predecessor = static_cast<uint32_t>(p);
          }
        }
      }
      predecessors[static_cast<size_t>(i * states + edge)] = predecessor;
      for (int64_t fresh = 0; fresh < int64_t{1} << bits; ++fresh) {
        const int64_t s = edge << bits | fresh;
        costs[static_cast<size_t>(s)] = least + table.error(static_cast<uint32_t>(s), target);
      }
    }
  }
}

// The state of least cost that ends in `edge` (any for kNoEdge: the one whose edge is lowest).
uint32_t best_state(const SearchTable& table, int next_bits, int64_t edge, const std::vector<float>& costs) {
  const int64_t edges = int64_t{1} << (table.shape().window - next_bits);
  float least = kInfinity;
  uint32_t best = 0;
  for (int64_t e = edge == kNoEdge ? 0 : edge; e < (edge == kNoEdge ? edges : edge + 1); ++e) {
    for (int64_t h = 0; h < int64_t{1} << next_bits; ++h) {
      const int64_t s = h * edges + e;
      if (costs[static_cast<size_t>(s)] < least) {
        least = costs[static_cast<size_t>(s)];
        best = static_cast<uint32_t>(s);
      }
    }
  }
  return best;
}

}  // namespace

void search_reference(const SearchTable& table, std::span<const float> targets, std::span<uint32_t> states) {
  const int64_t steps = table.shape().steps();
  const int64_t half = steps / 2;
  const int64_t count = int64_t{1} << table.shape().window;
  std::vector<float> costs;
  std::vector<uint32_t> predecessors;
  pass(table, steps - half, 2 * half, kNoEdge, targets.data(), costs, predecessors);
  uint32_t state = best_state(table, table.step_bits(half), kNoEdge, costs);
  for (int64_t i = 2 * half - 1; i > half; --i) {
    state = predecessors[static_cast<size_t>(i * count + (state >> table.step_bits(steps - half + i)))];
  }
  const int64_t edge = state >> table.step_bits(0);
  pass(table, 0, steps, edge, targets.data(), costs, predecessors);
  state = best_state(table, table.step_bits(0), edge, costs);
  for (int64_t i = steps - 1; i >= 0; --i) {
    states[static_cast<size_t>(i)] = state;
    state = predecessors[static_cast<size_t>(i * count + (state >> table.step_bits(i)))];
  }
}

}  // namespace quantloom::trellis
