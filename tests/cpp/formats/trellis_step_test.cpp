// The device code of the trellis search as host code: a step of a block of threads against the definition of
// a step, and whole encodings of a few rings.
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "formats/trellis_general.cuh"
#include "formats/trellis_ring_pairs.cuh"
#include "formats/trellis_two_weights.cuh"
#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

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
template <int kBits, int kRings = most_rings(kBits)>
class EmulatedBlock {
 public:
  using Shape = SearchShape<kBits, kRings>;
  using Step = SearchStep<kBits, kRings>;

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

template <int kBits, int kRings = most_rings(kBits)>
void expect_a_step() {
  using Shape = SearchShape<kBits, kRings>;
  const std::vector<uint16_t> table = random_table(kBits);
  const CounterRandom random(77);
  EmulatedBlock<kBits, kRings> block(table);
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
  expect_a_step<2, 1>();
  expect_a_step<3, 1>();
  expect_a_step<4, 1>();
}

// What the kernels do for one group of rings.
template <int kBits, int kRings = most_rings(kBits)>
class EmulatedEncoder {
 public:
  using Shape = SearchShape<kBits, kRings>;

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
    task.shape.half_bits = 2 * kBits;
    task.targets = targets_.data();
    task.table = table_.data();
    task.count = kRings;
    task.alone = kRings == 1;
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
      emulated::run_warp([&](int lane) {
        walk_back<PlainCopies<kBits, kRings>>(task, result, task.history_words(), ring, lane, memory);
      });
    }
  }

  const std::vector<uint16_t>& table_;
  const std::vector<float>& targets_;
  EmulatedBlock<kBits, kRings> block_;
  std::vector<uint32_t> history_;
  std::vector<uint16_t> ends_ = std::vector<uint16_t>(2);
  std::vector<uint16_t> pins_ = std::vector<uint16_t>(2);
};

// The state of a step by its definition.
uint32_t state_of(const std::vector<uint32_t>& words, size_t ring, const TrellisShape& shape, int step) {
  uint32_t state = 0;
  const int ring_bits = shape.ring_bits();
  for (int i = 0; i < 16; ++i) {
    const int bit = (shape.first_bit(step + 1) - 16 + i + ring_bits) % ring_bits;
    const uint32_t word = words[ring * static_cast<size_t>(shape.words()) + static_cast<size_t>(bit / 32)];
    state = state << 1 | (word >> (31 - bit % 32) & 1U);
  }
  return state;
}

// The words hold the states, and the error is theirs.
template <class Encoder>
void expect_rings(const Encoder& encoder, const TrellisShape& shape, const std::vector<uint16_t>& table,
                  const std::vector<float>& targets) {
  const int per_step = shape.weights_per_step;
  for (size_t ring = 0; ring < encoder.errors.size(); ++ring) {
    double sum = 0;
    for (int step = 0; step < shape.steps(); ++step) {
      const uint32_t state = state_of(encoder.words, ring, shape, step);
      const size_t at = ring * static_cast<size_t>(shape.steps()) + static_cast<size_t>(step);
      ASSERT_EQ(state, encoder.states[at])
          << shape.half_bits << "/2 bits, ring " << ring << ", step " << step;
      for (int w = 0; w < per_step; ++w) {
        const double d =
            static_cast<double>(targets[at * static_cast<size_t>(per_step) + static_cast<size_t>(w)]) -
            float_from_f16(table[state * static_cast<uint32_t>(per_step) + static_cast<uint32_t>(w)]);
        sum += d * d;
      }
    }
    EXPECT_NEAR(encoder.errors[ring], sum, 1e-5 * sum + 1e-9) << shape.half_bits << "/2 bits, ring " << ring;
  }
}

