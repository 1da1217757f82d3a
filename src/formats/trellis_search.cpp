#include "formats/trellis_search.hpp"

#include <algorithm>
#include <limits>

#include "formats/trellis_codes.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/error.hpp"

namespace quantloom::trellis {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kAncestorBits = 8;  // most bits of freedom that the way back computes anew at once

// Steps between stored costs.
int snapshot_interval(const TrellisShape& shape) {
  const int most_bits = std::max(shape.step_bits(0), shape.step_bits(1));
  return std::max(1, kAncestorBits / most_bits);
}

// The forward pass over `steps` steps from step `first` on, around the ring as often as need be. Time i is
// before the i-th of them; costs are by edge into that step.
class Run {
 public:
  Run(const SearchTable& table, SearchMemory& memory, int64_t first, int64_t steps, int count)
      : table_(table),
        memory_(memory),
        first_(first),
        steps_(steps),
        count_(count),
        interval_(snapshot_interval(table.shape())),
        stride_(std::max(table.edges(0), table.edges(1)) + SearchTable::kLanes),
        slots_(steps / interval_ + 1) {
    const int64_t arrays = checked_mul(checked_add(slots_, 2), count_);
    const int64_t floats = checked_mul(arrays, stride_);
    if (std::ssize(memory.costs) < floats) memory.costs.resize(static_cast<size_t>(floats));
  }

  // Costs at time 0: all edges for kNoEdge, else one.
  void start(int ring, int64_t edge) {
    float* costs = snapshot(0, ring);
    const int64_t edges = table_.edges(first_);
    std::fill_n(costs, edges, edge == kNoEdge ? 0.0F : kInfinity);
    if (edge != kNoEdge) costs[edge] = 0;
  }

  // targets[r]: the length targets of a ring.
  void forward(const float* const* targets) {
    ForwardStep step;
    step.table = &table_;
    step.count = count_;
    const int per_step = table_.shape().weights_per_step;
    for (int64_t i = 0; i < steps_; ++i) {
      const int64_t at = (first_ + i) % table_.shape().steps();
      step.bits = table_.step_bits(first_ + i);
      step.next_bits = table_.step_bits(first_ + i + 1);
      for (int r = 0; r < count_; ++r) {
        step.targets[r] = targets[r] + at * per_step;
        step.costs[r] = costs_at(i, r);
        step.next[r] = costs_at(i + 1, r);
      }
      trellis::forward(step);
    }
  }

  const float* final_costs(int ring) { return costs_at(steps_, ring); }

  // The edge of least cost at the end; of equal ones the lowest.
  int64_t best_end(int ring) {
    const float* costs = final_costs(ring);
    return std::min_element(costs, costs + table_.edges(first_ + steps_)) - costs;
  }

  // Walks from `edge` at the end to time `until`: states [steps] from there on, edges [steps + 1].
  void trace(int ring, int64_t edge, int64_t until, const float* targets, uint32_t* states, int64_t* edges) {
    edges[steps_] = edge;
    for (int64_t end = steps_; end > until;) {
      const int64_t begin = (end - 1) / interval_ * interval_;
      trace_block(ring, begin, end, targets, states, edges);
      end = begin;
    }
  }

 private:
  float* slot(int64_t index, int ring) {
    return memory_.costs.data() + (ring * (slots_ + 2) + index) * stride_;
  }
  float* snapshot(int64_t i, int ring) { return slot(i / interval_, ring); }
  float* costs_at(int64_t i, int ring) {
    return i % interval_ == 0 ? snapshot(i, ring) : slot(slots_ + i % 2, ring);
  }

