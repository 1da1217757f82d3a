// The device code of the trellis search as host code: a step of a block of threads against the definition of
// a step, and whole encodings of a few rings.
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "formats/trellis_test_rings.hpp"
#include "formats/trellis_two_weights.cuh"
#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

uint32_t twice(float value) {
  return f16_from_float(value) * 0x10001U;
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

}  // namespace
}  // namespace quantloom::cuda
