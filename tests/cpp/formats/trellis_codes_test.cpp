#include "formats/trellis_codes.hpp"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "quantloom/dtype.hpp"
#include "quantloom/random.hpp"

namespace quantloom::trellis {
namespace {

struct Moments {
  double mean = 0;
  double rms = 0;
  size_t distinct = 0;
};

Moments moments_of(TrellisCode code, uint32_t multiplier) {
  Moments moments;
  std::set<uint16_t> seen;
  for (uint32_t state = 0; state < 65536; ++state) {
    const uint16_t bits = weight_at(code, multiplier, nullptr, 1, state, 0);
    const double value = float_from_f16(bits);
    moments.mean += value / 65536;
    moments.rms += value * value / 65536;
    seen.insert(bits);
  }
  moments.rms = std::sqrt(moments.rms);
  moments.distinct = seen.size();
  return moments;
}

// Root mean squares over all states as published, and as they follow from exact float16 arithmetic.
TEST(TrellisCodes, RootMeanSquares) {
  struct Case {
    TrellisCode code;
    uint32_t multiplier;
    double rms;
    size_t distinct;
  };
  const std::array<Case, 14> cases = {{
      {TrellisCode::lcg, 0, 1.24371092, 10598},
      {TrellisCode::mcg, kExl3Mcg, 1.24411185, 10746},
      {TrellisCode::mcg, 0xFF7A83E5U, 1.19905065, 10811},
      {TrellisCode::mcg, 0xCAF6A435U, 1.20644123, 10973},
      {TrellisCode::mcg, 0xE2A54B45U, 1.18341905, 0},
      {TrellisCode::mcg, 0xA2EC794DU, 1.20054604, 0},
      {TrellisCode::mcg, 0x00D0AA65U, 1.17900695, 0},
      {TrellisCode::mcg, 0xB26DB26DU, 1.17438699, 0},
      {TrellisCode::mcg, 0xEAB209FDU, 1.21202566, 0},
      {TrellisCode::mcg, 0xFC275E4DU, 1.24375512, 0},
      {TrellisCode::mcg, 0xF2BAA58DU, 1.24367964, 0},
      {TrellisCode::mul1, kExl3Mul1, 1.00031207, 913},
      {TrellisCode::mul1, 0xAD9A2EC5U, 1.00040006, 909},
      // 1.00008834 before the values are rounded to float16.
      {TrellisCode::one_mad, 0, 1.00008515, 908},
  }};
  for (const Case& c : cases) {
    const Moments moments = moments_of(c.code, c.multiplier);
    EXPECT_NEAR(moments.rms, c.rms, 1e-6) << std::hex << c.multiplier;
    EXPECT_LT(std::abs(moments.mean), 0.003);
    if (c.distinct > 0) {
      EXPECT_EQ(moments.distinct, c.distinct) << std::hex << c.multiplier;
    }
  }
}

// The rings of words (i + 1) * 2654435761: states, weights and a hash of the whole tile, for three codes
// whose tiles other readers of these files decode to the same bits.
TEST(TrellisCodes, DecodesKnownTiles) {
  struct Tile {
    std::array<uint32_t, 3> weights;
    uint32_t hash;
  };
  struct Row {
    std::array<uint32_t, 3> states;
    std::array<Tile, 3> tiles;  // lcg, mcg, mul1
  };
  const std::array<Row, 8> rows = {{
      {{0x9B11, 0x3622, 0x6C44},
       {{{{0xC3A6, 0x4237, 0x38E8}, 0xB78ECCA0},
         {{0xBAC0, 0x3783, 0x3CA2}, 0xB954EF54},
         {{0xB1E8, 0xBDA3, 0x3D2A}, 0xD99CFD16}}}},
      {{0x6C42, 0xB109, 0xC427},
       {{{{0xBA10, 0x4162, 0x3B36}, 0xB44BCB1F},
         {{0x3DA8, 0x3A9A, 0xB43C}, 0xCDC3D6A1},
         {{0xB45C, 0xB334, 0x3B3D}, 0xD5087DF7}}}},
      {{0x44C4, 0x2627, 0x313C},
       {{{{0xB558, 0x401F, 0xBFE8}, 0xD5BA8CFD},
         {{0x3D30, 0xAF40, 0x3372}, 0x49D43928},
         {{0xB5A9, 0x3982, 0x3851}, 0x2329F784}}}},
      {{0x6209, 0x209E, 0x09E3},
       {{{{0x3FA6, 0xB1D4, 0xBD44}, 0xB6D07C11},
         {{0x3215, 0x41CC, 0xAE20}, 0x936785E4},
         {{0x34A0, 0xBB45, 0x34A0}, 0x7DA15037}}}},
      {{0x7513, 0xA278, 0x4F1B},
       {{{{0xC06E, 0x3D2C, 0x9100}, 0x40BA4E64},
         {{0xB84B, 0x3C99, 0xB4F6}, 0x94509715},
         {{0x3317, 0x39B9, 0x3D6F}, 0x3A56C973}}}},
      {{0x4C27, 0x09E3, 0x78DD},
       {{{{0x401E, 0xB5E6, 0xA854}, 0xF2BD4BDB},
         {{0x3CB9, 0xB546, 0xBC04}, 0x7225A124},
         {{0x3A6E, 0xBEAB, 0xA065}, 0xF8FAE48B}}}},
      {{0x5C4F, 0x278D, 0xC6EF},
       {{{{0xBCBF, 0xB812, 0xAC0C}, 0x3F506FE6},
         {{0xB6D0, 0x3DB4, 0x2C9C}, 0x5F034A59},
         {{0xAA4C, 0x3E5B, 0x3B30}, 0x6F35AB70}}}},
      {{0x409E, 0x9E37, 0x3779},
       {{{{0xB55E, 0x3E62, 0x39C3}, 0xE0D17019},
         {{0xC07E, 0x3BF4, 0xB940}, 0xADE87366},
         {{0x380C, 0x3888, 0xBB1B}, 0xD899BFAD}}}},
  }};
  const std::array<std::pair<TrellisCode, uint32_t>, 3> codes = {
      {{TrellisCode::lcg, 0}, {TrellisCode::mcg, kExl3Mcg}, {TrellisCode::mul1, kExl3Mul1}}};
  for (int bits = 1; bits <= 8; ++bits) {
    const TrellisShape shape{16, 2 * bits, 1, kRingLength};
    std::vector<uint32_t> words(static_cast<size_t>(shape.words()));
    for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i + 1) * 2654435761U;
    const Row& row = rows[static_cast<size_t>(bits - 1)];
    for (int step = 0; step < 3; ++step) {
      EXPECT_EQ(state_at(words.data(), shape.ring_bits(), shape.first_bit(step + 1), 16), row.states[step]);
    }
    for (size_t c = 0; c < codes.size(); ++c) {
      uint32_t hash = 0;
      for (int input = 0; input < kTileSide; ++input) {
        for (int output = 0; output < kTileSide; ++output) {
          const int end = shape.first_bit(position_of(input, output) + 1);
          const uint32_t state = state_at(words.data(), shape.ring_bits(), end, 16);
          const uint16_t weight = weight_at(codes[c].first, codes[c].second, nullptr, 1, state, 0);
          if (input == 0 && output < 3) {
            EXPECT_EQ(weight, row.tiles[c].weights[output]) << bits << " " << c;
          }
          hash = 31 * hash + weight;
        }
      }
      EXPECT_EQ(hash, row.tiles[c].hash) << bits << " bits, code " << c;
    }
  }
}

TEST(TrellisCodes, PlacesAreAPermutation) {
  std::set<int> places;
  for (int position = 0; position < kRingLength; ++position) {
    EXPECT_EQ(position_of(input_of(position), output_of(position)), position);
    places.insert(input_of(position) * kTileSide + output_of(position));
  }
  EXPECT_EQ(places.size(), static_cast<size_t>(kRingLength));
}

TEST(TrellisCodes, HalvesRoundAsFloatsDo) {
  const CounterRandom random(3);
  for (uint64_t i = 0; i < 200000; ++i) {
    const int shift = static_cast<int>(random.below(3 * i, 30));
    int64_t value = static_cast<int64_t>(random.bits(3 * i + 1) >> (40 + random.below(3 * i + 2, 24)));
    if (i % 2 == 1) value = -value;
    const float exact = std::ldexp(static_cast<float>(value), -24 - shift);  // 24 bits: exact
    if (value == 0 || std::abs(exact) > 65504) continue;
    ASSERT_EQ(half_of(value, -24 - shift), f16_from_float(exact)) << value << " " << shift;
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if ((bits >> 10 & 31U) == 31) continue;
    ASSERT_EQ(std::ldexp(static_cast<double>(half_units(half)), -24), double{float_from_f16(half)});
  }
}

// One multiplication with one rounding, whatever route the integers take.
TEST(TrellisCodes, WeightsAreFloat16Arithmetic) {
  for (uint32_t state = 0; state < 65536; ++state) {
    const uint32_t mul1 = hash_of(TrellisCode::mul1, kExl3Mul1, state);
    // 11 + 11 bits and a shift of 11: float64 holds the sum exactly, float32 the result's candidates.
    const double sum = (1024.0 + byte_sum(mul1)) * 0.00676727294921875 - 10.3828125;
    ASSERT_EQ(weight_of(TrellisCode::mul1, mul1), f16_from_float(static_cast<float>(sum)));
    const uint32_t lcg = halves_of(hash_of(TrellisCode::lcg, 0, state));
    const float added =
        float_from_f16(static_cast<uint16_t>(lcg)) + float_from_f16(static_cast<uint16_t>(lcg >> 16));
    ASSERT_EQ(float_from_f16(weight_of(TrellisCode::lcg, hash_of(TrellisCode::lcg, 0, state))),
              float_from_f16(f16_from_float(added)));
    const uint32_t mad = hash_of(TrellisCode::one_mad, 0, state);
    const float quotient = (static_cast<float>(byte_sum(mad)) - 510) / 147.800537109375F;
    ASSERT_EQ(float_from_f16(weight_of(TrellisCode::one_mad, mad)), float_from_f16(f16_from_float(quotient)));
  }
}

// Four bytes as steps along the axes of an octagon, one rounding; float32 holds the exact numbers.
TEST(TrellisCodes, OctagonsAreByteSumsRoundedOnce) {
  for (uint32_t state = 0; state < 65536; ++state) {
    const uint32_t hash = kOctagonMultiplier * state;
    float bytes[4];
    for (int i = 0; i < 4; ++i) bytes[i] = static_cast<float>(hash >> (8 * i) & 255U);
    const float first = 99 * bytes[0] + 70 * bytes[2] + 70 * bytes[3];
    const float second = 99 * bytes[1] + 70 * bytes[2] - 70 * bytes[3];
    const auto value = [](float sum, float center) { return (2 * sum - center) * (203 * 0x1p-22F); };
    ASSERT_EQ(weight_at(TrellisCode::octagon, kOctagonMultiplier, nullptr, 2, state, 0),
              f16_from_float(value(first, 239 * 255)));
    ASSERT_EQ(weight_at(TrellisCode::octagon, kOctagonMultiplier, nullptr, 2, state, 1),
              f16_from_float(value(second, 99 * 255)));
  }
}

// The two weights of an octagon are uncorrelated and of one size.
TEST(TrellisCodes, OctagonsAreRound) {
  double squares[3] = {};
  for (uint32_t state = 0; state < 65536; ++state) {
    const uint32_t hash = kOctagonMultiplier * state;
    const double x = float_from_f16(octagon_weight(hash, 0));
    const double y = float_from_f16(octagon_weight(hash, 1));
    squares[0] += x * x / 65536;
    squares[1] += y * y / 65536;
    squares[2] += x * y / 65536;
  }
  EXPECT_NEAR(squares[0], 1, 0.01);
  EXPECT_NEAR(squares[1], 1, 0.01);
  EXPECT_NEAR(squares[2], 0, 0.01);
}

// Half-integer rates: even steps take the floor, odd steps one bit more; windows end at the prefix sums.
TEST(TrellisShapeTest, CountsBits) {
  for (int half_bits = 2; half_bits <= 16; ++half_bits) {
    const TrellisShape shape{16, half_bits, 1, kRingLength};
    int sum = 0;
    for (int step = 0; step < shape.steps(); ++step) {
      EXPECT_EQ(shape.first_bit(step), sum);
      EXPECT_EQ(shape.step_bits(step), half_bits / 2 + (half_bits % 2 == 1 && step % 2 == 1 ? 1 : 0));
      sum += shape.step_bits(step);
    }
    EXPECT_EQ(shape.ring_bits(), sum);
    EXPECT_EQ(shape.words() * 32, sum);
    const TrellisShape pairs{16, half_bits, 2, kRingLength};
    EXPECT_EQ(pairs.step_bits(5), half_bits);
    EXPECT_EQ(pairs.words(), shape.words());
  }
}

TEST(TrellisCodes, StatesSlideOverTheRing) {
  const CounterRandom random(4);
  for (const int half_bits : {2, 3, 5, 8, 13, 16}) {
    const TrellisShape shape{16, half_bits, 1, kRingLength};
    std::vector<uint32_t> words(static_cast<size_t>(shape.words()), 0);
    std::vector<uint32_t> fresh;
    for (int step = 0; step < shape.steps(); ++step) {
      fresh.push_back(static_cast<uint32_t>(
          random.below(static_cast<uint64_t>(step), uint64_t{1} << shape.step_bits(step))));
      put_bits(words.data(), shape.first_bit(step), shape.step_bits(step), fresh.back());
    }
    uint32_t state = state_at(words.data(), shape.ring_bits(), shape.ring_bits(), 16);
    for (int step = 0; step < shape.steps(); ++step) {
      state = (state << shape.step_bits(step) | fresh[static_cast<size_t>(step)]) & 0xFFFFU;
      ASSERT_EQ(state_at(words.data(), shape.ring_bits(), shape.first_bit(step + 1), 16), state);
    }
  }
}

}  // namespace
}  // namespace quantloom::trellis