  // The best way to edges[end] from the costs kept at time `begin`. The path is a string of bits: the edge at
  // `begin`, the fresh bits of the steps. Its last bits are edges[end]; the bits before, 2^unknown ways, are
  // tried step by step, each step deciding its oldest ones.
  void trace_block(int ring, int64_t begin, int64_t end, const float* targets, uint32_t* states,
                   int64_t* edges) {
    const TrellisShape& shape = table_.shape();
    const int end_bits = table_.step_bits(first_ + end);
    int unknown = 0;
    int fresh = 0;
    for (int64_t i = begin; i < end; ++i) {
      unknown += table_.step_bits(first_ + i + 1);
      fresh += table_.step_bits(first_ + i);
    }
    const int known = shape.window - end_bits;
    const auto tail = static_cast<uint64_t>(edges[end]);
    const auto ways = size_t{1} << unknown;
    memory_.ancestors.resize(ways);
    memory_.choices.resize(2 * ways);
    const float* costs = snapshot(begin, ring);
    float* best = memory_.ancestors.data();
    for (uint64_t u = 0; u < ways; ++u) best[u] = costs[(u << known | tail) >> fresh];
    const uint64_t mask = (uint64_t{1} << shape.window) - 1;
    uint8_t* choices = memory_.choices.data();
    int open = unknown;
    int behind = fresh;  // fresh bits of later steps
    for (int64_t i = begin; i < end; ++i) {
      behind -= table_.step_bits(first_ + i);
      const int decided = table_.step_bits(first_ + i + 1);
      const float* target = targets + (first_ + i) % shape.steps() * shape.weights_per_step;
      open -= decided;
      for (uint64_t rest = 0; rest < uint64_t{1} << open; ++rest) {
        float least = kInfinity;
        uint8_t choice = 0;
        for (uint64_t h = 0; h < uint64_t{1} << decided; ++h) {
          const uint64_t u = h << open | rest;
          const auto state = static_cast<uint32_t>((u << known | tail) >> behind & mask);
          const float cost = best[u] + table_.error(state, target);
          if (cost < least) {
            least = cost;
            choice = static_cast<uint8_t>(h);
          }
        }
        best[rest] = least;
        choices[rest] = choice;
      }
      choices += uint64_t{1} << open;
    }
    uint64_t way = 0;
    int chosen = 0;
    for (int64_t i = end; i-- > begin;) {
      choices -= uint64_t{1} << open;
      way |= static_cast<uint64_t>(choices[way]) << chosen;
      const int decided = table_.step_bits(first_ + i + 1);
      chosen += decided;
      open += decided;
    }
    behind = 0;
    for (int64_t i = end; i-- > begin;) {
      states[i] = static_cast<uint32_t>((way << known | tail) >> behind & mask);
      edges[i] = static_cast<int64_t>(states[i] >> table_.step_bits(first_ + i));
      behind += table_.step_bits(first_ + i);
    }
  }

  const SearchTable& table_;
  SearchMemory& memory_;
  int64_t first_;
  int64_t steps_;
  int count_;
  int64_t interval_;
  int64_t stride_;
  int64_t slots_;
};

void reserve_path(SearchMemory& memory, int64_t steps) {
  if (std::ssize(memory.states) < steps) memory.states.resize(static_cast<size_t>(steps));
  if (std::ssize(memory.edges) < steps + 1) memory.edges.resize(static_cast<size_t>(steps + 1));
}

// Second pass: rings pinned to their edges.
void pinned_rings(const SearchTable& table, int count, const int64_t* pins, const float* const* targets,
                  uint32_t* const* states, SearchMemory& memory) {
  const int64_t steps = table.shape().steps();
  Run run(table, memory, 0, steps, count);
  for (int r = 0; r < count; ++r) run.start(r, pins[r]);
  run.forward(targets);
  reserve_path(memory, steps);
  for (int r = 0; r < count; ++r) {
    run.trace(r, pins[r], 0, targets[r], states[r], memory.edges.data());
  }
}

// The place where a run of two rounds meets itself, nearest to the middle; kNoEdge if nowhere.
int64_t meeting(const std::vector<int64_t>& edges, int64_t steps) {
  for (int64_t away = 0; away <= steps / 2; ++away) {
    for (const int64_t at : {steps / 2 - away, steps / 2 + away}) {
      if (at >= 0 && at <= steps &&
          edges[static_cast<size_t>(at)] == edges[static_cast<size_t>(at + steps)]) {
        return at;
      }
    }
  }
  return kNoEdge;
}

}  // namespace

