#include "quantloom/formats/bit_packing.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "formats/row_packing.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr uint32_t kCanary = 0xdeadbeefU;
constexpr int kCanaryWords = 16;  // 64 bytes

// One bit at a time: the definition of the stream.
std::vector<uint32_t> pack_bit_by_bit(const std::vector<uint8_t>& codes, int bits) {
  std::vector<uint32_t> words(static_cast<size_t>(packed_words(static_cast<int64_t>(codes.size()), bits)));
  for (size_t i = 0; i < codes.size(); ++i) {
    for (int b = 0; b < bits; ++b) {
      const size_t position = i * static_cast<size_t>(bits) + static_cast<size_t>(b);
      if (((codes[i] >> b) & 1) != 0) words[position / 32] |= 1U << (position % 32);
    }
  }
  return words;
}

std::vector<uint8_t> random_codes(int64_t count, int bits, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<uint8_t>(random.bits(i) & ((1U << bits) - 1U));
  return codes;
}

const std::vector<int64_t>& sizes() {
  static const std::vector<int64_t> all = {0,  1,  2,  3,  5,   7,   8,   15,  16,  17,   31,  32,
                                           33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4097};
  return all;
}

TEST(BitPacking, WideCodesMatchTheDefinitionForEveryWidthAndSize) {
  for (int bits = 1; bits <= 16; ++bits) {
    for (const int64_t count : sizes()) {
      const CounterRandom random(static_cast<uint64_t>(100 * count + bits));
      std::vector<uint16_t> codes(static_cast<size_t>(count));
      for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<uint16_t>(random.bits(i) & ((1U << bits) - 1U));
      }
      std::vector<uint32_t> expected(static_cast<size_t>(packed_words(count, bits)));
      for (size_t i = 0; i < codes.size(); ++i) {
        for (int b = 0; b < bits; ++b) {
          const size_t position = i * static_cast<size_t>(bits) + static_cast<size_t>(b);
          if (((codes[i] >> b) & 1) != 0) expected[position / 32] |= 1U << (position % 32);
        }
      }
      std::vector<uint32_t> words(expected.size() + 1, kCanary);
      pack_wide_bits(codes, bits, std::span(words).first(expected.size()));
      EXPECT_EQ(words.back(), kCanary);
      words.pop_back();
      ASSERT_EQ(words, expected) << bits << " bits, " << count;
      std::vector<uint16_t> back(codes.size());
      unpack_wide_bits(words, bits, 0, back);
      ASSERT_EQ(back, codes);
      for (size_t first = 0; first < codes.size(); first += 37) {
        std::vector<uint16_t> some(std::min<size_t>(5, codes.size() - first));
        unpack_wide_bits(words, bits, static_cast<int64_t>(first), some);
        ASSERT_TRUE(std::equal(some.begin(), some.end(), codes.begin() + static_cast<int64_t>(first)));
      }
      EXPECT_THROW(unpack_wide_bits(words, bits, 40 * std::max<int64_t>(count, 1), back), InvalidArgument);
    }
  }
  std::vector<uint16_t> codes(3);
  std::vector<uint32_t> words(3);
  EXPECT_THROW(pack_wide_bits(codes, 17, words), InvalidArgument);
  EXPECT_THROW(pack_wide_bits(codes, 0, words), InvalidArgument);
  EXPECT_THROW(pack_wide_bits(codes, 8, words), InvalidArgument);
  EXPECT_THROW(unpack_wide_bits(words, 16, -1, codes), InvalidArgument);
}

