// Coded matrices: nothing is lost, little is added, and parts that no encoder made are refused.
#include "quantloom/formats/coded_matrix.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "quantloom/error.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

std::vector<uint8_t> normal_codes(int64_t count, double sigma, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(std::clamp(100 + std::nearbyint(sigma * random.normal(i)), 0.0, 255.0));
  }
  return codes;
}

void expect_codes(const CodedMatrix& matrix, const std::vector<uint8_t>& codes) {
  std::vector<uint8_t> decoded(codes.size(), 0xaa);
  matrix.decode(0, matrix.n(), decoded);
  EXPECT_EQ(decoded, codes);
}

TEST(CodedMatrix, LosesNothing) {
  uint64_t seed = 0;
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 0}, {0, 5}, {5, 0}, {1, 1}, {1, 7}, {16, 32}, {17, 33}, {3, 1000}, {100, 131}, {33, 2050}}) {
    for (const double sigma : {0.0, 0.2, 1.9, 7.0, 40.0}) {
      for (const int splits : {0, 1, 3, 16}) {
        SCOPED_TRACE(text_of(n, " x ", k, ", sigma ", sigma, ", splits ", splits));
        const auto codes = normal_codes(n * k, sigma, ++seed);
        const CodedMatrix matrix(codes, n, k, {.splits = splits});
        expect_codes(matrix, codes);
        const CodedMatrix again =
            CodedMatrix::from_parts(n, k, matrix.splits(), matrix.symbols(), matrix.begins(), matrix.words());
        EXPECT_EQ(again.table(), matrix.table());
        if (n > 2) {
          std::vector<uint8_t> rows(static_cast<size_t>(k));
          matrix.decode(n - 2, 1, rows);
          EXPECT_TRUE(std::equal(rows.begin(), rows.end(), codes.end() - 2 * k));
        }
      }
    }
  }
}

TEST(CodedMatrix, TakesAllCodesAndTables) {
  std::vector<uint8_t> codes(256 * 64);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 7 + i / 256);
  for (int bits = kCodedSmallestTable; bits <= kCodedLargestTable; ++bits) {
    const CodedMatrix matrix(codes, 64, 256, {.table_bits = bits});
    EXPECT_EQ(matrix.table_bits(), bits);
    expect_codes(matrix, codes);
  }
}

TEST(CodedMatrix, AddsLittle) {
  const int64_t n = 1024;
  const int64_t k = 4096;
  for (const double sigma : {0.6, 1.0, 2.0, 2.8}) {
    const auto codes = normal_codes(n * k, sigma, 5);
    const double entropy = entropy_of(count_codes(codes, 256));
    const CodedMatrix matrix(codes, n, k, {.splits = 1});
    const double bits = 32.0 * static_cast<double>(matrix.words().size() + matrix.begins().size()) /
                        static_cast<double>(n * k);
    EXPECT_LT(matrix.table_loss(), 0.0085) << sigma;
    EXPECT_LT(bits - entropy, matrix.table_loss() + 0.0125) << sigma;
  }
}

TEST(CodedMatrix, DoesNotDependOnThreads) {
  const auto codes = normal_codes(100 * 300, 3, 8);
  const CodedMatrix one(codes, 100, 300, {.threads = 1});
  for (const int threads : {2, 4}) {
    const CodedMatrix other(codes, 100, 300, {.threads = threads});
    EXPECT_EQ(one.words(), other.words());
    EXPECT_EQ(one.begins(), other.begins());
  }
}

TEST(CodedMatrix, PicksSplits) {
  const auto codes = normal_codes(int64_t{256} * 4096, 2, 9);
  EXPECT_EQ(CodedMatrix(codes, 256, 4096, {.overhead = 0}).splits(), 1);
  EXPECT_EQ(CodedMatrix(codes, 256, 4096, {.overhead = 100}).splits(), 16);
  EXPECT_EQ(CodedMatrix(codes, 256, 4096, {.overhead = 100, .warps = 33}).splits(), 2);
  EXPECT_EQ(CodedMatrix(codes, 4096, 256, {.splits = 16}).splits(), 8);
}

TEST(CodedMatrix, RefusesOptions) {
  const std::vector<uint8_t> codes(12);
  EXPECT_THROW(CodedMatrix(codes, 3, 5), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, -3, -4), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.table_bits = 7}), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.table_bits = 15}), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.splits = 17}), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.splits = -1}), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.overhead = std::nan("")}), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4, {.warps = 0}), InvalidArgument);
  std::vector<uint8_t> out(12);
  EXPECT_THROW(CodedMatrix(codes, 3, 4).decode(2, 2, out), InvalidArgument);
  EXPECT_THROW(CodedMatrix(codes, 3, 4).decode(0, 2, out), InvalidArgument);
}

// Every change of a word ends in an error or in other codes, never outside of memory (the sanitizers' build
// runs this, too).
TEST(CodedMatrix, SurvivesHostileWords) {
  const int64_t n = 20;
  const int64_t k = 200;
  const CodedMatrix matrix(normal_codes(n * k, 9, 10), n, k, {.splits = 2});
  const CounterRandom random(11);
  int refused = 0;
  for (uint64_t i = 0; i < 400; ++i) {
    auto words = matrix.words();
    auto begins = matrix.begins();
    const auto at = static_cast<size_t>(random.bits(8 * i) % words.size());
    switch (i % 4) {
      case 0:
        words[at] ^= uint32_t{1} << random.bits(8 * i + 1) % 32;
        break;
      case 1:
        words[at] = static_cast<uint32_t>(random.bits(8 * i + 2));
        break;
      case 2:
        begins[1] = static_cast<uint32_t>(at);
        break;
      default:
        words[begins[at % (begins.size() - 1)]] = static_cast<uint32_t>(random.bits(8 * i + 3));
        break;
    }
    try {
      CodedMatrix::from_parts(n, k, 2, matrix.symbols(), begins, words);
    } catch (const FileFormatError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 200);
}

TEST(CodedMatrix, RefusesParts) {
  const CodedMatrix m(normal_codes(20 * 40, 3, 12), 20, 40);
  const auto with = [&](int splits, auto symbols, auto begins, auto words) {
    return CodedMatrix::from_parts(20, 40, splits, symbols, begins, words);
  };
  EXPECT_NO_THROW(with(1, m.symbols(), m.begins(), m.words()));
  EXPECT_THROW(with(0, m.symbols(), m.begins(), m.words()), FileFormatError);
  EXPECT_THROW(with(3, m.symbols(), m.begins(), m.words()), FileFormatError);
  auto symbols = m.symbols();
  symbols[3] = 1 << 17;
  EXPECT_THROW(with(1, symbols, m.begins(), m.words()), FileFormatError);
  symbols.resize(300);
  EXPECT_THROW(with(1, symbols, m.begins(), m.words()), FileFormatError);
  auto begins = m.begins();
  begins.back() += 1;
  EXPECT_THROW(with(1, m.symbols(), begins, m.words()), FileFormatError);
  begins.pop_back();
  EXPECT_THROW(with(1, m.symbols(), begins, m.words()), FileFormatError);
  auto words = m.words();
  words.push_back(0);
  begins = m.begins();
  begins.back() += 1;
  EXPECT_THROW(with(1, m.symbols(), begins, words), FileFormatError);
}

}  // namespace
}  // namespace quantloom
