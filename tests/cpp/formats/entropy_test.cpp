#include "quantloom/formats/entropy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "quantloom/error.hpp"
#include "quantloom/random.hpp"
#include "simd_targets.hpp"

namespace quantloom {
namespace {

constexpr std::array<EntropyCoder, 2> kCoders = {EntropyCoder::rans, EntropyCoder::huffman};

// Codes of `alphabet` symbols, of normal values that are `spread` symbols wide; 0: all equally often.
template <class Code>
std::vector<Code> random_codes(int64_t count, int64_t alphabet, double spread, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<Code> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) {
    const double centre = static_cast<double>(alphabet - 1) / 2;
    const double value = spread > 0 ? std::nearbyint(centre + spread * random.normal(i))
                                    : static_cast<double>(random.below(i, static_cast<uint64_t>(alphabet)));
    codes[i] = static_cast<Code>(std::clamp(value, 0.0, static_cast<double>(alphabet - 1)));
  }
  return codes;
}

template <class Code>
std::vector<Code> decode_all(const std::vector<std::byte>& bytes, int threads = 1) {
  const EntropyStream stream(bytes);
  std::vector<Code> codes(static_cast<size_t>(stream.count()));
  stream.decode(0, codes, threads);
  return codes;
}

double bits_per_code(const std::vector<std::byte>& bytes, int64_t count) {
  return 8.0 * static_cast<double>(bytes.size()) / static_cast<double>(count);
}

TEST(Entropy, OddSizesComeBack) {
  uint64_t seed = 1;
  for (const EntropyCoder coder : kCoders) {
    for (const int64_t count : {0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 255, 256, 257, 997, 4099, 40009}) {
      for (const int64_t alphabet : {1, 2, 3, 16, 37, 256}) {
        for (const int64_t chunk : {0, 128, 384, 4096}) {
          SCOPED_TRACE(text_of(count, " codes of ", alphabet, " in chunks of ", chunk));
          const double spread = ++seed % 3 == 0 ? 0.0 : static_cast<double>(alphabet) / 12.0;
          const auto codes = random_codes<uint8_t>(count, alphabet, spread, seed);
          const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = chunk, .threads = 1});
          ASSERT_EQ(decode_all<uint8_t>(bytes), codes);
          if (seed % 5 == 0) {
            ASSERT_EQ(decode_all<uint16_t>(bytes), std::vector<uint16_t>(codes.begin(), codes.end()));
          }
        }
      }
    }
  }
}

TEST(Entropy, WideAlphabetsComeBack) {
  uint64_t seed = 100;
  for (const EntropyCoder coder : kCoders) {
    for (const int64_t alphabet : {257, 1000, 4096}) {
      for (const double spread : {0.0, 9.0, 300.0}) {
        const auto codes = random_codes<uint16_t>(50'021, alphabet, spread, ++seed);
        const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 1280});
        ASSERT_EQ(decode_all<uint16_t>(bytes), codes) << alphabet << " " << spread;
        std::vector<uint8_t> narrow(codes.size());
        const EntropyStream stream(bytes);
        if (stream.alphabet() > 256) {
          EXPECT_THROW(stream.decode(0, narrow), InvalidArgument);
        }
      }
    }
  }
}

