#include "quantloom/transforms/hadamard.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "quantloom/random.hpp"
#include "simd_targets.hpp"
// After simd_targets.hpp.
#include <hwy/highway.h>

#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;

// M M^T = m I in integers: rows of bits agree in exactly half of the places.
bool is_hadamard(const std::vector<int8_t>& matrix, int64_t m) {
  const int64_t words = (m + 63) / 64;
  std::vector<uint64_t> rows(static_cast<size_t>(m * words), 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const int8_t entry = matrix[static_cast<size_t>(i * m + j)];
      if (entry != 1 && entry != -1) return false;
      if (entry == -1) rows[static_cast<size_t>(i * words + j / 64)] |= uint64_t{1} << (j % 64);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      int64_t differ = 0;
      for (int64_t w = 0; w < words; ++w) {
        differ += std::popcount(rows[static_cast<size_t>(i * words + w)] ^
                                rows[static_cast<size_t>(j * words + w)]);
      }
      if (2 * differ != m) return false;
    }
  }
  return true;
}

TEST(HadamardMatrix, EveryDenseOrderIsOrthogonalInIntegers) {
  int known = 0;
  for (int64_t m = 4; m <= kMaxHadamardOrder; m += 4) {
    const std::optional<HadamardSize> size = hadamard_size(m);
    if (!size || size->order != m) continue;
    known += 1;
    EXPECT_TRUE(is_hadamard(hadamard_base(m), m)) << "order " << m;
  }
  EXPECT_GT(known, 90);
}

TEST(HadamardMatrix, KnowsTheOrdersOfPaleyAndWilliamson) {
  for (const int64_t m :
       {12, 20, 24, 28, 44, 60, 68, 72, 80, 84, 104, 108, 36, 52, 76, 100, 92, 148, 172, 924}) {
    EXPECT_TRUE(hadamard_size(m)) << m;
  }
  const auto expect_size = [](int64_t n, int64_t order, int power) {
    const std::optional<HadamardSize> size = hadamard_size(n);
    ASSERT_TRUE(size) << n;
    EXPECT_EQ(size->order, order) << n;
    EXPECT_EQ(size->power, power) << n;
  };
  expect_size(1, 1, 0);
  expect_size(2, 1, 1);
  expect_size(32768, 1, 15);
  expect_size(5120, 20, 8);
  expect_size(13824, 108, 7);
  expect_size(14336, 28, 9);
  expect_size(18944, 148, 7);
  expect_size(27648, 108, 8);
  expect_size(28672, 28, 10);
  expect_size(29568, 924, 5);
  expect_size(11008, 172, 6);
  for (const int64_t n : {0, 3, 6, 10, 14, 116, 188, 268, -4}) EXPECT_FALSE(hadamard_size(n)) << n;
}

TEST(HadamardMatrix, WholeMatricesAreOrthogonal) {
  for (const int64_t n : {1, 2, 4, 8, 64, 12, 24, 48, 40, 56, 240, 344, 576}) {
    EXPECT_TRUE(n == 1 || is_hadamard(hadamard_matrix(n), n)) << n;
  }
}