// Rings of random bits, and the weights that they stand for.
struct RandomRings {
  std::vector<uint32_t> words;
  std::vector<float> targets;
  RandomRings(const TrellisShape& shape, size_t rings, const std::vector<uint16_t>& table) {
    const CounterRandom random(5);
    words.resize(rings * static_cast<size_t>(shape.words()));
    for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
    for (size_t ring = 0; ring < rings; ++ring) {
      for (int step = 0; step < shape.steps(); ++step) {
        const uint32_t state =
            state_of(words, ring, shape, step) * static_cast<uint32_t>(shape.weights_per_step);
        for (int w = 0; w < shape.weights_per_step; ++w) {
          targets.push_back(float_from_f16(table[state + static_cast<uint32_t>(w)]));
        }
      }
    }
  }
};

template <int kBits, int kRings = most_rings(kBits)>
void expect_no_loss(int side) {
  const std::vector<uint16_t> table = random_table(40 + kBits);
  TrellisShape shape;
  shape.half_bits = 2 * kBits;
  const RandomRings rings(shape, kRings, table);
  EmulatedEncoder<kBits, kRings> encoder(table, rings.targets);
  encoder.encode(side);
  expect_rings(encoder, shape, table, rings.targets);
  for (const float error : encoder.errors) EXPECT_EQ(error, 0) << kBits << " bits";
  EXPECT_EQ(encoder.words, rings.words) << kBits << " bits";
}

// The threads of the blocks that share a pair of rings, between their barriers.
template <int kWeights, int kEven, int kOdd, int kBlocks>
class EmulatedPair {
 public:
  using Shape = PairShape<kWeights, (kEven > kOdd ? kEven : kOdd), kBlocks>;
  using Values = PairValues<Shape, kWeights>;

  explicit EmulatedPair(const std::vector<uint16_t>& table) : values_(kBlocks * kSearchThreads) {
    for (int rank = 0; rank < kBlocks; ++rank) {
      for (int thread = 0; thread < kSearchThreads; ++thread) {
        values_[static_cast<size_t>(rank * kSearchThreads + thread)].load(
            table.data(), Shape::middle_of(thread, rank), thread, memory_.data());
      }
    }
  }

  // Costs after an even or an odd step, in the order of the edges, from those before it; kUnknown where
  // several lanes would have to find it and do not.
  static constexpr uint32_t kUnknown = 0x77777777U;
  std::vector<uint32_t> step(bool odd, const std::vector<uint32_t>& before,
                             const PairTargets& targets) const {
    return odd ? step_of<kOdd, kEven>(before, targets) : step_of<kEven, kOdd>(before, targets);
  }

 private:
  template <int kNow, int kNext>
  std::vector<uint32_t> step_of(const std::vector<uint32_t>& before, const PairTargets& targets) const {
    using Step = RingPairStep<kWeights, kNow, kNext, kBlocks>;
    static_assert(std::is_same_v<typename Step::Shape, Shape>);
    std::vector<uint32_t> costs(before.size());
    for (size_t edge = 0; edge < before.size(); ++edge) {
      costs[static_cast<size_t>(pair_place(static_cast<int>(edge)))] = before[edge];
    }
    std::vector<uint32_t> after(Step::kEdges, kUnknown);
    const auto run = [&](int rank, int thread) {
      const int middle = Shape::middle_of(thread, rank);
      Step found{};
      found.find(values_[static_cast<size_t>(rank * kSearchThreads + thread)], memory_.data(), costs.data(),
                 targets, middle, thread);
      found.share(thread);
      if (!Step::writes(thread)) return;
      for (int run = 0; run < Step::kRuns; ++run) {
        found.write(run, after.data() + Step::first_edge(middle, thread) + (run << 12));
      }
    };
    for (int rank = 0; rank < kBlocks; ++rank) {
      for (int warp = 0; warp < kSearchThreads / 32; ++warp) {
        if (Step::kSharedBits == 0) {
          for (int lane = 0; lane < 32; ++lane) run(rank, warp * 32 + lane);
        } else if (warp % 9 == 4) {  // lanes that exchange costs are slow
          emulated::run_warp([&](int lane) { run(rank, warp * 32 + lane); });
        }
      }
    }
    std::vector<int> writers(Step::kEdges);
    for (int rank = 0; rank < kBlocks; ++rank) {
      for (int thread = 0; thread < kSearchThreads; ++thread) {
        if (!Step::writes(thread)) continue;
        for (int i = 0; i < Step::kRuns * Step::kOwn; ++i) {
          const int first = Step::first_edge(Shape::middle_of(thread, rank), thread);
          ++writers[static_cast<size_t>(first + (i / Step::kOwn << 12) + i % Step::kOwn)];
        }
      }
    }
    EXPECT_EQ(writers, std::vector<int>(Step::kEdges, 1));
    return after;
  }

