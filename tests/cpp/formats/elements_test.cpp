#include "quantloom/formats/elements.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "quantloom/random.hpp"

namespace quantloom {
namespace {

std::vector<float> random_values(int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    const int exponent = static_cast<int>(random.below(2 * i, 40)) - 30;
    values[i] = static_cast<float>(std::ldexp(random.normal(2 * i + 1), exponent));
    if (i % 17 == 0) values[i] = static_cast<float>(random.below(2 * i, 65)) / 16 - 2;  // many ties
  }
  return values;
}

std::vector<float> random_table(size_t entries, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> table(entries);
  for (size_t i = 0; i < entries; ++i) table[i] = static_cast<float>(random.normal(i));
  std::sort(table.begin(), table.end());
  return table;
}

std::vector<Elements> some_elements() {
  std::vector<Elements> all = {TableElements({0.25F}),
                               TableElements({-1, 0, 0, 2}),
                               TableElements(random_table(16, 1)),
                               TableElements(random_table(300, 2)),
                               IntElements(1, false),
                               IntElements(9, false),
                               IntElements(16, true),
                               IntElements(int64_t{1} << 32, false),
                               PowerElements(2),
                               PowerElements(256)};
  for (const FloatRounding rounding :
       {FloatRounding::nearest, FloatRounding::to_zero, FloatRounding::to_inf}) {
    all.emplace_back(FloatElements(2, 1, rounding, true));
    all.emplace_back(FloatElements(4, 3, rounding, false));
    all.emplace_back(FloatElements(8, 23, rounding, true));
    all.emplace_back(FloatElements(3, 0, rounding, true));
  }
  return all;
}

float value_of(const Elements& elements, uint32_t code) {
  float value = 0;
  decode_elements(elements, std::span(&code, 1), {}, &value, DType::f32, 1, 1);
  return value;
}

// By comparison with the code's neighbours, exactly.
void expect_nearest(const Elements& elements, float x, uint32_t code, bool towards_zero) {
  const uint64_t count = code_count(elements);
  const double distance = std::fabs(static_cast<double>(value_of(elements, code)) - x);
  for (const int64_t other : {int64_t{code} - 1, int64_t{code} + 1}) {
    if (other < 0 || other >= static_cast<int64_t>(count)) continue;
    const float value = value_of(elements, static_cast<uint32_t>(other));
    const double away = std::fabs(static_cast<double>(value) - x);
    ASSERT_GE(away, distance) << x << " took code " << code;
    if (towards_zero && away == distance && std::fabs(x) < 1e6F) {
      ASSERT_GE(std::fabs(value), std::fabs(value_of(elements, code))) << x;
    }
  }
}

TEST(Elements, TakeTheNearestValue) {
  for (const Elements& elements : some_elements()) {
    const auto* floats = std::get_if<FloatElements>(&elements);
    if (std::holds_alternative<PowerElements>(elements)) continue;
    if (floats != nullptr && floats->rounding != FloatRounding::nearest) continue;
    if (std::holds_alternative<TableElements>(elements)) continue;  // midpoints are rounded to float32
    std::vector<float> x = random_values(2000, 5);
    x.insert(x.end(), {0.0F, -0.0F, 1e-45F, -1e-45F, 3.4e38F, -3.4e38F, INFINITY, -INFINITY});
    std::vector<uint32_t> codes(x.size());
    round_elements(elements, MatrixView<const float>(x.data(), 1, static_cast<int64_t>(x.size())), {},
                   {.codes = codes.data()});
    for (size_t i = 0; i < x.size(); ++i) expect_nearest(elements, x[i], codes[i], floats != nullptr);
  }
}

TEST(Elements, TablesCountTheMidpointsBelow) {
  for (const size_t entries : {1, 2, 3, 16, 65, 66, 300, 5000}) {
    const TableElements table(random_table(entries, entries));
    std::vector<float> x = random_values(1500, 9);
    x.insert(x.end(), table.boundaries.begin(), table.boundaries.end());  // ties take the lower
    std::vector<uint32_t> codes(x.size());
    round_elements(table, MatrixView<const float>(x.data(), 1, static_cast<int64_t>(x.size())), {},
                   {.codes = codes.data()});
    for (size_t i = 0; i < x.size(); ++i) {
      const auto below = std::count_if(table.boundaries.begin(), table.boundaries.end(),
                                       [&](float boundary) { return boundary < x[i]; });
      ASSERT_EQ(codes[i], static_cast<uint32_t>(below)) << x[i];
    }
  }
}

TEST(Elements, DirectedRoundingsStayOnTheirSide) {
  const std::vector<float> x = random_values(3000, 11);
  const MatrixView<const float> matrix(x.data(), 1, static_cast<int64_t>(x.size()));
  std::vector<float> down(x.size());
  std::vector<float> up(x.size());
  std::vector<float> power(x.size());
  round_elements(FloatElements(5, 2, FloatRounding::to_zero, true), matrix, {}, {.values = down.data()});
  round_elements(FloatElements(5, 2, FloatRounding::to_inf, true), matrix, {}, {.values = up.data()});
  round_elements(PowerElements(64), matrix, {}, {.values = power.data()});
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_LE(std::fabs(down[i]), std::fabs(x[i]));
    ASSERT_GE(std::fabs(up[i]), std::min(std::fabs(x[i]), 57344.0F));
    ASSERT_TRUE(power[i] == 0x1p-31F || (power[i] >= x[i] && power[i] < 2 * x[i])) << x[i];
  }
}

