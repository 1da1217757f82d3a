// How near trellis-coded rings of the device come to those of a plain float32 search.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "trellis_reference.hpp"
#include "trellis_rings.hpp"

namespace quantloom {
namespace {

// Two weights a step, against the float32 search of the CPU, in batches of one, two and four pairs of rings a
// block.
TEST_F(TrellisCuda, TwoWeightsAStepLoseAsLittle) {
  for (const char* name : {"octagon", "hyb"}) {
    const Twin codebook(name);
    for (const int half_bits : {2, 3, 4, 5, 6, 7, 8}) {
      const double scale = trellis_best_ratio(half_bits, codebook.host.code) * codebook.host.rms();
      constexpr int64_t kCount = 96;
      std::vector<float> targets = normal_targets(kCount, scale, 31);
      const TrellisShape shape = shape_of(half_bits / 2.0, 2);
      std::vector<uint32_t> states(static_cast<size_t>(kCount * shape.steps()));
      encode_rings(codebook.host, shape, {targets.data(), kCount, kPositions},
                   {states.data(), kCount, shape.steps()});
      std::vector<float> weights(targets.size());
      decode_rings(codebook.host, shape, {states.data(), kCount, shape.steps()},
                   {weights.data(), kCount, kPositions});
      double exact = 0;
      for (size_t i = 0; i < targets.size(); ++i) exact += std::pow(double{targets[i]} - weights[i], 2);
      exact /= static_cast<double>(targets.size());
      const Rings few = encode(codebook, targets, half_bits / 2.0, TrellisSearch::normal);
      EXPECT_NEAR(mean_error(few) / exact, 1, 2e-3) << name << ", " << half_bits << "/2 bits";
      // The same rings among many more, some thousand of them.
      while (targets.size() < size_t{kPositions} * 1500) {
        targets.insert(targets.end(), targets.begin(), targets.begin() + kPositions * kCount);
      }
      const Rings many = encode(codebook, targets, half_bits / 2.0, TrellisSearch::normal);
      for (size_t ring = 0; ring < many.errors.size(); ++ring) {
        ASSERT_EQ(many.errors[ring], few.errors[ring % kCount])
            << name << ", " << half_bits << "/2 bits, " << ring;
      }
    }
  }
}

// Bits in halves against the float32 search of the CPU.
TEST_F(TrellisCuda, HalfBitsLoseAsLittle) {
  const Twin codebook("mul1");
  for (const int half_bits : {3, 5, 7, 9, 11}) {
    const double scale = trellis_best_ratio(half_bits) * codebook.host.rms();
    constexpr int64_t kCount = 320;
    const std::vector<float> targets = normal_targets(kCount, scale, 33);
    const TrellisShape shape = shape_of(half_bits / 2.0);
    std::vector<uint32_t> states(static_cast<size_t>(kCount * shape.steps()));
    encode_rings(codebook.host, shape, {targets.data(), kCount, kPositions},
                 {states.data(), kCount, shape.steps()});
    std::vector<float> weights(targets.size());
    decode_rings(codebook.host, shape, {states.data(), kCount, shape.steps()},
                 {weights.data(), kCount, kPositions});
    double exact = 0;
    for (size_t i = 0; i < targets.size(); ++i) exact += std::pow(double{targets[i]} - weights[i], 2);
    exact /= static_cast<double>(targets.size());
    const double found = mean_error(encode(codebook, targets, half_bits / 2.0, TrellisSearch::normal));
    std::printf("mul1 %d/2 bits: float32 %.7f of the variance; normal %+.3f%%\n", half_bits,
                exact / (scale * scale), 100 * (found / exact - 1));
    EXPECT_NEAR(found / exact, 1, 1e-3) << half_bits << "/2 bits";
  }
}

// Paired with a plain search on the same rings.
TEST_F(TrellisCuda, LossAgainstFloat32SearchIsAsStated) {
  constexpr int64_t kCount = 1056;
  for (const char* name : {"mul1", "3inst"}) {
    const Twin codebook(name);
    for (int bits = 1; bits <= 8; ++bits) {
      const double scale = (bits <= 2 ? 1.0 : bits == 3 ? 0.95 : 0.9) * codebook.host.rms();
      const std::vector<float> targets = normal_targets(kCount, scale, 7);
      const std::vector<uint16_t> states =
          testing::reference_rings(codebook.values, targets, bits, kPositions / 2);
      double exact = 0;
      for (int64_t ring = 0; ring < kCount; ++ring) {
        exact +=
            error_of_states(codebook, targets.data() + ring * kPositions, states.data() + ring * kPositions);
      }
      exact /= static_cast<double>(kCount * kPositions);
      std::map<TrellisSearch, double> ratio;
      for (const TrellisSearch search : {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best}) {
        ratio[search] = mean_error(encode(codebook, targets, bits, search)) / exact;
      }
      std::printf("%-6s %d bits: float32 %.7f of the variance; fast %+.3f%%, normal %+.3f%%, best %+.3f%%\n",
                  name, bits, exact / (scale * scale), 100 * (ratio[TrellisSearch::fast] - 1),
                  100 * (ratio[TrellisSearch::normal] - 1), 100 * (ratio[TrellisSearch::best] - 1));
      // Costs are float16: at 7 and 8 bits their rounding shows.
      const double stated = bits <= 4 ? 1.0003 : bits <= 6 ? 1.0005 : 1.004;
      EXPECT_LE(ratio[TrellisSearch::normal], stated) << name << ", " << bits << " bits";
      EXPECT_LE(ratio[TrellisSearch::fast], 1.0125) << name << ", " << bits << " bits";
      EXPECT_LE(ratio[TrellisSearch::best], bits <= 4 ? 1.0 : 1.006) << name << ", " << bits << " bits";
    }
  }
}

// The distortion of a normal source, as published measurements have it.
TEST_F(TrellisCuda, DistortionOfANormalSource) {
  const Twin codebook("mul1");
  const std::map<int, std::pair<double, double>> expected = {
      {2, {1.0, 0.06826}}, {3, {0.95, 0.01735}}, {4, {0.9, 0.004445}}};
  for (const auto& [bits, row] : expected) {
    const double scale = row.first * codebook.host.rms();
    const Rings rings = encode(codebook, normal_targets(4224, scale, 3), bits, TrellisSearch::normal);
    EXPECT_NEAR(mean_error(rings) / (scale * scale), row.second, 0.01 * row.second) << bits << " bits";
  }
}

}  // namespace
}  // namespace quantloom
