// The device code of the search of half bits and of two weights a state as host code: a step of a block
// against the definition of a step, and whole encodings of a ring or two.
#include <gtest/gtest.h>

#include <algorithm>

#include "formats/trellis_general.cuh"
#include "formats/trellis_ring_pairs.cuh"
#include "formats/trellis_state_pairs.cuh"
#include "formats/trellis_test_rings.hpp"
#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {
namespace {

// The threads of a block, between their barriers.
template <class Scheme>
class EmulatedBlock {
 public:
  explicit EmulatedBlock(const std::vector<uint16_t>& table) : values_(kSearchThreads) {
    for (int thread = 0; thread < kSearchThreads; ++thread) {
      values_[static_cast<size_t>(thread)].load(table.data(), thread, memory_.data());
    }
  }

  // Before even steps and before odd ones.
  static int edges(int parity) { return 2 * Scheme::cost_words(parity) / Scheme::kRings; }
  uint16_t& cost(int parity, int edge, int ring) {
    return reinterpret_cast<uint16_t*>(costs_[parity].data())[Scheme::cost_place(edge, ring)];
  }

  // `some`: of threads that exchange costs, which is slow, only a few. The costs of the others are not
  // written.
  template <int kParity>
  void step(const std::vector<uint32_t>& targets, bool some, uint32_t* copy) {
    using Step = typename Scheme::template Step<kParity>;
    std::vector<uint32_t>& after = costs_[1 - kParity];
    std::fill(after.begin(), after.end(), 0xFFFFFFFFU);
    const auto run = [&](int thread) {
      Step found{};
      found.find(values_[static_cast<size_t>(thread)], memory_.data(), costs_[kParity].data(), targets.data(),
                 thread);
      if (!Step::writes(thread)) return;
      found.store(thread, after.data());
      if (copy != nullptr) found.copy(thread, copy);
    };
    for (int warp = 0; warp < kSearchThreads / 32; ++warp) {
      if (!some) {
        for (int lane = 0; lane < 32; ++lane) run(warp * 32 + lane);
      } else if (warp % 9 == 4) {
        emulated::run_warp([&](int lane) { run(warp * 32 + lane); });
      }
    }
  }

  // Whether the threads write each word once.
  template <int kParity>
  bool covers_once() const {
    using Step = typename Scheme::template Step<kParity>;
    std::vector<uint32_t> words(costs_[1 - kParity].size(), 0xFFFFFFFFU);
    size_t stored = 0;
    for (int thread = 0; thread < kSearchThreads; ++thread) {
      if (!Step::writes(thread)) continue;
      const Step nothing{};
      nothing.store(thread, words.data());
      stored += Step::kRuns * Step::kOwn;
    }
    return stored == words.size() && words == std::vector<uint32_t>(words.size());
  }

 private:
  std::vector<typename Scheme::Values> values_;
  std::vector<uint4> memory_ = std::vector<uint4>(Scheme::kTableFours * kSearchThreads);
  std::vector<uint32_t> costs_[2] = {std::vector<uint32_t>(Scheme::cost_words(0)),
                                     std::vector<uint32_t>(Scheme::cost_words(1))};
};

// The words of a step's targets, [ring][weight].
template <class Scheme>
std::vector<uint32_t> target_words(const std::vector<float>& targets) {
  std::vector<uint32_t> words(Scheme::kTargetWords);
  for (int ring = 0; ring < Scheme::kRings; ++ring) {
    for (int w = 0; w < Scheme::kWeights; ++w) {
      const float target = bounded_target(targets[static_cast<size_t>(ring * Scheme::kWeights + w)]);
      const uint16_t high = f16_from_float(target);
      Scheme::put_target(words.data(), ring, w, high, f16_from_float(target - float_from_f16(high)));
    }
  }
  return words;
}

// What the kernels do for one group of rings.
template <class Scheme>
class EmulatedEncoder {
 public:
  static constexpr int kRings = Scheme::kRings;
  static constexpr int kLeastBits = std::countr_zero(unsigned{kStates} / Scheme::kCopyWords);

  EmulatedEncoder(const TrellisShape& shape, const std::vector<uint16_t>& table,
                  const std::vector<float>& targets)
      : words(static_cast<size_t>(kRings * shape.words())),
        states(static_cast<size_t>(kRings * shape.steps())),
        shape_(shape),
        table_(table),
        targets_(targets),
        block_(table) {}

