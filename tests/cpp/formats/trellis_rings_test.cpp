#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "formats/trellis_codes.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

struct Case {
  std::string name;
  TrellisShape shape;
};

std::vector<Case> cases() {
  std::vector<Case> list;
  for (int half_bits = 2; half_bits <= 16; ++half_bits) list.push_back({"mul1", {16, half_bits, 1, 256}});
  for (const char* name : {"3inst", "mcg", "1mad", "mcg-CAF6A435", "rptc"})
    list.push_back({name, {16, 4, 1, 256}});
  for (const int half_bits : {2, 3, 4, 6, 8}) list.push_back({"hyb", {16, half_bits, 2, 256}});
  list.push_back({"rptc2", {16, 4, 2, 256}});
  for (const int half_bits : {2, 3, 4, 5, 6, 7, 8}) list.push_back({"octagon", {16, half_bits, 2, 256}});
  list.push_back({"octagon-9E3779B1", {17, 4, 2, 256}});
  return list;
}

std::vector<float> normal_targets(uint64_t seed, int64_t count) {
  const CounterRandom random(seed);
  std::vector<float> targets(static_cast<size_t>(count));
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(random.normal(i));
  return targets;
}

struct Encoded {
  std::vector<uint32_t> states;
  std::vector<uint32_t> words;
  std::vector<float> weights;
};

Encoded encode(const TrellisCodebook& codebook, const TrellisShape& shape, const std::vector<float>& targets,
               TrellisSearch search, int threads) {
  const auto rings = std::ssize(targets) / shape.length;
  Encoded result;
  result.states.resize(static_cast<size_t>(rings * shape.steps()));
  result.words.resize(static_cast<size_t>(rings * shape.words()));
  result.weights.resize(targets.size());
  const MatrixView<uint32_t> states(result.states.data(), rings, shape.steps());
  encode_rings(codebook, shape, {targets.data(), rings, shape.length}, states, {search, threads});
  pack_rings(shape, states, {result.words.data(), rings, shape.words()});
  decode_rings(codebook, shape, states, {result.weights.data(), rings, shape.length}, threads);
  return result;
}

double error_of(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  return sum / static_cast<double>(a.size());
}

// Any string of bits is a ring, and what it decodes to is coded without loss.
TEST(TrellisRings, RandomRingsEncodeWithoutLoss) {
  for (const Case& c : cases()) {
    const TrellisCodebook codebook = trellis_codebook(c.name, c.shape.window);
    constexpr int64_t kRings = 2;
    const CounterRandom random(5);
    std::vector<uint32_t> words(static_cast<size_t>(kRings * c.shape.words()));
    for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
    std::vector<uint32_t> states(static_cast<size_t>(kRings * c.shape.steps()));
    std::vector<float> weights(static_cast<size_t>(kRings * c.shape.length));
    const MatrixView<uint32_t> state_view(states.data(), kRings, c.shape.steps());
    unpack_rings(c.shape, {words.data(), kRings, c.shape.words()}, state_view);
    decode_rings(codebook, c.shape, state_view, {weights.data(), kRings, c.shape.length});
    for (const TrellisSearch search : {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best}) {
      const Encoded encoded = encode(codebook, c.shape, weights, search, 2);
      EXPECT_EQ(encoded.weights, weights) << c.name << " " << c.shape.half_bits << " " << name_of(search);
    }
  }
}

TEST(TrellisRings, StatesPackAndUnpack) {
  for (const Case& c : cases()) {
    const TrellisCodebook codebook = trellis_codebook(c.name, c.shape.window);
    const Encoded encoded =
        encode(codebook, c.shape, normal_targets(6, c.shape.length), TrellisSearch::best, 1);
    std::vector<uint32_t> states(encoded.states.size());
    unpack_rings(c.shape, {encoded.words.data(), 1, c.shape.words()}, {states.data(), 1, c.shape.steps()});
    EXPECT_EQ(states, encoded.states);
    for (int step = 0; step < c.shape.steps(); ++step) {
      ASSERT_EQ(states[static_cast<size_t>(step)],
                trellis::state_at(encoded.words.data(), c.shape.ring_bits(), c.shape.first_bit(step + 1),
                                  c.shape.window));
    }
  }
}

TEST(TrellisRings, ThreadsAndNeighboursChangeNothing) {
  const TrellisShape shape{16, 4, 1, 256};
  const TrellisCodebook codebook = trellis_codebook("mul1");
  const std::vector<float> targets = normal_targets(7, 9 * shape.length);
  for (const TrellisSearch search : {TrellisSearch::normal, TrellisSearch::best}) {
    const Encoded one = encode(codebook, shape, targets, search, 1);
    for (const int threads : {2, 4})
      EXPECT_EQ(encode(codebook, shape, targets, search, threads).states, one.states);
    const std::vector<float> last(targets.end() - shape.length, targets.end());
    const std::vector<uint32_t> alone = encode(codebook, shape, last, search, 1).states;
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), one.states.end() - shape.steps()));
  }
}