TEST(Entropy, EveryTableSizeComesBack) {
  const auto codes = random_codes<uint8_t>(30'011, 200, 4.0, 7);
  for (int bits = kEntropySmallestTable; bits <= kEntropyLargestTable; ++bits) {
    ASSERT_EQ(decode_all<uint8_t>(entropy_encode(codes, {.table_bits = bits})), codes) << bits;
  }
  for (int bits = 6; bits <= kEntropyLongestCode; ++bits) {
    const auto bytes = entropy_encode(codes, {.coder = EntropyCoder::huffman, .table_bits = bits});
    ASSERT_EQ(decode_all<uint8_t>(bytes), codes) << bits;
  }
}

TEST(Entropy, BytesDoNotDependOnThreads) {
  for (const EntropyCoder coder : kCoders) {
    const auto codes = random_codes<uint8_t>(700'001, 64, 5.0, 11);
    const auto one = entropy_encode(codes, {.coder = coder, .chunk = 8192, .threads = 1});
    for (const int threads : {2, 4}) {
      EXPECT_EQ(entropy_encode(codes, {.coder = coder, .chunk = 8192, .threads = threads}), one);
      EXPECT_EQ(decode_all<uint8_t>(one, threads), codes);
    }
  }
}

TEST(Entropy, RansIsWithinAHundredthOfABitOfTheEntropy) {
  constexpr int64_t kCount = 1 << 20;
  const CounterRandom random(5);
  std::vector<uint8_t> heavy(kCount);  // tails like those of weights: most symbols are rare
  for (size_t i = 0; i < heavy.size(); ++i) {
    const double t =
        random.normal(2 * i) / std::sqrt(0.2 - 0.3 * std::log(random.uniform(2 * i + 1) + 1e-300));
    heavy[i] = static_cast<uint8_t>(std::clamp(std::nearbyint(128 + 12 * t), 0.0, 255.0));
  }
  const std::vector<std::vector<uint8_t>> cases = {random_codes<uint8_t>(kCount, 3, 0.2, 1),
                                                   random_codes<uint8_t>(kCount, 37, 2.0, 2),
                                                   random_codes<uint8_t>(kCount, 256, 30.0, 3),
                                                   random_codes<uint8_t>(kCount, 256, 2.0, 4),
                                                   random_codes<uint8_t>(kCount, 256, 0.0, 5),
                                                   random_codes<uint8_t>(kCount, 16, 0.0, 6),
                                                   std::vector<uint8_t>(kCount, 3),
                                                   heavy};
  for (const auto& codes : cases) {
    const double entropy = entropy_of(count_codes(codes, 256));
    const double bits = bits_per_code(entropy_encode(codes), kCount);
    EXPECT_LE(bits, entropy + 0.01) << "entropy " << entropy;
    EXPECT_GE(bits, entropy - 1e-9);
  }
}

// Normal values on a grid: the figures of an ideal Huffman code.
TEST(Entropy, HuffmanOverheadOnNormalGrids) {
  const auto grid_counts = [](double step) {
    std::vector<uint64_t> counts;
    const auto reach = static_cast<int>(std::ceil(8 / step));
    for (int i = -reach; i <= reach; ++i) {
      const double a = std::erfc((i - 0.5) * step / std::sqrt(2.0));
      const double b = std::erfc((i + 0.5) * step / std::sqrt(2.0));
      counts.push_back(static_cast<uint64_t>(std::llround((a - b) / 2 * 0x1p50)));
    }
    return counts;
  };
  const std::array<double, 4> overhead = {0.066, 0.042, 0.040, 0.039};
  for (int bits = 3; bits <= 6; ++bits) {
    double low = 0.001;
    double high = 4;
    for (int i = 0; i < 60; ++i) {  // the step whose entropy is `bits`
      const double middle = (low + high) / 2;
      (entropy_of(grid_counts(middle)) > bits ? low : high) = middle;
    }
    const auto counts = grid_counts(low);
    const std::vector<double> weights(counts.begin(), counts.end());
    const auto lengths = huffman_lengths(weights);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double mean = 0;
    for (size_t i = 0; i < lengths.size(); ++i) mean += weights[i] / total * lengths[i];
    EXPECT_NEAR(mean - bits, overhead[static_cast<size_t>(bits - 3)], 0.0015) << bits;
  }
}

// All complete codes of a few symbols, by depth-first search: the least cost is that of huffman_lengths.
double least_cost(const std::vector<double>& weights, int longest) {
  std::vector<double> sorted = weights;
  std::sort(sorted.rbegin(), sorted.rend());
  double best = 1e300;
  const auto search = [&](const auto& self, size_t i, int shortest, int64_t kraft, double cost) -> void {
    const int64_t whole = int64_t{1} << longest;
    if (i == sorted.size()) {
      if (kraft <= whole) best = std::min(best, cost);
      return;
    }
    for (int length = shortest; length <= longest; ++length) {
      const int64_t next = kraft + (whole >> length);
      if (next > whole) continue;
      self(self, i + 1, length, next, cost + sorted[i] * length);
    }
  };
  search(search, 0, 1, 0, 0.0);
  return best;
}

TEST(Entropy, HuffmanLengthsAreOptimal) {
  const CounterRandom random(3);
  uint64_t draw = 0;
  for (int round = 0; round < 60; ++round) {
    const int64_t symbols = 2 + static_cast<int64_t>(random.below(draw++, 7));
    std::vector<double> weights;
    for (int64_t i = 0; i < symbols; ++i) weights.push_back(std::exp(3 * random.normal(draw++)));
    for (const int longest : {3, 4, 8}) {
      if (symbols > int64_t{1} << longest) continue;
      const auto lengths = huffman_lengths(weights, longest);
      double cost = 0;
      double kraft = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        ASSERT_GE(lengths[i], 1);
        ASSERT_LE(lengths[i], longest);
        cost += weights[i] * lengths[i];
        kraft += std::exp2(-lengths[i]);
      }
      EXPECT_EQ(kraft, 1.0);
      EXPECT_NEAR(cost, least_cost(weights, longest), 1e-9 * cost);
    }
  }
  EXPECT_EQ(huffman_lengths(std::vector<double>{}), std::vector<int>{});
  EXPECT_EQ(huffman_lengths(std::vector<double>{0, 2, 0}), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(huffman_lengths(std::vector<double>{1, 0, 2}), (std::vector<int>{1, 0, 1}));
  EXPECT_THROW(huffman_lengths(std::vector<double>{1, -1}), InvalidArgument);
  EXPECT_THROW(huffman_lengths(std::vector<double>{1, NAN}), InvalidArgument);
  EXPECT_THROW(huffman_lengths(std::vector<double>(5, 1.0), 2), InvalidArgument);
}

// Every way to deal the slots out, for few symbols.
double least_cross_entropy(const std::vector<uint64_t>& counts, int slots) {
  double best = 1e300;
  std::vector<uint32_t> model(counts.size());
  const auto search = [&](const auto& self, size_t i, int left) -> void {
    if (i + 1 == counts.size()) {
      if ((counts[i] == 0) != (left == 0)) return;
      model[i] = static_cast<uint32_t>(left);
      best = std::min(best, cross_entropy_of(counts, model));
      return;
    }
    for (int f = counts[i] == 0 ? 0 : 1; f <= (counts[i] == 0 ? 0 : left); ++f) {
      model[i] = static_cast<uint32_t>(f);
      self(self, i + 1, left - f);
    }
  };
  search(search, 0, slots);
  return best;
}

TEST(Entropy, FrequenciesLoseAsLittleAsPossible) {
  const CounterRandom random(9);
  uint64_t draw = 0;
  for (int round = 0; round < 50; ++round) {
    std::vector<uint64_t> counts(4);
    for (auto& c : counts) c = static_cast<uint64_t>(std::exp(3 + 3 * random.normal(draw++)));
    counts[3] += 1;
    const auto model = quantize_frequencies(counts, 5);
    EXPECT_EQ(std::accumulate(model.begin(), model.end(), 0U), 32U);
    EXPECT_NEAR(cross_entropy_of(counts, model), least_cross_entropy(counts, 32), 1e-9);
  }
  EXPECT_THROW(quantize_frequencies(std::vector<uint64_t>(9, 1), 3), InvalidArgument);
  EXPECT_THROW(quantize_frequencies(std::vector<uint64_t>(3, 0), 3), InvalidArgument);
  EXPECT_EQ(quantize_frequencies(std::vector<uint64_t>{0, 7, 0}, 4), (std::vector<uint32_t>{0, 16, 0}));
}

TEST(Entropy, TakesAModelOfOtherData) {
  const auto codes = random_codes<uint8_t>(20'000, 20, 2.0, 21);
  std::vector<uint64_t> model(32);
  for (size_t i = 0; i < model.size(); ++i) model[i] = 1 + i;
  for (const EntropyCoder coder : kCoders) {
    const auto bytes = entropy_encode(codes, {.coder = coder, .frequencies = model});
    EXPECT_EQ(decode_all<uint8_t>(bytes), codes);
    EXPECT_EQ(EntropyStream(bytes).alphabet(), 32);
    model[10] = 0;
    EXPECT_THROW(entropy_encode(codes, {.coder = coder, .frequencies = model}), InvalidArgument);
    model[10] = 1;
    EXPECT_THROW(entropy_encode(codes, {.coder = coder, .frequencies = std::span(model).first(5)}),
                 InvalidArgument);
  }
}

TEST(Entropy, RefusesBadArguments) {
  const std::vector<uint8_t> codes(10, 1);
  EXPECT_THROW(entropy_encode(codes, {.table_bits = 7}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.table_bits = 16}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.coder = EntropyCoder::huffman, .table_bits = 17}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.chunk = 100}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.chunk = -128}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.chunk = kEntropyLargestChunk * 2}), InvalidArgument);
  EXPECT_THROW(entropy_encode(codes, {.threads = -1}), InvalidArgument);
  EXPECT_THROW(entropy_encode(std::vector<uint16_t>{1, 4096}), InvalidArgument);
}

