// The device code of the trellis search as host code: a step of a block of threads against the definition of
// a step, and whole encodings of a few rings.
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kLanes = 32;

uint32_t twice(float value) {
  return f16_from_float(value) * 0x10001U;
}

// Float16 weights of no structure.
std::vector<uint16_t> random_table(uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint16_t> table(kStates);
  for (size_t i = 0; i < table.size(); ++i) table[i] = f16_from_float(static_cast<float>(random.normal(i)));
  return table;
}

// The threads of a block, one after the other, between its barriers.
template <int kBits>
class EmulatedBlock {
 public:
  using Shape = TrellisShape<kBits>;
  using Step = TrellisStep<kBits>;

  explicit EmulatedBlock(const std::vector<uint16_t>& table)
      : values_(kSearchThreads), outputs_(kSearchThreads) {
    uint32_t staging = 0;
    for (int thread = 0; thread < kSearchThreads; ++thread) {
      Step::load_values(table.data(), thread, staging, values_[static_cast<size_t>(thread)].words);
    }
    for (auto& costs : costs_) costs.resize(Shape::kCostWords, 0xFFFFFFFFU);
  }

  uint16_t& cost(int edge, int ring) {
    return reinterpret_cast<uint16_t*>(costs_[0].data())[Shape::cost_place(edge, ring)];
  }

  // The costs after a step, also in `copy` where other kernels look for them.
  void step(const Targets& targets, uint32_t* copy) {
    for (int thread = 0; thread < kSearchThreads; ++thread) {
      const auto t = static_cast<size_t>(thread);
      Step::run(values_[t].words, targets, costs_[0].data(), thread, outputs_[t]);
    }
    if constexpr (!Shape::kPairsOfGroups) combine();
    for (int thread = 0; thread < kSearchThreads; ++thread) {
      const auto t = static_cast<size_t>(thread);
      Step::store(outputs_[t], thread, costs_[1].data());
      if (copy != nullptr) Step::copy(outputs_[t], thread, copy);
    }
    std::swap(costs_[0], costs_[1]);
  }

 private:
  // What the lanes that share an output exchange.
  void combine() {
    for (int other = 1; other < Step::kParts; other *= 2) {
      for (int thread = 0; thread < kSearchThreads; ++thread) {
        if ((thread & other) != 0) continue;
        uint32_t& a = outputs_[static_cast<size_t>(thread)].words[0];
        uint32_t& b = outputs_[static_cast<size_t>(thread | other)].words[0];
        a = b = pair_min(a, b);
      }
    }
  }

  struct Values {
    uint32_t words[kValueWords];
  };
  std::vector<Values> values_;
  std::vector<typename Step::Outputs> outputs_;
  std::vector<uint32_t> costs_[2];
};

Targets make_targets(float first, float second) {
  Targets targets{};
  int ring = 0;
  for (const float target : {first, second}) {
    const float high = float_from_f16(f16_from_float(target));
    targets.high[ring] = twice(high);
    targets.low[ring] = twice(target - high);
    ++ring;
  }
  return targets;
}

template <int kBits>
void expect_a_step() {
  using Shape = TrellisShape<kBits>;
  const std::vector<uint16_t> table = random_table(kBits);
  const CounterRandom random(77);
  EmulatedBlock<kBits> block(table);
  std::vector<uint16_t> before(static_cast<size_t>(Shape::kEdges * Shape::kRings));
  for (int edge = 0; edge < Shape::kEdges; ++edge) {
    for (int ring = 0; ring < Shape::kRings; ++ring) {
      const auto i = static_cast<size_t>(edge * Shape::kRings + ring);
      // Some edges cannot be reached.
      const bool open = random.below(2 * i, 8) != 0;
      before[i] = open ? f16_from_float(static_cast<float>(random.uniform(2 * i + 1) * 3)) : uint16_t{0x7C00};
      block.cost(edge, ring) = before[i];
    }
  }
  const Targets targets = make_targets(0.71234567F, -1.23456789F);
  std::vector<uint32_t> copy(Shape::kCopyWords, 0xFFFFFFFFU);
  block.step(targets, copy.data());

  for (int edge = 0; edge < Shape::kEdges; ++edge) {
    for (int ring = 0; ring < Shape::kRings; ++ring) {
      uint32_t least = 0xFFFFU;
      for (int input = 0; input < Shape::kInputs; ++input) {
        const int state = input * Shape::kEdges + edge;
        const uint32_t cost = before[static_cast<size_t>((state >> kBits) * Shape::kRings + ring)];
        uint32_t d = pair_subtract(targets.high[ring], table[static_cast<size_t>(state)]);
        if (Shape::kExactTargets) d = pair_add(d, targets.low[ring]);
        least = std::min(least, pair_square_add(d, cost) & 0xFFFFU);
      }
      ASSERT_EQ(block.cost(edge, ring), least) << kBits << " bits, edge " << edge << ", ring " << ring;
      ASSERT_EQ(reinterpret_cast<const uint16_t*>(copy.data())[Shape::copy_place(edge, ring)], least)
          << kBits << " bits, copy of edge " << edge << ", ring " << ring;
    }
  }
}