// Errors on a normal source within what the literature and the bound say; 48 rings, whose error is known to
// about 1.5%.
TEST(TrellisRings, DistortionOnANormalSource) {
  struct Figure {
    const char* name;
    int half_bits;
    double scale;  // source over codebook
    double error;
  };
  for (const Figure& f :
       {Figure{"mul1", 4, 1, 0.0683}, Figure{"3inst", 4, 1, 0.0688}, Figure{"mul1", 2, 1, 0.2768},
        Figure{"mul1", 8, 0.9, 0.00444}, Figure{"1mad", 4, 1, 0.0687}, Figure{"rptc", 6, 0.95, 0.01748},
        Figure{"hyb", 4, 1, 0.071}, Figure{"octagon", 4, 1, 0.0703}, Figure{"octagon", 6, 0.9, 0.0185},
        Figure{"octagon", 8, 0.84, 0.0050}}) {
    const TrellisCodebook codebook = trellis_codebook(f.name);
    const TrellisShape shape{16, f.half_bits, codebook.weights_per_step, 256};
    std::vector<float> targets = normal_targets(8, 48 * shape.length);
    const double scale = codebook.rms() * f.scale;
    for (float& target : targets) target *= static_cast<float>(scale);
    const Encoded encoded = encode(codebook, shape, targets, TrellisSearch::normal, 2);
    const double error = error_of(encoded.weights, targets) / (scale * scale);
    EXPECT_NEAR(error, f.error, 0.05 * f.error) << f.name;
    EXPECT_GT(error, std::exp2(-f.half_bits));
    const Encoded best = encode(codebook, shape, targets, TrellisSearch::best, 2);
    const Encoded fast = encode(codebook, shape, targets, TrellisSearch::fast, 2);
    EXPECT_LT(error_of(best.weights, targets), error_of(encoded.weights, targets) * 1.001);
    EXPECT_LT(error_of(fast.weights, targets), error_of(encoded.weights, targets) * 1.02);
    EXPECT_GT(error_of(fast.weights, targets), error_of(encoded.weights, targets));
  }
}

TEST(TrellisRings, RefusesWhatDoesNotFit) {
  const TrellisShape shape{16, 4, 1, 256};
  const TrellisCodebook codebook = trellis_codebook("mul1");
  std::vector<float> targets(256, 0.0F);
  std::vector<uint32_t> states(256, 0);
  std::vector<uint32_t> words(16, 0);
  const MatrixView<const float> target_view(targets.data(), 1, 256);
  const MatrixView<uint32_t> state_view(states.data(), 1, 256);
  for (const TrellisShape& bad :
       {TrellisShape{15, 4, 1, 256}, TrellisShape{16, 1, 1, 256}, TrellisShape{16, 17, 1, 256},
        TrellisShape{16, 4, 2, 256}, TrellisShape{16, 4, 1, 255}, TrellisShape{16, 4, 1, 0},
        TrellisShape{16, 2, 1, 8}}) {
    EXPECT_THROW(encode_rings(codebook, bad, target_view, state_view), InvalidArgument);
  }
  EXPECT_THROW(encode_rings(codebook, shape, target_view, {states.data(), 1, 128}), InvalidArgument);
  EXPECT_THROW(encode_rings(codebook, shape, target_view, state_view, {TrellisSearch::normal, -1}),
               InvalidArgument);
  EXPECT_THROW(encode_rings(trellis_codebook("hyb"), {16, 10, 2, 256}, target_view, {states.data(), 1, 128}),
               InvalidArgument);
  targets[7] = NAN;
  EXPECT_THROW(encode_rings(codebook, shape, target_view, state_view), NumericError);
  states[3] = 65536;
  EXPECT_THROW(decode_rings(codebook, shape, state_view, {targets.data(), 1, 256}), InvalidArgument);
  EXPECT_THROW(pack_rings(shape, state_view, {words.data(), 1, 16}), InvalidArgument);
  states[3] = 1;
  EXPECT_THROW(pack_rings(shape, state_view, {words.data(), 1, 16}), InvalidArgument);
  states[3] = 0;
  EXPECT_NO_THROW(pack_rings(shape, state_view, {words.data(), 1, 16}));
  EXPECT_THROW(pack_rings(shape, state_view, {words.data(), 1, 15}), InvalidArgument);
  for (const char* name : {"", "mul2", "mul1-", "mul1-123", "mul1-83DCD12C", "1mad-83DCD12D",
                           "3inst-00000001", "mcg-G3DCD12D", "octagon-00000002", "octagon-1"}) {
    EXPECT_THROW(trellis_codebook(name), InvalidArgument) << name;
  }
  EXPECT_THROW(trellis_codebook("mul1", 3), InvalidArgument);
  EXPECT_THROW(trellis_codebook("mul1", 25), InvalidArgument);
  EXPECT_THROW(trellis_codebook("hyb", 14), InvalidArgument);
}

TEST(TrellisCodebooks, NamesAndMoments) {
  for (const std::string& name : trellis_codebook_names()) {
    const TrellisCodebook codebook = trellis_codebook(name);
    EXPECT_EQ(codebook.name, name);
    EXPECT_EQ(std::ssize(codebook.values()), 65536 * codebook.weights_per_step);
    double mean = 0;
    for (const float value : codebook.values()) mean += value;
    EXPECT_LT(std::abs(mean) / static_cast<double>(codebook.values().size()), 0.01) << name;
  }
  EXPECT_EQ(trellis_codebook("mcg-cbac1fed").name, "mcg");
  EXPECT_EQ(trellis_codebook("mul1-ad9a2ec5").name, "mul1-AD9A2EC5");
  EXPECT_EQ(trellis_codebook("octagon-9e3779b1").name, "octagon-9E3779B1");
  EXPECT_NEAR(trellis_codebook("mul1").rms(), 1.00031207, 1e-6);
  EXPECT_NEAR(trellis_codebook("rptc").rms(), 1, 1e-3);
  EXPECT_NEAR(trellis_codebook("rptc2").rms(), 1, 1e-3);
}

}  // namespace
}  // namespace quantloom