TEST(Entropy, DecodesRanges) {
  for (const EntropyCoder coder : kCoders) {
    const auto codes = random_codes<uint8_t>(5000, 64, 5.0, 31);
    const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 512});
    const EntropyStream stream(bytes);
    for (const auto& [first, count] : {std::array<int64_t, 2>{0, 5000},
                                       {0, 0},
                                       {5000, 0},
                                       {511, 2},
                                       {512, 512},
                                       {100, 30},
                                       {700, 3000},
                                       {4999, 1}}) {
      std::vector<uint8_t> out(static_cast<size_t>(count));
      stream.decode(first, out, 2);
      EXPECT_TRUE(std::equal(out.begin(), out.end(), codes.begin() + first)) << first << " " << count;
    }
    std::vector<uint8_t> out(2);
    EXPECT_THROW(stream.decode(4999, out), InvalidArgument);
    EXPECT_THROW(stream.decode(-1, out), InvalidArgument);
    EXPECT_THROW(stream.decode(5001, std::span<uint8_t>()), InvalidArgument);
  }
}

// Whatever happens to the bytes, decoding ends with an error or with as many codes as it says.
void expect_safe(const std::vector<std::byte>& bytes) {
  try {
    const EntropyStream stream(bytes);
    if (stream.count() > 1 << 20) return;
    std::vector<uint16_t> codes(static_cast<size_t>(stream.count()));
    stream.decode(0, codes, 1);
    for (const uint16_t code : codes) ASSERT_LT(code, stream.alphabet());
  } catch (const FileFormatError& error) {
    EXPECT_NE(std::string(error.what()).find("entropy stream"), std::string::npos);
  }
}