TEST(TrellisStep, IsTheLeastOfAllCandidates) {
  expect_a_step<1>();
  expect_a_step<2>();
  expect_a_step<3>();
  expect_a_step<4>();
  expect_a_step<5>();
  expect_a_step<6>();
  expect_a_step<7>();
  expect_a_step<8>();
}

// What the kernels do for one group of rings.
template <int kBits>
class EmulatedEncoder {
 public:
  using Shape = TrellisShape<kBits>;

  EmulatedEncoder(const std::vector<uint16_t>& table, const std::vector<float>& targets)
      : table_(table), targets_(targets), block_(table) {}

  std::vector<uint32_t> words = std::vector<uint32_t>(Shape::kRings * 8 * kBits);
  std::vector<float> errors = std::vector<float>(Shape::kRings);
  std::vector<uint16_t> states = std::vector<uint16_t>(Shape::kRings * kRingPositions);
  int open = 0;

  // Two passes with `side` steps to each side of the seam.
  void encode(int side) {
    SearchTask task = make_task();
    task.first_position = kRingPositions - side;
    task.steps = 2 * side;
    task.stop = side;
    search(task);
    TracebackResult result;
    result.seams = pins_.data();
    walk(task, result);
    task = make_task();
    task.steps = kRingPositions;
    task.pins = pins_.data();
    search(task);
    walk(task, results());
  }

  // One pass that closes where it can.
  void encode_wrapped(int overlap) {
    SearchTask task = make_task();
    task.steps = kRingPositions + overlap;
    search(task);
    TracebackResult result = results();
    std::vector<int32_t> list(Shape::kRings);
    result.open = list.data();
    result.open_size = &open;
    result.open_pins = pins_.data();
    walk(task, result);
  }

 private:
  SearchTask make_task() {
    SearchTask task;
    task.bits = kBits;
    task.targets = targets_.data();
    task.table = table_.data();
    task.count = Shape::kRings;
    task.ends = ends_.data();
    return task;
  }
  TracebackResult results() {
    TracebackResult result;
    result.words = words.data();
    result.errors = errors.data();
    result.states = states.data();
    return result;
  }

  void search(SearchTask& task) {
    history_.assign(static_cast<size_t>(task.history_words()), 0xFFFFFFFFU);
    for (int ring = 0; ring < Shape::kRings; ++ring) {
      for (int edge = 0; edge < Shape::kEdges; ++edge) {
        block_.cost(edge, ring) = task.pins == nullptr || task.pins[ring] == edge ? 0 : 0x7C00;
      }
    }
    uint32_t* copy = history_.data();
    for (int step = 0; step < task.steps; ++step) {
      const auto position = static_cast<size_t>((task.first_position + step) % kRingPositions);
      const float first = bounded(targets_[position]);
      const float second = Shape::kRings == 2 ? bounded(targets_[kRingPositions + position]) : 0;
      const int past = step + 1 - task.stop;
      const bool kept = past >= 0 && step + 1 < task.steps && past % copy_stride(kBits) == 0;
      block_.step(make_targets(first, second), kept ? copy : nullptr);
      if (kept) copy += Shape::kCopyWords;
    }
    ASSERT_EQ(copy - history_.data(), task.history_words());
    for (int ring = 0; ring < Shape::kRings && task.pins == nullptr; ++ring) {
      int best = 0;
      for (int edge = 1; edge < Shape::kEdges; ++edge) {
        if (block_.cost(edge, ring) < block_.cost(best, ring)) best = edge;
      }
      ends_[static_cast<size_t>(ring)] = static_cast<uint16_t>(best);
    }
    task.history = history_.data();
  }
  static float bounded(float target) { return std::min(std::max(target, -kFarthestTarget), kFarthestTarget); }

