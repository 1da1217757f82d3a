// The device code of the search with two rings in a word, as host code: a step of its blocks against the
// definition of a step, and whole encodings of two rings.
#include <gtest/gtest.h>

#include <algorithm>

#include "formats/trellis_general.cuh"
#include "formats/trellis_ring_pairs.cuh"
#include "formats/trellis_test_rings.hpp"
#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

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

TEST(TrellisPairs, AStepIsTheLeastOfAllCandidates) {
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

TEST(TrellisPairs, RingsClose) {
  expect_general<1, 1, 2>(TrellisSearch::fast, 0.12F, 0.17F);
  expect_general<1, 3, 4>(TrellisSearch::fast, 0.007F, 0.012F);
  expect_general<2, 4, 4>(TrellisSearch::fast, 0.06F, 0.08F);
}

}  // namespace
}  // namespace quantloom::cuda
