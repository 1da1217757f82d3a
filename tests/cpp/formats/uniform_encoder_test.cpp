#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "formats/encoder_driver.hpp"
#include "formats/uniform_reference.hpp"

namespace quantloom {
namespace {

using testing::code_at;
using testing::consecutive_groups;
using testing::encode;
using testing::Encoded;
using testing::scale_at;
using testing::shuffled_groups;

void expect_equal(const Encoded& encoded, const reference::UniformCodes& expected, const Uniform& format) {
  const PackedTensor& packed = encoded.packed;
  validate(packed);
  const Tensor& codes = packed.plane("codes");
  for (int64_t r = 0; r < packed.n; ++r) {
    for (int64_t c = 0; c < packed.k; ++c) {
      ASSERT_EQ(code_at(codes, format.bits, r, c), expected.codes[r * packed.k + c]) << r << ", " << c;
    }
  }
  const Tensor& scales = packed.plane("scales");
  ASSERT_EQ(static_cast<size_t>(scales.element_count()), expected.scales.size());
  const int64_t groups = scales.shape()[1];
  for (int64_t i = 0; i < scales.element_count(); ++i) {
    ASSERT_EQ(scale_at(scales, i), expected.scales[i]) << i;
    if (!format.symmetric) {
      ASSERT_EQ(code_at(packed.plane("zeros"), format.bits, i % groups, i / groups), expected.zeros[i]);
    }
  }
  const auto decoded = testing::decoded_values(packed);
  for (size_t i = 0; i < decoded.size(); ++i) {
    ASSERT_EQ(decoded[i], expected.decoded[i]) << i;
    ASSERT_EQ(encoded.decoded[i], expected.decoded[i]) << i;
  }
}

TEST(UniformEncoder, EqualsTheReferenceForAllKindsOfGrids) {
  uint64_t seed = 1;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t group_size :
         {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{128}, Uniform::kPerChannel, Uniform::kPerTensor}) {
      for (const bool symmetric : {true, false}) {
        for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
          const auto format = std::make_shared<const Uniform>(bits, group_size, symmetric, dtype);
          const CounterRandom random(++seed);
          const auto n = static_cast<int64_t>(random.below(0, 140));
          const auto k = static_cast<int64_t>(1 + random.below(1, 150));
          SCOPED_TRACE(text_of(format->spec(), " [", n, ", ", k, "]"));
          auto w = testing::normal_values(n * k, seed);
          if (seed % 3 == 0) {
            for (float& value : w) value = std::abs(value) + 0.5F;  // no group holds zero
          }
          const auto groups = consecutive_groups(*format, k);
          const float shrink = seed % 2 == 0 ? 1.0F : 0.83F;
          const auto expected = reference::quantize(w, n, k, *format, groups, shrink);
          const auto slab = static_cast<int64_t>(1 + random.below(2, 100));
          expect_equal(encode(format, w, n, k, groups, seed % 2 == 0, slab, shrink), expected, *format);
        }
      }
    }
  }
}

TEST(UniformEncoder, EqualsTheReferenceForPermutedGroups) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const CounterRandom random(seed);
    const auto format = std::make_shared<const Uniform>(static_cast<int>(1 + random.below(0, 8)),
                                                        static_cast<int64_t>(1 + random.below(1, 40)),
                                                        random.below(2, 2) == 0);
    const auto n = static_cast<int64_t>(1 + random.below(3, 70));
    const auto k = static_cast<int64_t>(1 + random.below(4, 150));
    SCOPED_TRACE(text_of(format->spec(), " [", n, ", ", k, "]"));
    const auto w = testing::normal_values(n * k, seed);
    const auto groups = shuffled_groups(*format, k, seed);
    const auto expected = reference::quantize(w, n, k, *format, groups);
    const auto encoded = encode(format, w, n, k, groups, true, 64, 1);
    expect_equal(encoded, expected, *format);
    EXPECT_EQ(encoded.packed.planes.contains("group_index"), groups != consecutive_groups(*format, k));
  }
}