  std::vector<Values> values_;
  std::vector<uint4> memory_ = std::vector<uint4>(Shape::kMemoryFours * kSearchThreads);
};

// The search of other shapes.
// kHalfBits: of bits in halves, the fewer.
template <class Pair, int kHalfBits>
class GeneralEncoder {
 public:
  GeneralEncoder(const TrellisShape& shape, const std::vector<uint16_t>& table,
                 const std::vector<float>& targets)
      : words(static_cast<size_t>(2 * shape.words())),
        states(static_cast<size_t>(2 * shape.steps())),
        shape_(shape),
        table_(table),
        targets_(targets),
        pair_(table) {}

  std::vector<uint32_t> words;
  std::vector<float> errors = std::vector<float>(2);
  std::vector<uint16_t> states;
  int open = 0;

  void encode(TrellisSearch search) {
    SearchTask first = first_pass(shape_, search);
    run(first);
    TracebackResult result;
    result.words = words.data();
    result.errors = errors.data();
    result.states = states.data();
    TracebackResult of_first = result;
    std::vector<int32_t> list(2);
    if (search == TrellisSearch::best) {
      of_first.open = list.data();
      of_first.open_size = &open;
      of_first.open_pins = pins_.data();
    } else {
      of_first.seams = pins_.data();
    }
    walk(first, of_first);
    SearchTask second = second_pass(shape_);
    second.pins = pins_.data();
    if (search == TrellisSearch::best) {
      second.list = list.data();
      second.list_size = &open;
      if (open == 0) return;
    }
    run(second);
    walk(second, result);
  }

 private:
  void run(SearchTask& task) {
    task.targets = targets_.data();
    task.table = table_.data();
    task.count = 2;
    task.ends = ends_.data();
    history_.assign(static_cast<size_t>(task.history_words()), 0xFFFFFFFFU);
    task.history = history_.data();
    const int count = task.list == nullptr ? 2 : *task.list_size;
    const size_t tiles[2] = {task.list == nullptr ? 0 : static_cast<size_t>(task.list[0]),
                             task.list == nullptr ? 1 : static_cast<size_t>(task.list[count - 1])};
    const int per_step = shape_.weights_per_step;
    int position = task.first_position;
    std::vector<uint32_t> costs(static_cast<size_t>(kStates >> shape_.step_bits(position)));
    for (size_t edge = 0; edge < costs.size() && task.pins != nullptr; ++edge) {
      costs[edge] =
          (task.pins[tiles[0]] == edge ? 0 : 0x7C00U) | (task.pins[tiles[1]] == edge ? 0 : 0x7C000000U);
    }
    uint32_t* copy = history_.data();
    for (int step = 0; step < task.steps; ++step) {
      const int next = (position + 1) % shape_.steps();
      PairTargets wanted{};
      for (size_t ring = 0; ring < 2; ++ring) {
        for (int w = 0; w < per_step; ++w) {
          const float value =
              targets_[tiles[ring] * kRingPositions + static_cast<size_t>(position * per_step + w)];
          (w == 0 ? wanted.first : wanted.second) |=
              static_cast<uint32_t>(f16_from_float(bounded_target(value))) << (16 * ring);
        }
      }
      costs = pair_.step(step % 2 == 1, costs, wanted);
      if (step + 1 >= task.stop && step + 1 < task.steps && (step + 1 - task.stop) % task.stride() == 0) {
        std::copy(costs.begin(), costs.end(), copy);
        copy += task.copy_words();
      }
      position = next;
    }
    ASSERT_EQ(copy - history_.data(), task.history_words());
    for (int ring = 0; ring < 2 && task.pins == nullptr; ++ring) {
      const auto cost = [&](size_t edge) { return costs[edge] >> (16 * ring) & 0xFFFFU; };
      size_t best = 0;
      for (size_t edge = 1; edge < costs.size(); ++edge) {
        if (cost(edge) < cost(best)) best = edge;
      }
      ends_[static_cast<size_t>(ring)] = static_cast<uint16_t>(best);
    }
  }