TEST(HadamardMatrix, ASizeWithoutAMatrixIsRefusedByName) {
  const auto message = [](int64_t cols, int64_t block) {
    try {
      require_hadamard_block(cols, block);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message(116, 0).find("whole rows of 116"), std::string::npos);
  EXPECT_NE(message(116, 0).find("the largest that works is 4"), std::string::npos);
  EXPECT_NE(message(232, 0).find("the largest that works is 8"), std::string::npos);
  EXPECT_NE(message(128, 48).find("block: got 48, expected a divisor of the 128 columns"), std::string::npos);
  EXPECT_NE(message(7, 0).find("the largest that works is 1"), std::string::npos);
  EXPECT_EQ(message(11008, 0), "");
  EXPECT_THROW(hadamard_base(8), InvalidArgument);
  EXPECT_THROW(hadamard_matrix(1 << 15), InvalidArgument);
}

struct Case {
  int64_t rows = 1;
  int64_t cols = 1;
  int64_t block = 0;
  DType dtype = DType::f32;
  bool inverse = false;
  bool with_signs = false;
  bool with_channels = false;
  float scale = 1;
  int64_t padding = 0;
};

// Rows of `stride` elements of `dtype`.
struct Elements {
  DType dtype = DType::f32;
  std::vector<std::byte> bytes;

  Elements(DType type, int64_t count) : dtype(type), bytes(static_cast<size_t>(count * size_of(type))) {}
  void set(int64_t i, float value) {
    if (dtype == DType::f32) {
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    } else {
      const uint16_t half = dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }
  float get(int64_t i) const {
    float value = 0;
    if (dtype == DType::f32) {
      std::memcpy(&value, bytes.data() + 4 * i, 4);
      return value;
    }
    uint16_t half = 0;
    std::memcpy(&half, bytes.data() + 2 * i, 2);
    return dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
  }
};

// Entry [i][j] of the matrix of a block.
double entry(const std::vector<int8_t>& base, HadamardSize size, int64_t i, int64_t j) {
  const int64_t mask = (int64_t{1} << size.power) - 1;
  const int sign = base[static_cast<size_t>((i >> size.power) * size.order + (j >> size.power))];
  return std::popcount(static_cast<uint64_t>(i & j & mask)) % 2 == 0 ? sign : -sign;
}

double negative(const std::vector<uint8_t>& signs, int64_t c) {
  return !signs.empty() && (signs[static_cast<size_t>(c / 8)] >> (c % 8) & 1) != 0 ? -1 : 1;
}

void expect_dense_product(const Case& c, uint64_t seed,
                          int64_t checked = std::numeric_limits<int64_t>::max()) {
  SCOPED_TRACE(text_of("[", c.rows, ", ", c.cols, "] block ", c.block, " ", name_of(c.dtype), " inverse ",
                       c.inverse, " signs ", c.with_signs));
  const int64_t stride = c.cols + c.padding;
  const std::vector<float> values = normal_values(c.rows * stride, seed);
  Elements x(c.dtype, c.rows * stride);
  for (size_t i = 0; i < values.size(); ++i) x.set(static_cast<int64_t>(i), values[i]);
  const std::vector<float> channels =
      c.with_channels ? normal_values(c.cols, seed + 1) : std::vector<float>();
  const std::vector<uint8_t> signs = c.with_signs ? random_signs(c.cols, seed) : std::vector<uint8_t>();
  HadamardOptions options;
  options.block = c.block;
  options.inverse = c.inverse;
  options.signs = signs;
  options.scale = c.scale;
  options.channel_scale = channels;
  options.threads = 2;
  const int64_t out_stride = stride + c.padding;
  Elements out(c.dtype, c.rows * out_stride);
  const FloatMatrix view(x.bytes.data(), c.dtype, c.rows, c.cols, stride);
  hadamard(view, out.bytes.data(), out_stride, options);

  const HadamardSize size = require_hadamard_block(c.cols, c.block);
  const int64_t n = size.order << size.power;
  const std::vector<int8_t> base = hadamard_base(size.order);
  const CounterRandom random(seed);
  const int64_t total = c.rows * c.cols;
  const double unit = c.dtype == DType::f32 ? 1e-6 : c.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  for (int64_t check = 0; check < std::min(checked, total); ++check) {
    const auto at =
        checked < total ? static_cast<int64_t>(random.below(check, static_cast<uint64_t>(total))) : check;
    const int64_t row = at / c.cols;
    const int64_t col = at % c.cols;
    const int64_t begin = col / n * n;
    double sum = 0;
    double size_of_sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double h = c.inverse ? entry(base, size, j, col - begin) : entry(base, size, col - begin, j);
      const double before = c.inverse ? 1 : negative(signs, begin + j);
      const double value = x.get(row * stride + begin + j);
      sum += h * before * value;
      size_of_sum += value * value;
    }
    const double factor = (c.inverse ? negative(signs, col) : 1) * c.scale /
                          std::sqrt(static_cast<double>(n)) *
                          (c.with_channels ? channels[static_cast<size_t>(col)] : 1.0);
    const double expected = sum * factor;
    const double tolerance =
        unit * std::abs(expected) + 1e-6 * std::abs(factor) * std::sqrt(size_of_sum) + 1e-7;
    ASSERT_NEAR(out.get(row * out_stride + col), expected, tolerance) << "row " << row << ", column " << col;
  }
}

constexpr DType kFloats[] = {DType::f32, DType::f16, DType::bf16};

TEST(Hadamard, EqualsADenseProductInFloat64) {
  uint64_t seed = 1;
  for (const int64_t n :
       {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 12, 20, 24, 28, 40, 48, 56, 72, 172, 208, 240, 560}) {
    for (const DType dtype : kFloats) {
      for (const bool inverse : {false, true}) {
        ++seed;
        expect_dense_product({3, n, 0, dtype, inverse, seed % 2 == 0, seed % 3 == 0, 1.0F, 0}, seed);
        expect_dense_product({2, 3 * n, n, dtype, inverse, seed % 2 == 1, seed % 3 == 1, 0.75F, 5}, seed);
      }
    }
  }
}

TEST(Hadamard, LongBlocksEqualTheDenseProduct) {
  uint64_t seed = 100;
  for (const int64_t n :
       {2048, 4096, 8192, 16384, 32768, 5120, 11008, 13824, 14336, 18944, 27648, 28672, 29568}) {
    ++seed;
    expect_dense_product({2, n, 0, kFloats[seed % 3], seed % 2 == 0, true, false, 1.0F, 0}, seed, 40);
  }
}

TEST(Hadamard, TheInverseUndoesTheTransform) {
  for (const int64_t n : {64, 12, 172, 5120, 8192}) {
    const std::vector<float> x = normal_values(2 * n, 7);
    std::vector<float> y(x.size());
    const std::vector<uint8_t> signs = random_signs(n, 3);
    HadamardOptions options;
    options.signs = signs;
    hadamard(MatrixView<const float>(x.data(), 2, n), y.data(), n, options);
    options.inverse = true;
    hadamard(MatrixView<const float>(y.data(), 2, n), y.data(), n, options);  // in place
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(y[i], x[i], 1e-5) << n;
  }
}

TEST(Hadamard, InstructionSetsThreadsAndPlacesGiveTheSameBits) {
  for (const DType dtype : kFloats) {
    for (const int64_t n : {2, 4, 8, 16, 12, 24, 56, 1024, 8192, 5120}) {
      const int64_t rows = 5;
      const int64_t cols = 2 * n;
      const std::vector<float> values = normal_values(rows * cols, static_cast<uint64_t>(n));
      Elements x(dtype, rows * cols);
      for (size_t i = 0; i < values.size(); ++i) x.set(static_cast<int64_t>(i), values[i]);
      const FloatMatrix view(x.bytes.data(), dtype, rows, cols, cols);
      const std::vector<uint8_t> signs = random_signs(cols, 1);
      HadamardOptions options;
      options.block = n;
      options.signs = signs;
      options.threads = 1;
      Elements expected(dtype, rows * cols);
      hadamard(view, expected.bytes.data(), cols, options);
      for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
        hwy::SetSupportedTargetsForTest(target);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        Elements out(dtype, rows * cols);
        hadamard(view, out.bytes.data(), cols, options);
        hwy::SetSupportedTargetsForTest(0);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        EXPECT_EQ(out.bytes, expected.bytes) << name_of(dtype) << " " << n << " target " << target;
      }
      for (const int threads : {2, 4}) {
        options.threads = threads;
        Elements out = x;
        hadamard(FloatMatrix(out.bytes.data(), dtype, rows, cols, cols), out.bytes.data(), cols, options);
        EXPECT_EQ(out.bytes, expected.bytes) << name_of(dtype) << " " << n << " threads " << threads;
      }
    }
  }
}

