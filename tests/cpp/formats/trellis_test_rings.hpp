// Rings for the tests of the search's device code as host code.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "formats/trellis_walk.cuh"
#include "quantloom/random.hpp"

namespace quantloom::cuda {

// Float16 weights of no structure.
inline std::vector<uint16_t> random_table(uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint16_t> table(kStates);
  for (size_t i = 0; i < table.size(); ++i) table[i] = f16_from_float(static_cast<float>(random.normal(i)));
  return table;
}

inline TrellisShape general_shape(int half_bits, int weights_per_step) {
  TrellisShape shape;
  shape.half_bits = half_bits;
  shape.weights_per_step = weights_per_step;
  return shape;
}

inline std::vector<uint16_t> general_table(int weights_per_step) {
  std::vector<uint16_t> table = random_table(90);
  if (weights_per_step == 2) {
    const std::vector<uint16_t> more = random_table(91);
    table.insert(table.end(), more.begin(), more.end());
  }
  return table;
}

// The state of a step by its definition.
inline uint32_t state_of(const std::vector<uint32_t>& words, size_t ring, const TrellisShape& shape,
                         int step) {
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

}  // namespace quantloom::cuda