  void walk(const SearchTask& task, const TracebackResult& result) {
    for (int index = 0; index < 2; ++index) {
      PathMemory memory{};
      emulated::run_warp([&](int lane) {
        if constexpr (kHalfBits > 0 && half_copy_stride(std::max(kHalfBits, 1)) > 1) {
          walk_back<HalfCopies<kHalfBits>>(task, result, task.history_words(), index, lane, memory);
        } else {
          walk_back_general(task, result, task.history_words(), index, lane, memory);
        }
      });
    }
  }

  TrellisShape shape_;
  const std::vector<uint16_t>& table_;
  const std::vector<float>& targets_;
  Pair pair_;
  std::vector<uint32_t> history_;
  std::vector<uint16_t> ends_ = std::vector<uint16_t>(2);
  std::vector<uint16_t> pins_ = std::vector<uint16_t>(2);
};

TrellisShape general_shape(int half_bits, int weights_per_step) {
  TrellisShape shape;
  shape.half_bits = half_bits;
  shape.weights_per_step = weights_per_step;
  return shape;
}

std::vector<uint16_t> general_table(int weights_per_step) {
  std::vector<uint16_t> table = random_table(90);
  if (weights_per_step == 2) {
    const std::vector<uint16_t> more = random_table(91);
    table.insert(table.end(), more.begin(), more.end());
  }
  return table;
}

template <int kWeights, int kEven, int kOdd>
void expect_general(TrellisSearch search, float low, float high) {
  using Encoder = GeneralEncoder<EmulatedPair<kWeights, kEven, kOdd, 1>, kWeights == 1 ? kEven : 0>;
  constexpr int half_bits = (kEven + kOdd) / kWeights;
  constexpr int weights_per_step = kWeights;
  const TrellisShape shape = general_shape(half_bits, weights_per_step);
  const std::vector<uint16_t> table = general_table(weights_per_step);
  const RandomRings rings(shape, 2, table);
  Encoder again(shape, table, rings.targets);
  again.encode(search);
  expect_rings(again, shape, table, rings.targets);
  EXPECT_EQ(again.words, rings.words) << half_bits << "/2 bits";
  for (const float error : again.errors) EXPECT_EQ(error, 0) << half_bits << "/2 bits";

  const CounterRandom random(9);
  std::vector<float> targets(2 * kRingPositions);
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  Encoder encoder(shape, table, targets);
  encoder.encode(search);
  expect_rings(encoder, shape, table, targets);
  for (const float error : encoder.errors) {
    EXPECT_GT(error / kRingPositions, low) << half_bits << "/2 bits, " << weights_per_step;
    EXPECT_LT(error / kRingPositions, high) << half_bits << "/2 bits, " << weights_per_step;
  }
}

TEST(TrellisStep, ValidRingsHaveNoLoss) {
  expect_no_loss<2>(64);
  expect_no_loss<3, 1>(64);
  expect_no_loss<5>(64);
}

TEST(TrellisStep, RingsCloseAfterOneRound) {
  const CounterRandom random(9);
  const std::vector<uint16_t> table = random_table(44);
  std::vector<float> targets(2 * kRingPositions);
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  const TrellisShape shape = general_shape(8, 1);
  EmulatedEncoder<4> twice_around(table, targets);
  twice_around.encode(128);
  expect_rings(twice_around, shape, table, targets);
  EmulatedEncoder<4> wrapped(table, targets);
  wrapped.encode_wrapped(192);
  ASSERT_EQ(wrapped.open, 0);
  expect_rings(wrapped, shape, table, targets);
  for (size_t ring = 0; ring < 2; ++ring) {
    EXPECT_NEAR(wrapped.errors[ring], twice_around.errors[ring], 0.02F * twice_around.errors[ring]);
    EXPECT_NEAR(wrapped.errors[ring] / kRingPositions, 0.0047F, 0.001F);
  }
}

