#include "formats/trellis_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "formats/trellis_codes.hpp"
#include "quantloom/random.hpp"
#include "simd_targets.hpp"

namespace quantloom::trellis {
namespace {

TrellisCodebook small_codebook(int window, int weights_per_step) {
  TrellisCodebook codebook = trellis_codebook(weights_per_step == 2 ? "rptc2" : "rptc", window);
  return codebook;
}

std::vector<float> normal_targets(uint64_t seed, int64_t count) {
  const CounterRandom random(seed);
  std::vector<float> targets(static_cast<size_t>(count));
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  return targets;
}

// The error of a path, as the search sums it.
float path_error(const SearchTable& table, const std::vector<uint32_t>& states, const float* targets) {
  float error = 0;
  for (size_t i = 0; i < states.size(); ++i) {
    error += table.error(states[i], targets + static_cast<int64_t>(i) * table.shape().weights_per_step);
  }
  return error;
}

void expect_closed(const TrellisShape& shape, const std::vector<uint32_t>& states) {
  std::vector<uint32_t> words(static_cast<size_t>(shape.words()));
  std::vector<uint32_t> unpacked(states.size());
  const auto steps = std::ssize(states);
  pack_rings(shape, {states.data(), 1, steps}, {words.data(), 1, std::ssize(words)});
  unpack_rings(shape, {words.data(), 1, std::ssize(words)}, {unpacked.data(), 1, steps});
  EXPECT_EQ(states, unpacked);
}

// Every ring of a small trellis, by the edge around its seam: the least error of each.
std::vector<float> brute_force(const SearchTable& table, const float* targets) {
  const TrellisShape& shape = table.shape();
  std::vector<float> least(static_cast<size_t>(table.edges(0)), std::numeric_limits<float>::infinity());
  std::vector<uint32_t> states(static_cast<size_t>(shape.steps()));
  for (uint32_t ring = 0; ring < uint32_t{1} << shape.ring_bits(); ++ring) {
    const uint32_t word = ring << (32 - shape.ring_bits());
    unpack_rings(shape, {&word, 1, 1}, {states.data(), 1, shape.steps()});
    float& best = least[states[0] >> shape.step_bits(0)];
    best = std::min(best, path_error(table, states, targets));
  }
  return least;
}

TEST(TrellisSearch, PinnedSearchEqualsBruteForce) {
  for (const TrellisShape& shape :
       {TrellisShape{4, 2, 1, 12}, TrellisShape{5, 2, 1, 14}, TrellisShape{6, 4, 1, 8},
        TrellisShape{5, 3, 1, 10}, TrellisShape{6, 5, 1, 6}, TrellisShape{7, 6, 1, 4},
        TrellisShape{8, 4, 2, 8}, TrellisShape{6, 3, 2, 8}, TrellisShape{8, 2, 1, 16},
        TrellisShape{4, 8, 1, 4}}) {
    const SearchTable table(small_codebook(shape.window, shape.weights_per_step), shape);
    SearchMemory memory;
    for (uint64_t seed = 0; seed < 5; ++seed) {
      const std::vector<float> targets = normal_targets(seed, shape.length);
      const std::vector<float> least = brute_force(table, targets.data());
      std::vector<uint32_t> states(static_cast<size_t>(shape.steps()));
      for (int64_t edge = 0; edge < table.edges(0); ++edge) {
        const float cost = search_pinned(table, edge, targets, states, memory);
        EXPECT_FLOAT_EQ(cost, least[static_cast<size_t>(edge)]);
        EXPECT_FLOAT_EQ(path_error(table, states, targets.data()), least[static_cast<size_t>(edge)]);
        EXPECT_EQ(states[0] >> shape.step_bits(0), edge);
        expect_closed(shape, states);
      }
    }
  }
}

struct RealCase {
  std::string name;
  TrellisShape shape;
};

std::vector<RealCase> real_cases() {
  return {{"mul1", {16, 4, 1, 256}},   {"3inst", {16, 2, 1, 32}},        {"1mad", {12, 6, 1, 64}},
          {"mcg", {16, 8, 1, 64}},     {"hyb", {16, 4, 2, 64}},          {"mul1", {14, 5, 1, 64}},
          {"mul1", {16, 16, 1, 32}},   {"rptc", {11, 12, 1, 64}},        {"hyb", {15, 5, 2, 64}},
          {"rptc2", {10, 3, 2, 64}},   {"rptc", {17, 4, 1, 64}},         {"mul1", {9, 10, 1, 32}},
          {"rptc", {8, 7, 1, 48}},     {"mcg-FF7A83E5", {13, 2, 1, 96}}, {"octagon", {16, 4, 2, 64}},
          {"octagon", {18, 8, 2, 32}}, {"octagon", {12, 5, 2, 64}}};
}

// Runs `body` once for each instruction set that this processor has.
template <class Body>
void for_each_target(const Body& body) {
  const int64_t supported = hwy::SupportedTargets();
  for (int64_t rest = supported; rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    hwy::SetSupportedTargetsForTest(target);
    body(hwy::TargetName(target));
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(TrellisSearch, EqualsReferenceOnEveryInstructionSet) {
  for (const RealCase& c : real_cases()) {
    const SearchTable table(trellis_codebook(c.name, c.shape.window), c.shape);
    const int64_t steps = c.shape.steps();
    constexpr int64_t kRings = 3;
    const std::vector<float> targets = normal_targets(1, kRings * c.shape.length);
    std::vector<uint32_t> expected(static_cast<size_t>(kRings * steps));
    for (int64_t r = 0; r < kRings; ++r) {
      search_reference(
          table,
          std::span(targets).subspan(static_cast<size_t>(r * c.shape.length),
                                     static_cast<size_t>(c.shape.length)),
          std::span(expected).subspan(static_cast<size_t>(r * steps), static_cast<size_t>(steps)));
    }
    for_each_target([&](const char* target) {
      std::vector<uint32_t> states(expected.size());
      SearchMemory memory;
      search_rings(table, TrellisSearch::normal, {targets.data(), kRings, c.shape.length},
                   {states.data(), kRings, steps}, memory);
      EXPECT_EQ(states, expected) << c.name << " " << c.shape.half_bits << " on " << target;
    });
  }
}

TEST(TrellisSearch, ForwardStepsEqualReferenceOnEveryInstructionSet) {
  for (const RealCase& c : real_cases()) {
    const SearchTable table(trellis_codebook(c.name, c.shape.window), c.shape);
    for (int count = 1; count <= kRingsAtOnce; ++count) {
      for (const int64_t at : {0, 1}) {
        ForwardStep step;
        step.table = &table;
        step.bits = table.step_bits(at);
        step.next_bits = table.step_bits(at + 1);
        step.count = count;
        const std::vector<float> targets = normal_targets(2, 2 * count);
        const auto room = static_cast<size_t>(table.edges(0) * 2 + SearchTable::kLanes);
        std::vector<std::vector<float>> costs;
        std::vector<std::vector<float>> expected(static_cast<size_t>(count), std::vector<float>(room));
        for (int r = 0; r < count; ++r) {
          costs.push_back(normal_targets(static_cast<uint64_t>(10 + r), static_cast<int64_t>(room)));
          step.targets[r] = targets.data() + 2 * r;
          step.costs[r] = costs.back().data();
          step.next[r] = expected[static_cast<size_t>(r)].data();
        }
        forward_reference(step);
        for_each_target([&](const char* target) {
          std::vector<std::vector<float>> next(static_cast<size_t>(count), std::vector<float>(room));
          for (int r = 0; r < count; ++r) step.next[r] = next[static_cast<size_t>(r)].data();
          forward(step);
          for (int r = 0; r < count; ++r) {
            for (int64_t e = 0; e < table.edges(at + 1); ++e) {
              ASSERT_EQ(next[static_cast<size_t>(r)][static_cast<size_t>(e)],
                        expected[static_cast<size_t>(r)][static_cast<size_t>(e)])
                  << c.name << " " << target << " edge " << e;
            }
          }
        });
      }
    }
  }
}

}  // namespace
}  // namespace quantloom::trellis