TEST(BitPacking, MatchesTheDefinitionForEveryWidthAndSize) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t count : sizes()) {
      std::vector<std::vector<uint8_t>> inputs = {random_codes(count, bits, 17 * count + bits)};
      inputs.emplace_back(static_cast<size_t>(count), uint8_t{0});
      inputs.emplace_back(static_cast<size_t>(count), static_cast<uint8_t>((1U << bits) - 1U));
      for (const auto& codes : inputs) {
        const std::vector<uint32_t> expected = pack_bit_by_bit(codes, bits);
        std::vector<uint32_t> guarded(expected.size() + 2 * kCanaryWords, kCanary);
        const std::span<uint32_t> words(guarded.data() + kCanaryWords, expected.size());
        pack_bits(codes, bits, words);
        ASSERT_TRUE(std::equal(words.begin(), words.end(), expected.begin())) << bits << " bits, " << count;
        for (int i = 0; i < kCanaryWords; ++i) {
          ASSERT_EQ(guarded[i], kCanary);
          ASSERT_EQ(guarded[guarded.size() - 1 - i], kCanary);
        }
        std::vector<uint8_t> back(codes.size() + 128, 0xee);
        unpack_bits(words, bits, 0, std::span<uint8_t>(back).subspan(64, codes.size()));
        ASSERT_TRUE(std::equal(codes.begin(), codes.end(), back.begin() + 64)) << bits << " bits, " << count;
        for (size_t i = 0; i < 64; ++i) {
          ASSERT_EQ(back[i], 0xee);
          ASSERT_EQ(back[back.size() - 1 - i], 0xee);
        }
      }
    }
  }
}

TEST(BitPacking, UnpacksAnyRange) {
  const CounterRandom random(5);
  for (int bits = 1; bits <= 8; ++bits) {
    const auto codes = random_codes(517, bits, bits);
    const auto words = pack_bit_by_bit(codes, bits);
    for (uint64_t i = 0; i < 300; ++i) {
      const uint64_t first = random.below(2 * i, codes.size() + 1);
      const uint64_t count = random.below(2 * i + 1, codes.size() - first + 1);
      std::vector<uint8_t> part(count);
      unpack_bits(words, bits, static_cast<int64_t>(first), part);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), codes.begin() + static_cast<int64_t>(first)));
    }
  }
}

TEST(BitPacking, IgnoresHigherBits) {
  for (int bits = 1; bits <= 8; ++bits) {
    auto codes = random_codes(77, bits, 3);
    const auto expected = pack_bit_by_bit(codes, bits);
    for (auto& code : codes) code = static_cast<uint8_t>(code | (0xffU << bits));
    std::vector<uint32_t> words(expected.size());
    pack_bits(codes, bits, words);
    EXPECT_EQ(words, expected);
  }
}

TEST(BitPacking, TilePackingEqualsRowPacking) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t columns : {0, 1, 31, 32, 33, 65, 129}) {
      for (const int64_t rows : {0, 1, 7, 63, 64}) {
        const auto tile = random_codes(columns * kRowTile, bits, columns + rows);
        const int64_t words = packed_words(columns, bits);
        const int64_t stride = words + 3;
        std::vector<uint32_t> packed(static_cast<size_t>(rows * stride), kCanary);
        pack_row_tile(tile.data(), columns, bits, rows, packed.data(), stride);
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<uint8_t> row(static_cast<size_t>(columns));
          for (int64_t c = 0; c < columns; ++c) row[c] = tile[c * kRowTile + r];
          const auto expected = pack_bit_by_bit(row, bits);
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), packed.begin() + r * stride));
          for (int64_t w = words; w < stride; ++w) ASSERT_EQ(packed[r * stride + w], kCanary);
        }
      }
    }
  }
}

TEST(BitPacking, RefusesBadArguments) {
  std::vector<uint8_t> codes(33);
  std::vector<uint32_t> words(4);
  EXPECT_THROW(pack_bits(codes, 0, words), InvalidArgument);
  EXPECT_THROW(pack_bits(codes, 9, words), InvalidArgument);
  EXPECT_THROW(pack_bits(codes, 4, words), InvalidArgument);  // needs 5 words
  EXPECT_THROW(unpack_bits(words, 4, 0, codes), InvalidArgument);
  EXPECT_THROW(unpack_bits(words, 4, -1, codes), InvalidArgument);
  EXPECT_THROW(unpack_bits(words, 0, 0, codes), InvalidArgument);
  EXPECT_THROW(unpack_bits(words, 4, INT64_MAX, codes), InvalidArgument);
  EXPECT_THROW(unpack_bits(words, 4, INT64_MAX / 4, codes), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