  std::vector<uint32_t> words;
  std::vector<float> errors = std::vector<float>(kRings);
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
    std::vector<int32_t> list(kRings);
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
    task.count = kRings;
    task.ends = ends_.data();
    task.on_chip = Scheme::kWeights == 2;
    task.alone = kRings == 1;
    history_.assign(static_cast<size_t>(task.history_words()), 0xFFFFFFFFU);
    task.history = history_.data();
    const int count = task.list == nullptr ? kRings : *task.list_size;
    const auto tile_of = [&](int ring) {
      const int index = std::min(ring, count - 1);
      return static_cast<size_t>(task.list == nullptr ? index : task.list[index]);
    };
    for (int ring = 0; ring < kRings; ++ring) {
      for (int edge = 0; edge < block_.edges(0); ++edge) {
        const bool open = task.pins == nullptr || task.pins[tile_of(ring)] == edge;
        block_.cost(0, edge, ring) = open ? 0 : 0x7C00;
      }
    }
    uint32_t* copy = history_.data();
    for (int step = 0; step < task.steps; ++step) {
      std::vector<float> wanted;
      for (int ring = 0; ring < kRings; ++ring) {
        for (int w = 0; w < Scheme::kWeights; ++w) {
          const int place = ((task.first_position + step) * Scheme::kWeights + w) % kRingPositions;
          wanted.push_back(targets_[tile_of(ring) * kRingPositions + static_cast<size_t>(place)]);
        }
      }
      const int past = step + 1 - task.stop;
      const bool kept = past >= 0 && step + 1 < task.steps && past % Scheme::kStride == 0;
      const std::vector<uint32_t> words = target_words<Scheme>(wanted);
      if (step % 2 == 0) {
        block_.template step<0>(words, false, kept ? copy : nullptr);
      } else {
        block_.template step<1>(words, false, kept ? copy : nullptr);
      }
      if (kept) copy += Scheme::kCopyWords;
    }
    ASSERT_EQ(copy - history_.data(), task.history_words());
    for (int ring = 0; ring < count && task.pins == nullptr; ++ring) {
      int best = 0;
      for (int edge = 1; edge < block_.edges(0); ++edge) {
        if (block_.cost(0, edge, ring) < block_.cost(0, best, ring)) best = edge;
      }
      ends_[tile_of(ring)] = static_cast<uint16_t>(best);
    }
  }

  void walk(const SearchTask& task, const TracebackResult& result) {
    for (int index = 0; index < kRings; ++index) {
      PathMemory memory{};
      emulated::run_warp([&](int lane) {
        if constexpr (Scheme::kWeights == 1 && Scheme::kStride > 1) {
          walk_back<HalfCopies<kLeastBits>>(task, result, task.history_words(), index, lane, memory);
        } else {
          walk_back_general(task, result, task.history_words(), index, lane, memory);
        }
      });
    }
  }

  TrellisShape shape_;
  const std::vector<uint16_t>& table_;
  const std::vector<float>& targets_;
  EmulatedBlock<Scheme> block_;
  std::vector<uint32_t> history_;
  std::vector<uint16_t> ends_ = std::vector<uint16_t>(2);
  std::vector<uint16_t> pins_ = std::vector<uint16_t>(2);
};

template <class Scheme>
void expect_encodings(int half_bits, TrellisSearch search, float low, float high) {
  const TrellisShape shape = general_shape(half_bits, Scheme::kWeights);
  const std::vector<uint16_t> table = general_table(Scheme::kWeights);
  const RandomRings rings(shape, Scheme::kRings, table);
  EmulatedEncoder<Scheme> again(shape, table, rings.targets);
  again.encode(search);
  expect_rings(again, shape, table, rings.targets);
  EXPECT_EQ(again.words, rings.words) << half_bits << "/2 bits";
  for (const float error : again.errors) EXPECT_EQ(error, 0) << half_bits << "/2 bits";

  const CounterRandom random(9);
  std::vector<float> targets(Scheme::kRings * kRingPositions);
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  EmulatedEncoder<Scheme> encoder(shape, table, targets);
  encoder.encode(search);
  expect_rings(encoder, shape, table, targets);
  for (const float error : encoder.errors) {
    EXPECT_GT(error / kRingPositions, low) << half_bits << "/2 bits, " << Scheme::kWeights;
    EXPECT_LT(error / kRingPositions, high) << half_bits << "/2 bits, " << Scheme::kWeights;
  }
}