template <class T>
std::vector<T> converted(const std::vector<float>& values, T (*convert)(float)) {
  std::vector<T> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), convert);
  return result;
}

// One element at a time, by the formula in the header.
TEST(Elements, BlocksFollowTheFormulaForAnyNumberOfThreads) {
  const int64_t rows = 37;
  const int64_t cols = 1301;
  const std::vector<uint16_t> x = converted(random_values(rows * cols, 13), &bf16_from_float);
  const FloatMatrix matrix(x.data(), DType::bf16, rows, cols, cols);
  for (const Elements& elements : some_elements()) {
    for (const auto& [row_block, col_block] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 64}, {5, 7}, {37, 1301}, {1, 1301}, {40, 1}}) {
      const BlockGrid grid{row_block, col_block};
      std::vector<float> scales = random_values(grid.rows(matrix) * grid.cols(matrix), 17);
      scales[0] = 0;
      const BlockScales scaling{scales, grid, 0.75F};
      std::vector<uint16_t> values(x.size());
      std::vector<uint32_t> codes(x.size());
      round_elements(elements, matrix, scaling, {.values = values.data(), .codes = codes.data()}, 1);
      for (size_t i = 0; i < x.size(); i += 29) {
        const auto row = static_cast<int64_t>(i) / cols;
        const auto col = static_cast<int64_t>(i) % cols;
        const float scale =
            scales[static_cast<size_t>(row / row_block * grid.cols(matrix) + col / col_block)];
        const float scaled = float_from_bf16(x[i]);
        const float in = (scale != 0 ? scaled / scale : scaled) / 0.75F;
        uint32_t code = 0;
        float value = 0;
        round_elements(elements, MatrixView<const float>(&in, 1, 1), {}, {.values = &value, .codes = &code});
        ASSERT_EQ(codes[i], code);
        ASSERT_EQ(values[i], bf16_from_float(value * 0.75F * scale));
      }
      for (const int threads : {2, 4}) {
        std::vector<uint16_t> again(x.size());
        std::vector<uint16_t> decoded(x.size());
        round_elements(elements, matrix, scaling, {.values = again.data()}, threads);
        decode_elements(elements, codes, scaling, decoded.data(), DType::bf16, rows, cols, threads);
        ASSERT_EQ(values, again);
        ASSERT_EQ(values, decoded);
      }
    }
  }
}

TEST(Elements, RefuseWhatTheyCannotTake) {
  EXPECT_THROW(TableElements({}), InvalidArgument);
  EXPECT_THROW(TableElements({1, 0}), InvalidArgument);
  EXPECT_THROW(TableElements({NAN}), InvalidArgument);
  EXPECT_THROW(FloatElements(1, 2, FloatRounding::nearest, true), InvalidArgument);
  EXPECT_THROW(FloatElements(9, 2, FloatRounding::nearest, true), InvalidArgument);
  EXPECT_THROW(FloatElements(5, 24, FloatRounding::nearest, true), InvalidArgument);
  EXPECT_THROW(IntElements(0, false), InvalidArgument);
  EXPECT_THROW(PowerElements(257), InvalidArgument);
  for (const Elements& elements : some_elements()) {
    const float nan = NAN;
    float value = 0;
    uint32_t code = 7;
    round_elements(elements, MatrixView<const float>(&nan, 1, 1), {}, {.values = &value, .codes = &code});
    EXPECT_TRUE(std::isnan(value));
    EXPECT_EQ(code, 0U);
  }
  const TableElements table({0, 1});
  float x[4] = {};
  const MatrixView<const float> matrix(x, 2, 2);
  const float scales[3] = {1, 1, 1};
  EXPECT_THROW(round_elements(table, matrix, {scales, {1, 1}}, {}), InvalidArgument);
  EXPECT_THROW(round_elements(table, matrix, {{}, {0, 1}}, {}), InvalidArgument);
  EXPECT_THROW(round_elements(table, matrix, {{}, {1, 1}, 0.0F}, {}), InvalidArgument);
  const uint32_t codes[4] = {0, 1, 2, 0};
  EXPECT_THROW(decode_elements(table, codes, {}, x, DType::f32, 2, 2), InvalidArgument);
  EXPECT_THROW(decode_elements(table, codes, {}, x, DType::f32, 1, 2), InvalidArgument);
}