TEST(Hadamard, SignsAreEvenAndPure) {
  const std::vector<uint8_t> signs = random_signs(100'003, 11);
  EXPECT_EQ(static_cast<int64_t>(signs.size()), sign_bytes(100'003));
  EXPECT_EQ(signs.back() >> 3, 0);
  int64_t set = 0;
  for (const uint8_t byte : signs) set += std::popcount(byte);
  EXPECT_NEAR(static_cast<double>(set), 50'001, 800);
  const std::vector<uint8_t> fewer = random_signs(1000, 11);
  EXPECT_TRUE(std::equal(fewer.begin(), fewer.end(), signs.begin()));
  EXPECT_NE(random_signs(1000, 12), fewer);
  EXPECT_TRUE(random_signs(0, 1).empty());
}

TEST(Hadamard, TakesExtremesAndEmptyMatrices) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x = {inf, 1, 2, 3, 1e38F, 1e38F, 1e38F, 1e38F};
  std::vector<float> y(8);
  hadamard(MatrixView<const float>(x.data(), 2, 4), y.data(), 4);
  EXPECT_EQ(y[0], inf);
  EXPECT_EQ(y[4], inf);  // the sum leaves float32
  std::vector<uint16_t> halves = {f16_from_float(60000), f16_from_float(60000)};
  hadamard(FloatMatrix(halves.data(), DType::f16, 1, 2, 2), halves.data(), 2);
  EXPECT_EQ(float_from_f16(halves[0]), inf);
  EXPECT_EQ(halves[1], 0);
  EXPECT_NO_THROW(hadamard(MatrixView<const float>(nullptr, 0, 4), nullptr, 4));
  EXPECT_NO_THROW(hadamard(MatrixView<const float>(nullptr, 3, 0), nullptr, 0));
  EXPECT_THROW(hadamard(MatrixView<const float>(nullptr, 0, 7), nullptr, 7), InvalidArgument);
}

TEST(Hadamard, RefusesBadArgumentsBeforeWork) {
  std::vector<float> x(64, 1.0F);
  const std::vector<float> before = x;
  const MatrixView<const float> view(x.data(), 4, 8, 16);
  const std::vector<uint8_t> signs(2);
  const std::vector<float> channels(7);
  const auto options = [](auto change) {
    HadamardOptions result;
    change(result);
    return result;
  };
  std::vector<float> out(64);
  EXPECT_THROW(hadamard(view, out.data(), 7), InvalidArgument);
  EXPECT_THROW(hadamard(view, nullptr, 8), InvalidArgument);
  EXPECT_THROW(hadamard(view, x.data() + 4, 16), InvalidArgument);
  EXPECT_THROW(hadamard(view, x.data(), 8), InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([](auto& o) { o.block = 3; })), InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([](auto& o) { o.block = -1; })), InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([](auto& o) { o.scale = NAN; })), InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([&](auto& o) { o.signs = signs; })), InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([&](auto& o) { o.channel_scale = channels; })),
               InvalidArgument);
  EXPECT_THROW(hadamard(view, out.data(), 8, options([](auto& o) { o.threads = -1; })), InvalidArgument);
  EXPECT_EQ(x, before);
  EXPECT_EQ(out, std::vector<float>(64));
}

}  // namespace
}  // namespace quantloom