// Every cost after a step of fresh bits kNow, before one of kNext, is the least of its candidates.
template <class Scheme, int kParity, int kNow, int kNext>
void expect_a_step(EmulatedBlock<Scheme>& block, const std::vector<uint16_t>& table) {
  const CounterRandom random(21);
  ASSERT_EQ(block.edges(kParity), kStates >> kNow);
  ASSERT_EQ(block.edges(1 - kParity), kStates >> kNext);
  EXPECT_TRUE(block.template covers_once<kParity>());
  std::vector<uint16_t> before;
  for (int edge = 0; edge < kStates >> kNow; ++edge) {
    for (int ring = 0; ring < Scheme::kRings; ++ring) {
      const uint64_t i = before.size();
      // Some edges cannot be reached.
      const bool open = random.below(2 * i, 8) != 0;
      before.push_back(open ? f16_from_float(static_cast<float>(random.uniform(2 * i + 1) * 3))
                            : uint16_t{0x7C00});
      block.cost(kParity, edge, ring) = before.back();
    }
  }
  const std::vector<float> targets = {0.71F, -1.23F, -0.4F, 0.9F};  // [ring][weight]
  std::vector<uint32_t> copy(Scheme::kCopyWords, 0xFFFFFFFFU);
  const bool slices = Scheme::kSliceBits > 0;
  block.template step<kParity>(target_words<Scheme>(targets), slices, kNext > kNow ? nullptr : copy.data());
  size_t known = 0;
  for (int edge = 0; edge < kStates >> kNext; ++edge) {
    for (int ring = 0; ring < Scheme::kRings; ++ring) {
      const uint32_t found = block.cost(1 - kParity, edge, ring);
      if (found == 0xFFFFU) continue;
      ++known;
      uint32_t least = 0x7C00U;
      for (int input = 0; input < 1 << kNext; ++input) {
        const int state = input << (16 - kNext) | edge;
        uint32_t cost = before[static_cast<size_t>((state >> kNow) * Scheme::kRings + ring)];
        for (int w = 0; w < Scheme::kWeights; ++w) {
          const float target = targets[static_cast<size_t>(ring * Scheme::kWeights + w)];
          const uint16_t high = f16_from_float(target);
          uint32_t d = pair_subtract(high, table[static_cast<size_t>(Scheme::kWeights * state + w)]);
          if (Scheme::kWeights == 1 && Scheme::kTargetWords == 2) {
            d = pair_add(d, f16_from_float(target - float_from_f16(high)));
          }
          cost = pair_square_add(d, cost) & 0xFFFFU;
        }
        least = std::min(least, cost);
      }
      ASSERT_EQ(found, least) << Scheme::kWeights << " weights, " << kNow << " and " << kNext
                              << " bits, edge " << edge << ", ring " << ring;
      if (kNext > kNow) continue;
      const auto* const halves = reinterpret_cast<const uint16_t*>(copy.data());
      const int at = Scheme::kWeights == 2 ? ((edge >> 1) * Scheme::kRings + ring) * 2 + (edge & 1)
                                           : edge * Scheme::kRings + ring;
      ASSERT_EQ(halves[at], least) << "copy of edge " << edge << ", ring " << ring;
    }
  }
  EXPECT_EQ(known == static_cast<size_t>(Scheme::kRings * (kStates >> kNext)), !slices);
  EXPECT_GT(known, 0U);
}

template <int kEven>
void expect_half_bits() {
  const std::vector<uint16_t> table = general_table(1);
  EmulatedBlock<RingPairs<kEven>> block(table);
  expect_a_step<RingPairs<kEven>, 0, kEven, kEven + 1>(block, table);
  expect_a_step<RingPairs<kEven>, 1, kEven + 1, kEven>(block, table);
}
template <int kBits, int kRings>
void expect_two_weights() {
  const std::vector<uint16_t> table = general_table(2);
  EmulatedBlock<StatePairs<kBits, kRings>> block(table);
  expect_a_step<StatePairs<kBits, kRings>, 0, kBits, kBits>(block, table);
}

TEST(TrellisPairs, AStepIsTheLeastOfAllCandidates) {
  expect_half_bits<1>();
  expect_half_bits<2>();
  expect_half_bits<3>();
  expect_half_bits<4>();
  expect_half_bits<5>();
  expect_half_bits<7>();
  expect_two_weights<2, 1>();
  expect_two_weights<3, 1>();
  expect_two_weights<3, 2>();
  expect_two_weights<4, 1>();
  expect_two_weights<4, 2>();
  expect_two_weights<5, 1>();
  expect_two_weights<5, 2>();
  expect_two_weights<6, 2>();
  expect_two_weights<7, 1>();
  expect_two_weights<8, 1>();
  expect_two_weights<8, 2>();
}

TEST(TrellisPairs, RingsClose) {
  expect_encodings<RingPairs<1>>(3, TrellisSearch::fast, 0.12F, 0.17F);
  expect_encodings<RingPairs<3>>(7, TrellisSearch::fast, 0.007F, 0.012F);
  expect_encodings<StatePairs<4, 1>>(4, TrellisSearch::fast, 0.06F, 0.08F);
  expect_encodings<StatePairs<4, 2>>(4, TrellisSearch::best, 0.06F, 0.08F);
}

}  // namespace
}  // namespace quantloom::cuda