TEST(UniformEncoder, PacksEveryShapeAndWidth) {
  constexpr int64_t kSizes[] = {0,  1,  2,  3,  5,   7,   8,   15,  16,  17,   31,  32,
                                33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4097};
  constexpr int64_t kLargest = int64_t{1} << 19;
  const CounterRandom random(21);
  std::vector<uint8_t> bytes(kLargest);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(random.bits(i));
  for (int bits = 1; bits <= 8; ++bits) {
    const auto format = std::make_shared<const Uniform>(bits, Uniform::kPerTensor, false);
    const int zero = 1 << (bits - 1);
    const float ends[2] = {static_cast<float>(-zero), static_cast<float>((1 << bits) - 1 - zero)};  // scale 1
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        if (n * k > kLargest) continue;
        const auto encoder = format->column_encoder(format, n, k, {});
        encoder->fit(0, 0, MatrixView<const float>(ends, 2, 1), {});
        const auto code_of = [&](int64_t r, int64_t c) { return bytes[c * n + r] & ((1 << bits) - 1); };
        std::vector<float> values(static_cast<size_t>(n));
        std::vector<float> decoded(static_cast<size_t>(n));
        for (int64_t c = 0; c < k; ++c) {
          for (int64_t r = 0; r < n; ++r) values[r] = static_cast<float>(code_of(r, c) - zero);
          encoder->encode(c, 0, MatrixView<const float>(values.data(), 1, n),
                          MatrixView<float>(decoded.data(), 1, n));
          ASSERT_EQ(decoded, values);
        }
        const PackedTensor packed = encoder->finish(1);
        validate(packed);
        const auto words = packed.plane("codes").values<uint32_t>();
        const auto row_words = static_cast<size_t>(packed_words(k, bits));
        std::vector<uint8_t> row(static_cast<size_t>(k));
        for (int64_t r = 0; r < n; ++r) {
          unpack_bits(words.subspan(static_cast<size_t>(r) * row_words, row_words), bits, 0, row);
          for (int64_t c = 0; c < k; ++c)
            ASSERT_EQ(row[c], code_of(r, c)) << bits << " bits, " << n << " x " << k;
        }
      }
    }
  }
}

// Worked out by hand.
TEST(UniformEncoder, FollowsTheRuleOnSmallCases) {
  struct Case {
    const char* spec;
    std::vector<float> row;
    float scale;
    int zero;
    std::vector<int> codes;
  };
  const std::vector<Case> cases = {
      // amax 7.5: scale 2 * 7.5 / 15 = 1; 7.5 clips to 15, -7.5 is a tie that goes to -8; ties to even.
      {"uniform:4:channel:sym", {7.5F, -7.5F, 0.5F, 1.5F, -0.5F, 0, -1}, 1, 8, {15, 0, 8, 10, 8, 8, 7}},
      // scale 2 * 3 / 3 = 2, levels -2 ... 1: -3 is -1.5 steps, even is -2.
      {"uniform:2:channel:sym", {3, -3, 1, -1, 2}, 2, 2, {3, 0, 2, 2, 3}},
      // 2 * mean |w| = 2 * 10 / 4
      {"uniform:1:channel:sym", {1, -2, 3, -4}, 5, 0, {1, 0, 1, 0}},
      {"uniform:1:channel:sym", {0, -0.0F, -4, 4}, 4, 0, {1, 1, 0, 1}},
      // lo -5, hi 10: scale 15 / 15, zero 5.
      {"uniform:4:channel:asym", {-5, 10, 0, 2.5F, 3.5F, -1}, 1, 5, {0, 15, 5, 7, 9, 4}},
      // All positive: the range still begins at 0.
      {"uniform:4:channel:asym", {15, 14, 13}, 1, 0, {15, 14, 13}},
      // All negative.
      {"uniform:4:channel:asym", {-15, -14, -13}, 1, 15, {0, 1, 2}},
      {"uniform:1:channel:asym", {-1, 3}, 4, 0, {0, 1}},
      {"uniform:8:channel:asym", {-0.5F, 254.5F}, 1, 0, {0, 254}},
      // All zero: scale 1.
      {"uniform:4:channel:sym", {0, 0}, 1, 8, {8, 8}},
      {"uniform:4:channel:asym", {0, -0.0F}, 1, 0, {0, 0}},
      // One bit has no zero: the smallest scale comes closest.
      {"uniform:1:channel:sym", {0, -0.0F}, 0x1p-24F, 0, {1, 1}},
      {"uniform:1:channel:sym:bf16", {0, -0.0F}, 0x1p-126F, 0, {1, 1}},
      // Scales below the smallest are raised to it.
      {"uniform:4:channel:sym", {1e-9F, -1e-9F}, 0x1p-24F, 8, {8, 8}},
      {"uniform:4:channel:asym:f32", {0x1p-149F, 0x1p-127F}, 0x1p-126F, 0, {0, 0}},
      // The scale 2 / 7 is rounded before it divides: down in float16 and bfloat16, so that -1 lies beyond
      // -3.5 steps, and up in float32.
      {"uniform:3:channel:sym", {1, -1, 0.1F}, 0.28564453125F, 4, {7, 0, 4}},
      {"uniform:3:channel:sym:bf16", {1, -1, 0.1F}, 0.28515625F, 4, {7, 0, 4}},
      {"uniform:3:channel:sym:f32", {1, -1, 0.1F}, 0.285714298486709595F, 4, {7, 1, 4}},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(text_of(each.spec, " of ", each.row[0], ", ", each.row[1]));
    const auto format = format_from_spec(each.spec);
    const auto& uniform = dynamic_cast<const Uniform&>(*format);
    const auto k = static_cast<int64_t>(each.row.size());
    const auto encoded =
        encode(format, each.row, 1, k, std::vector<int32_t>(each.row.size(), 0), false, 1, 1);
    EXPECT_EQ(scale_at(encoded.packed.plane("scales"), 0), each.scale);
    if (!uniform.symmetric) {
      EXPECT_EQ(code_at(encoded.packed.plane("zeros"), uniform.bits, 0, 0), each.zero);
    }
    for (int64_t c = 0; c < k; ++c) {
      EXPECT_EQ(code_at(encoded.packed.plane("codes"), uniform.bits, 0, c), each.codes[c]) << c;
    }
  }
}