TEST(Entropy, HostileStreamsEndInErrors) {
  const CounterRandom random(77);
  uint64_t draw = 0;
  for (const EntropyCoder coder : kCoders) {
    for (const double spread : {0.0, 3.0}) {
      const auto codes = random_codes<uint8_t>(3000, 60, spread, 41);
      const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 640});
      for (size_t size = 0; size < bytes.size(); size += 1 + size / 64) {  // every truncation is noticed
        const std::vector<std::byte> part(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
        EXPECT_THROW(EntropyStream{part}, FileFormatError) << size;
      }
      auto longer = bytes;
      longer.push_back(std::byte{0});
      EXPECT_THROW(EntropyStream{longer}, FileFormatError);
      for (int round = 0; round < 3000; ++round) {
        auto changed = bytes;
        const uint64_t changes = 1 + random.below(draw++, 4);
        for (uint64_t i = 0; i < changes; ++i) {
          // Half of the changes in the header, the model and the offsets.
          const size_t bound = random.below(draw++, 2) == 0 ? 200 : changed.size();
          const size_t at = random.below(draw++, bound);
          changed[at] = static_cast<std::byte>(random.bits(draw++));
        }
        expect_safe(changed);
      }
      for (int round = 0; round < 300; ++round) {  // random words behind a sound head
        auto changed = bytes;
        const size_t from = static_cast<size_t>(EntropyStream(bytes).payload_offset());
        for (size_t i = from; i < changed.size(); ++i) {
          changed[i] = static_cast<std::byte>(random.bits(draw++));
        }
        expect_safe(changed);
      }
    }
  }
}