// A step of two weights a state against its definition, for one and for two words of rings.
TEST(TrellisStep, TwoWeightsAStep) {
  const std::vector<uint16_t> table = general_table(2);
  const CounterRandom random(17);
  for (int bits = 2; bits <= 8; ++bits) {
    const QuadPlan plan(bits);
    EXPECT_EQ(plan.inputs() * plan.slices(), 1 << bits);
    EXPECT_LE(plan.inputs(), kInputsOfThread);
    EXPECT_TRUE(plan.slices() == 1 || plan.slices() * plan.quads() == kSearchThreads);
    const auto edges = static_cast<size_t>(plan.edges());
    std::vector<uint32_t> costs(2 * edges);
    for (size_t i = 0; i < costs.size(); ++i) {
      const auto half = [&](size_t j) {
        return uint32_t{f16_from_float(static_cast<float>(5 * random.uniform(j)))};
      };
      costs[i] = half(2 * i) | half(2 * i + 1) << 16;
    }
    costs[3] = 0x7C007C00U;
    std::vector<int> places(edges);
    for (size_t edge = 0; edge < edges; ++edge)
      ++places[static_cast<size_t>(cost_place<2>(static_cast<int>(edge)))];
    EXPECT_EQ(places, std::vector<int>(edges, 1));
    StepTargets<2> targets{};
    float wanted[4][2];  // [ring][weight]
    for (size_t ring = 0; ring < 4; ++ring) {
      for (size_t w = 0; w < 2; ++w) {
        const uint16_t target = f16_from_float(static_cast<float>(random.normal(9000 + 2 * ring + w)));
        wanted[ring][w] = float_from_f16(target);
        (w == 0 ? targets.first : targets.second)[ring / 2] |= static_cast<uint32_t>(target)
                                                               << (16 * (ring % 2));
      }
    }
    for (const int quad : {0, 1, plan.quads() / 2, plan.quads() - 1}) {
      uint32_t least[2][kQuad] = {{~0U, ~0U, ~0U, ~0U}, {~0U, ~0U, ~0U, ~0U}};
      for (int slice = 0; slice < plan.slices(); ++slice) {
        QuadCosts<2> found;
        found.find(table.data(), plan, quad, slice, costs.data(), targets);
        for (int w = 0; w < 2; ++w) {
          for (int e = 0; e < kQuad; ++e) least[w][e] = pair_min(least[w][e], found.least[w][e]);
        }
      }
      for (size_t ring = 0; ring < 4; ++ring) {
        for (int e = 0; e < kQuad; ++e) {
          float expected = std::numeric_limits<float>::infinity();
          for (uint32_t input = 0; input < 1U << bits; ++input) {
            const uint32_t state = input << (16 - bits) | static_cast<uint32_t>(kQuad * quad + e);
            const float x = float_from_f16(table[2 * state]) - wanted[ring][0];
            const float y = float_from_f16(table[2 * state + 1]) - wanted[ring][1];
            const auto place = static_cast<size_t>(cost_place<2>(static_cast<int>(state >> bits)));
            const uint32_t before = costs[2 * place + ring / 2] >> (16 * (ring % 2)) & 0xFFFFU;
            expected = std::min(expected, float_from_f16(static_cast<uint16_t>(before)) + x * x + y * y);
          }
          const uint32_t cost = least[ring / 2][e] >> (16 * (ring % 2)) & 0xFFFFU;
          EXPECT_NEAR(float_from_f16(static_cast<uint16_t>(cost)), expected, 2e-3F * (1 + expected))
              << bits << " bits, quad " << quad << ", ring " << ring << ", edge " << e;
        }
      }
    }
  }
}