// Error feedback may drive its working copy anywhere; the codes stay inside the grid.
TEST(UniformEncoder, EncodesAnyValueWithoutUndefinedConversions) {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      const auto format = std::make_shared<const Uniform>(bits, 1, symmetric);
      const auto encoder = format->column_encoder(format, 1, 1, {});
      const float fitted = 0.01F;
      encoder->fit(0, 0, MatrixView<const float>(&fitted, 1, 1), {});
      for (const float value : {kMax, -kMax, kInfinity, -kInfinity, std::nanf(""), 1e30F, -1e30F, 1e-45F}) {
        float decoded = 0;
        encoder->encode(0, 0, MatrixView<const float>(&value, 1, 1), MatrixView<float>(&decoded, 1, 1));
        EXPECT_TRUE(std::isfinite(decoded)) << bits << " bits, " << value;
        EXPECT_LE(std::abs(decoded), 0.0205F);
      }
      validate(encoder->finish(1));
    }
  }
}

TEST(UniformEncoder, RefusesBadGroups) {
  const auto format = std::make_shared<const Uniform>(4, 2);
  const auto make = [&](const std::vector<int32_t>& groups) { format->column_encoder(format, 3, 5, groups); };
  EXPECT_NO_THROW(make({0, 1, 0, 1, 2}));
  EXPECT_THROW(make({0, 0, 1, 1}), InvalidArgument);        // too few
  EXPECT_THROW(make({0, 0, 1, 1, 2, 2}), InvalidArgument);  // too many
  EXPECT_THROW(make({0, 0, 1, 1, 3}), InvalidArgument);     // no such group
  EXPECT_THROW(make({0, 0, 1, 1, -1}), InvalidArgument);    // negative
  EXPECT_THROW(make({0, 0, 0, 1, 1}), InvalidArgument);     // three columns in a group of two
  EXPECT_THROW(format->column_encoder(format, -1, 5, {}), InvalidArgument);
  EXPECT_THROW(format->column_encoder(format, 5, -1, {}), InvalidArgument);
  EXPECT_THROW(format->column_encoder(format, INT64_MAX, 5, {}), InvalidArgument);
  EXPECT_THROW(format->column_encoder(format, INT64_MAX / 8, INT64_MAX / 8, {}), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