// The vectors of every instruction set against the steps for 16-bit codes, which have none: the same codes,
// and the same streams refused.
TEST(Entropy, InstructionSetsAgree) {
  const CounterRandom random(15);
  uint64_t draw = 0;
  for (const int64_t setting : {2, 20, 256, -2, -20, -256}) {
    const int64_t alphabet = std::abs(setting);
    const EntropyCoder coder = setting < 0 ? EntropyCoder::huffman : EntropyCoder::rans;
    auto codes = random_codes<uint8_t>(9000, alphabet, alphabet == 20 ? 1.0 : 20.0, 61);
    for (size_t i = 5; alphabet == 20 && i < codes.size(); i += 61) {  // rare ones, which are spelled out
      codes[i] = static_cast<uint8_t>(40 + i / 61);
    }
    auto bytes = entropy_encode(codes, {.coder = coder, .table_bits = 10, .chunk = 4096});
    const auto payload = static_cast<size_t>(EntropyStream(bytes).payload_offset());
    for (int round = 0; round < 20; ++round) {
      const EntropyStream stream(bytes);
      std::vector<uint16_t> expected(codes.size());
      bool sound = true;
      try {
        stream.decode(0, expected, 1);
      } catch (const FileFormatError&) {
        sound = false;
      }
      ASSERT_TRUE(sound || round > 0);
      for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
        hwy::SetSupportedTargetsForTest(target);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        std::vector<uint8_t> got(codes.size());
        if (sound) {
          stream.decode(0, got, 1);
          EXPECT_TRUE(std::equal(got.begin(), got.end(), expected.begin())) << hwy::TargetName(target);
        } else {
          EXPECT_THROW(stream.decode(0, got, 1), FileFormatError) << hwy::TargetName(target);
        }
      }
      hwy::SetSupportedTargetsForTest(0);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      const size_t at = payload + random.below(draw, bytes.size() - payload);
      bytes[at] ^= static_cast<std::byte>(1 + random.below(draw + 1, 255));
      draw += 2;
    }
  }
}

TEST(Entropy, NoticesChangedWords) {
  const auto codes = random_codes<uint8_t>(20'000, 40, 3.0, 43);
  const auto bytes = entropy_encode(codes);
  const CounterRandom random(5);
  const auto payload = static_cast<size_t>(EntropyStream(bytes).payload_offset());
  int unnoticed = 0;
  for (uint64_t round = 0; round < 200; ++round) {
    auto changed = bytes;
    const size_t at = payload + random.below(2 * round, bytes.size() - payload);
    changed[at] ^= static_cast<std::byte>(1 + random.below(2 * round + 1, 255));
    try {
      static_cast<void>(decode_all<uint8_t>(changed));
      ++unnoticed;
    } catch (const FileFormatError&) {
      continue;
    }
  }
  EXPECT_EQ(unnoticed, 0);
}

}  // namespace
}  // namespace quantloom