// A step of two rings in a word against its definition.
template <int kWeights, int kEven, int kOdd, int kBlocks>
void expect_a_pair_step() {
  using Pair = EmulatedPair<kWeights, kEven, kOdd, kBlocks>;
  const std::vector<uint16_t> table = general_table(kWeights);
  const CounterRandom random(21);
  const Pair pair(table);
  const float first[2] = {0.71F, -1.23F};
  const float second[2] = {-0.4F, 0.9F};
  PairTargets targets{};
  for (int ring = 0; ring < 2; ++ring) {
    targets.first |= static_cast<uint32_t>(f16_from_float(first[ring])) << (16 * ring);
    if (kWeights == 2) targets.second |= static_cast<uint32_t>(f16_from_float(second[ring])) << (16 * ring);
  }
  for (const bool odd : {false, true}) {
    if (odd && kEven == kOdd) continue;
    const int now = odd ? kOdd : kEven;
    const int next = odd ? kEven : kOdd;
    std::vector<uint32_t> costs(static_cast<size_t>(kStates >> now));
    for (size_t i = 0; i < costs.size(); ++i) {
      const auto half = [&](size_t j) {
        return random.below(3 * j, 8) == 0
                   ? 0x7C00U
                   : uint32_t{f16_from_float(static_cast<float>(random.uniform(3 * j + 1) * 3))};
      };
      costs[i] = half(2 * i) | half(2 * i + 1) << 16;
    }
    const std::vector<uint32_t> after = pair.step(odd, costs, targets);
    ASSERT_EQ(after.size(), static_cast<size_t>(kStates >> next));
    EXPECT_LT(std::ranges::count(after, Pair::kUnknown), kStates >> next);
    for (size_t edge = 0; edge < after.size(); ++edge) {
      if (after[edge] == Pair::kUnknown) continue;
      for (uint32_t ring = 0; ring < 2; ++ring) {
        uint32_t least = 0x7C00U;
        for (size_t input = 0; input < size_t{1} << next; ++input) {
          const size_t state = input << (16 - next) | edge;
          uint32_t cost = costs[state >> now] >> (16 * ring) & 0xFFFFU;
          for (size_t w = 0; w < kWeights; ++w) {
            const uint32_t target = (w == 0 ? targets.first : targets.second) >> (16 * ring) & 0xFFFFU;
            cost = pair_square_add(pair_subtract(target, table[kWeights * state + w]), cost) & 0xFFFFU;
          }
          least = std::min(least, cost);
        }
        ASSERT_EQ(after[edge] >> (16 * ring) & 0xFFFFU, least)
            << kWeights << " weights, " << now << " and " << next << " bits, " << kBlocks << " blocks, edge "
            << edge << ", ring " << ring;
      }
    }
  }
}

TEST(TrellisStep, PairsOfRings) {
  expect_a_pair_step<1, 1, 2, 1>();
  expect_a_pair_step<1, 2, 3, 1>();
  expect_a_pair_step<1, 3, 4, 1>();
  expect_a_pair_step<1, 4, 5, 1>();
  expect_a_pair_step<1, 5, 6, 1>();
  expect_a_pair_step<1, 7, 8, 1>();
  expect_a_pair_step<2, 3, 3, 1>();
  expect_a_pair_step<2, 4, 4, 1>();
  expect_a_pair_step<2, 5, 5, 1>();
  expect_a_pair_step<2, 8, 8, 1>();
  expect_a_pair_step<2, 2, 2, 2>();
  expect_a_pair_step<2, 6, 6, 2>();
  expect_a_pair_step<2, 4, 4, 4>();
  expect_a_pair_step<2, 7, 7, 4>();
}

TEST(TrellisStep, OtherShapes) {
  expect_general<1, 1, 2>(TrellisSearch::fast, 0.12F, 0.17F);
  expect_general<1, 3, 4>(TrellisSearch::fast, 0.007F, 0.012F);
  expect_general<2, 4, 4>(TrellisSearch::fast, 0.06F, 0.08F);
}

}  // namespace
}  // namespace quantloom::cuda