  void walk(const SearchTask& task, const TracebackResult& result) {
    for (int ring = 0; ring < Shape::kRings; ++ring) {
      PathMemory memory{};
      emulated::run_warp(
          [&](int lane) { walk_back<kBits>(task, result, task.history_words(), ring, lane, memory); });
    }
  }

  const std::vector<uint16_t>& table_;
  const std::vector<float>& targets_;
  EmulatedBlock<kBits> block_;
  std::vector<uint32_t> history_;
  std::vector<uint16_t> ends_ = std::vector<uint16_t>(2);
  std::vector<uint16_t> pins_ = std::vector<uint16_t>(2);
};

uint32_t state_of(const std::vector<uint32_t>& words, size_t ring, int bits, int position) {
  uint32_t state = 0;
  const int ring_bits = kRingPositions * bits;
  for (int i = 0; i < 16; ++i) {
    const int bit = ((position + 1) * bits - 16 + i + ring_bits) % ring_bits;
    state =
        state << 1 |
        (words[ring * static_cast<size_t>(8 * bits) + static_cast<size_t>(bit / 32)] >> (31 - bit % 32) & 1U);
  }
  return state;
}

// The words hold the states, and the error is theirs.
template <int kBits>
void expect_rings(const EmulatedEncoder<kBits>& encoder, const std::vector<uint16_t>& table,
                  const std::vector<float>& targets) {
  for (size_t ring = 0; ring < encoder.errors.size(); ++ring) {
    double sum = 0;
    for (int position = 0; position < kRingPositions; ++position) {
      const size_t at = ring * kRingPositions + static_cast<size_t>(position);
      const uint32_t state = state_of(encoder.words, ring, kBits, position);
      ASSERT_EQ(state, encoder.states[at]) << kBits << " bits, ring " << ring << ", position " << position;
      const double d = static_cast<double>(targets[at]) - float_from_f16(table[state]);
      sum += d * d;
    }
    EXPECT_NEAR(encoder.errors[ring], sum, 1e-5 * sum + 1e-9) << kBits << " bits, ring " << ring;
  }
}

// Rings of random bits come back without loss.
template <int kBits>
void expect_no_loss(int side) {
  const CounterRandom random(5);
  const std::vector<uint16_t> table = random_table(40 + kBits);
  const size_t rings = TrellisShape<kBits>::kRings;
  std::vector<uint32_t> words(rings * 8 * kBits);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
  std::vector<float> targets;
  for (size_t ring = 0; ring < rings; ++ring) {
    for (int position = 0; position < kRingPositions; ++position) {
      targets.push_back(float_from_f16(table[state_of(words, ring, kBits, position)]));
    }
  }
  EmulatedEncoder<kBits> encoder(table, targets);
  encoder.encode(side);
  expect_rings(encoder, table, targets);
  for (const float error : encoder.errors) EXPECT_EQ(error, 0) << kBits << " bits";
  EXPECT_EQ(encoder.words, words) << kBits << " bits";
}

TEST(TrellisStep, ValidRingsHaveNoLoss) {
  expect_no_loss<2>(64);
  expect_no_loss<5>(64);
}

TEST(TrellisStep, RingsCloseAfterOneRound) {
  const CounterRandom random(9);
  const std::vector<uint16_t> table = random_table(44);
  std::vector<float> targets(2 * kRingPositions);
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  EmulatedEncoder<4> twice_around(table, targets);
  twice_around.encode(128);
  expect_rings(twice_around, table, targets);
  EmulatedEncoder<4> wrapped(table, targets);
  wrapped.encode_wrapped(192);
  ASSERT_EQ(wrapped.open, 0);
  expect_rings(wrapped, table, targets);
  for (size_t ring = 0; ring < 2; ++ring) {
    EXPECT_NEAR(wrapped.errors[ring], twice_around.errors[ring], 0.02F * twice_around.errors[ring]);
    EXPECT_NEAR(wrapped.errors[ring] / kRingPositions, 0.0047F, 0.001F);
  }
}

}  // namespace
}  // namespace quantloom::cuda