TEST(BlockStatistics, EqualSlowOnesForAnyNumberOfThreads) {
  const int64_t rows = 23;
  for (const int64_t cols : {1, 64, 1000, 150001}) {
    std::vector<float> x = random_values(rows * cols, 19);
    if (cols == 1000) x[5 * 1000 + 77] = NAN;
    const MatrixView<const float> matrix(x.data(), rows, cols);
    for (const BlockGrid grid : {BlockGrid{1, 64}, {23, cols}, {1, cols}, {4, 7}}) {
      const int64_t block_cols = grid.cols(matrix);
      const auto absmax = block_statistics(matrix, grid, BlockStatistic::absmax, 1);
      const auto extreme = block_statistics(matrix, grid, BlockStatistic::signed_extreme, 1);
      const auto square = block_statistics(matrix, grid, BlockStatistic::mean_square, 1);
      for (size_t b = 0; b < absmax.size(); ++b) {
        const int64_t first_row = static_cast<int64_t>(b) / block_cols * grid.row_block;
        const int64_t first_col = static_cast<int64_t>(b) % block_cols * grid.col_block;
        double largest = 0;
        double sum = 0;
        int64_t count = 0;
        for (int64_t r = first_row; r < std::min(rows, first_row + grid.row_block); ++r) {
          for (int64_t c = first_col; c < std::min(cols, first_col + grid.col_block); ++c, ++count) {
            const double value = matrix(r, c);
            sum += value * value;
            if (std::fabs(value) > std::fabs(largest) || (value == -largest && value > 0)) largest = value;
          }
        }
        if (std::isnan(sum)) {
          ASSERT_TRUE(std::isnan(absmax[b]) && std::isnan(extreme[b]) && std::isnan(square[b]));
          continue;
        }
        ASSERT_EQ(absmax[b], std::fabs(static_cast<float>(largest)));
        ASSERT_EQ(extreme[b], static_cast<float>(largest));
        ASSERT_NEAR(square[b], sum / static_cast<double>(count), 1e-6 * sum / static_cast<double>(count));
      }
      for (const int threads : {2, 4}) {
        for (const auto& [statistic, expected] :
             {std::pair{BlockStatistic::absmax, absmax}, {BlockStatistic::mean_square, square}}) {
          const auto again = block_statistics(matrix, grid, statistic, threads);
          ASSERT_EQ(std::memcmp(again.data(), expected.data(), again.size() * sizeof(float)), 0);
        }
      }
    }
  }
}

TEST(PackedCodes, ComeBackInNoMoreBitsThanNeeded) {
  const uint64_t largest = uint64_t{1} << 32;
  for (const uint64_t count : {uint64_t{1}, uint64_t{2}, uint64_t{3}, uint64_t{5}, uint64_t{7}, uint64_t{8},
                               uint64_t{9}, uint64_t{43}, uint64_t{255}, uint64_t{256}, uint64_t{257},
                               uint64_t{65535}, (uint64_t{1} << 31) - 1, largest - 1, largest}) {
    for (const int64_t codes : {0, 1, 20, 21, 63, 64, 65, 1000, 300007}) {
      if (codes > 100000 && count > 300) continue;
      const CounterRandom random(count);
      std::vector<uint32_t> in(static_cast<size_t>(codes));
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(random.below(i, count));
      if (codes > 3) in[3] = static_cast<uint32_t>(count - 1);
      const int64_t bytes = packed_code_bytes(codes, count);
      const auto width = std::max(1.0, std::ceil(std::log2(static_cast<double>(count))));
      ASSERT_LE(static_cast<double>(bytes), std::ceil(width * static_cast<double>(codes) / 64) * 8);
      std::vector<uint8_t> packed(static_cast<size_t>(bytes));
      pack_codes(in, count, packed, 1);
      for (const int threads : {1, 2, 4}) {
        std::vector<uint8_t> again(packed.size());
        std::vector<uint32_t> out(in.size());
        pack_codes(in, count, again, threads);
        unpack_codes(packed, count, out, threads);
        ASSERT_EQ(packed, again);
        ASSERT_EQ(in, out) << count;
      }
    }
  }
  EXPECT_EQ(packed_code_bytes(1000, 9), 50 * 8);  // 20 codes in base 9 fit 64 bits
  EXPECT_EQ(packed_code_bytes(1024, 8), 384);
}

TEST(PackedCodes, RefuseBadBytesAndCodes) {
  std::vector<uint8_t> bytes(8, 0xff);
  std::vector<uint32_t> codes(20);
  EXPECT_THROW(unpack_codes(bytes, 9, codes), InvalidArgument);
  EXPECT_THROW(unpack_codes(std::span(bytes).first(7), 9, codes), InvalidArgument);
  EXPECT_THROW(unpack_codes(bytes, 0, codes), InvalidArgument);
  codes.assign(3, 2);
  EXPECT_THROW(pack_codes(codes, 2, bytes), InvalidArgument);
  codes.assign(20, 9);
  EXPECT_THROW(pack_codes(codes, 9, bytes), InvalidArgument);
  codes.assign(16, 0);
  EXPECT_THROW(unpack_codes(bytes, 11, codes), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