SearchTable::SearchTable(const TrellisCodebook& codebook, const TrellisShape& shape) : shape_(shape) {
  const std::vector<float> values = codebook.values();
  const int per_step = shape.weights_per_step;
  const int64_t states = int64_t{1} << shape.window;
  weights_.resize(values.size());
  for (int64_t s = 0; s < states; ++s) {
    for (int w = 0; w < per_step; ++w) {
      weights_[static_cast<size_t>(w * states + s)] = values[static_cast<size_t>(s * per_step + w)];
    }
  }
  const int most_bits = std::max(shape.step_bits(0), shape.step_bits(1));
  rows_.resize(static_cast<size_t>(most_bits + 1));
  for (const int bits : {shape.step_bits(0), shape.step_bits(1)}) {
    std::vector<float>& rows = rows_[static_cast<size_t>(bits)];
    const int64_t edges = states >> bits;
    if (!rows.empty() || edges < kLanes) continue;
    rows.reserve(values.size());
    for (int64_t block = 0; block < edges; block += kLanes) {
      for (int64_t h = 0; h < int64_t{1} << bits; ++h) {
        for (int w = 0; w < per_step; ++w) {
          const float* from = weights_.data() + w * states + h * edges + block;
          rows.insert(rows.end(), from, from + kLanes);
        }
      }
    }
  }
}

void search_rings(const SearchTable& table, TrellisSearch search, MatrixView<const float> targets,
                  MatrixView<uint32_t> states, SearchMemory& memory) {
  const int64_t steps = table.shape().steps();
  const int count = static_cast<int>(targets.rows());
  const float* rows[kRingsAtOnce] = {};
  for (int r = 0; r < count; ++r) rows[r] = targets.row(r);
  int64_t pins[kRingsAtOnce] = {};
  const float* pinned_targets[kRingsAtOnce] = {};
  uint32_t* pinned_states[kRingsAtOnce] = {};
  int pinned = 0;
  const auto pin = [&](int r, int64_t edge) {
    pins[pinned] = edge;
    pinned_targets[pinned] = rows[r];
    pinned_states[pinned++] = states.row(r);
  };
  if (search == TrellisSearch::best) {
    Run run(table, memory, 0, 2 * steps, count);
    for (int r = 0; r < count; ++r) run.start(r, kNoEdge);
    run.forward(rows);
    reserve_path(memory, 2 * steps);
    for (int r = 0; r < count; ++r) {
      run.trace(r, run.best_end(r), 0, rows[r], memory.states.data(), memory.edges.data());
      const int64_t at = meeting(memory.edges, steps);
      if (at == kNoEdge) {
        pin(r, memory.edges[static_cast<size_t>(steps)]);
      } else {
        for (int64_t i = at; i < at + steps; ++i)
          states(r, i % steps) = memory.states[static_cast<size_t>(i)];
      }
    }
  } else {
    const int64_t reach = search == TrellisSearch::fast ? 64 / table.shape().weights_per_step : steps;
    const int64_t half = std::min(reach, steps / 2);
    Run run(table, memory, steps - half, 2 * half, count);
    for (int r = 0; r < count; ++r) run.start(r, kNoEdge);
    run.forward(rows);
    reserve_path(memory, 2 * half);
    for (int r = 0; r < count; ++r) {
      run.trace(r, run.best_end(r), half, rows[r], memory.states.data(), memory.edges.data());
      pin(r, memory.edges[static_cast<size_t>(half)]);
    }
  }
  if (pinned > 0) pinned_rings(table, pinned, pins, pinned_targets, pinned_states, memory);
}

float search_pinned(const SearchTable& table, int64_t edge, std::span<const float> targets,
                    std::span<uint32_t> states, SearchMemory& memory) {
  const int64_t steps = table.shape().steps();
  Run run(table, memory, 0, steps, 1);
  run.start(0, edge);
  const float* row = targets.data();
  run.forward(&row);
  reserve_path(memory, steps);
  run.trace(0, edge, 0, row, states.data(), memory.edges.data());
  return run.final_costs(0)[edge];
}

}  // namespace quantloom::trellis
