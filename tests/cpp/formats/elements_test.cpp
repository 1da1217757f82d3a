#include "quantloom/formats/elements.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "formats/element_rounding.hpp"
#include "formats/element_runs.hpp"
#include "quantloom/random.hpp"
#include "simd_targets.hpp"

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

// Values around every boundary of the sets below, and all kinds of extremes.
std::vector<float> hard_values(const std::vector<float>& boundaries) {
  std::vector<float> x = random_values(4000, 23);
  for (const float boundary : boundaries) {
    for (const float value :
         {std::nextafter(boundary, -INFINITY), boundary, std::nextafter(boundary, INFINITY)}) {
      x.push_back(value);
    }
  }
  x.insert(x.end(), {0.0F, -0.0F, 1e-45F, -1e-45F, 0x1p-126F, -0x1p-127F, 3.4e38F, -3.4e38F, INFINITY,
                     -INFINITY, NAN});
  x.resize((x.size() + element_runs::kRunVector - 1) / element_runs::kRunVector * element_runs::kRunVector);
  return x;
}

template <class Runs, class Rounder>
void expect_runs(const Runs& runs, const Rounder& rounder, const std::vector<float>& x) {
  const auto count = static_cast<int>(x.size());
  const element_rounding::OneByOne<Rounder> reference{rounder};
  std::vector<uint32_t> expected(x.size());
  std::vector<float> expected_values(x.size());
  reference.codes(x.data(), count, expected.data());
  reference.values(expected.data(), count, expected_values.data());
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    std::vector<uint32_t> codes(x.size());
    std::vector<float> values(x.size());
    runs.codes(x.data(), count, codes.data());
    runs.values(codes.data(), count, values.data());
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(codes[i], expected[i]) << x[i] << " target " << target;
      ASSERT_EQ(values[i], expected_values[i]) << x[i] << " target " << target;
    }
  }
}

TEST(Elements, RunsEqualRoundingOneByOneOnEveryInstructionSet) {
  for (const size_t entries : {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 256, 5000}) {
    const TableElements table(random_table(entries, entries));
    SCOPED_TRACE(entries);
    expect_runs(element_runs::BoundaryTable(table), element_rounding::TableRounder(table),
                hard_values(table.boundaries));
  }
  for (int exponent_bits = 2; exponent_bits <= 7; ++exponent_bits) {
    for (const int mantissa_bits : {0, 1, 3, 10, 22, 23}) {
      for (const FloatRounding rounding :
           {FloatRounding::nearest, FloatRounding::to_zero, FloatRounding::to_inf}) {
        for (const bool has_sign : {false, true}) {
          SCOPED_TRACE(text_of("E", exponent_bits, "M", mantissa_bits, " ", static_cast<int>(rounding)));
          const element_rounding::FloatRounder rounder(
              FloatElements(exponent_bits, mantissa_bits, rounding, has_sign));
          std::vector<float> boundaries;
          const uint32_t last = rounder.zero_code + rounder.largest_code;
          for (uint32_t i = 0; i <= 200; ++i) {
            const auto code = static_cast<uint32_t>(uint64_t{last} * i / 200);
            boundaries.push_back(rounder.value(code));
            boundaries.push_back((rounder.value(code) + rounder.value(std::min(code + 1, last))) / 2);
          }
          const element_runs::FloatRuns runs{rounder.mantissa_bits,
                                             rounder.bias,
                                             rounding,
                                             has_sign,
                                             rounder.largest_code,
                                             rounder.zero_code,
                                             static_cast<float>(rounder.largest)};
          expect_runs(runs, rounder, hard_values(boundaries));
        }
      }
    }
  }
  for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{9}, int64_t{16}, int64_t{1} << 31}) {
    for (const bool symmetric : {false, true}) {
      SCOPED_TRACE(count);
      const element_rounding::IntRounder rounder(IntElements(count, symmetric));
      expect_runs(element_runs::IntRuns{rounder.offset, rounder.lowest, rounder.top}, rounder,
                  hard_values({-7.5F, -0.5F, 0.5F, 1.5F, 7.5F, 1e9F, -1e9F, 0x1p30F, 0x1p31F}));
    }
  }
}

TEST(Elements, EncodeToTheBytesOfTheirCodes) {
  for (const Elements& elements : some_elements()) {
    const uint64_t count = code_count(elements);
    for (const auto& [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {37, 130}, {1, 9001}, {4099, 1}, {3, 4096}, {0, 5}, {5, 0}}) {
      const std::vector<float> x = random_values(rows * cols, 29);
      const FloatMatrix matrix(x.data(), DType::f32, rows, cols, cols);
      const BlockGrid grid{1, 32};
      std::vector<float> scales = random_values(grid.rows(matrix) * grid.cols(matrix), 31);
      const BlockScales scaling{scales, grid, 1.5F};
      std::vector<uint32_t> codes(x.size());
      std::vector<float> values(x.size());
      round_elements(elements, matrix, scaling, {.values = values.data(), .codes = codes.data()}, 1);
      std::vector<uint8_t> expected(static_cast<size_t>(packed_code_bytes(rows * cols, count)));
      pack_codes(codes, count, expected, 1);
      for (const int threads : {1, 3}) {
        std::vector<uint8_t> bytes(expected.size());
        encode_elements(elements, matrix, scaling, bytes, threads);
        ASSERT_EQ(bytes, expected);
        std::vector<float> decoded(x.size());
        decode_packed_elements(elements, bytes, scaling, decoded.data(), DType::f32, rows, cols, threads);
        ASSERT_EQ(std::memcmp(decoded.data(), values.data(), 4 * values.size()), 0);
      }
      if (expected.empty()) continue;
      std::vector<uint8_t> bytes(expected.size() + 8);
      EXPECT_THROW(encode_elements(elements, matrix, scaling, bytes), InvalidArgument);
      EXPECT_THROW(decode_packed_elements(elements, bytes, scaling, values.data(), DType::f32, rows, cols),
                   InvalidArgument);
      bytes.assign(expected.size(), 0xff);
      const bool full = std::has_single_bit(count) && count > 1;
      if (!full) {
        EXPECT_THROW(decode_packed_elements(elements, bytes, scaling, values.data(), DType::f32, rows, cols),
                     InvalidArgument);
      }
    }
  }
}

// One code at a time, by the description in the header.
TEST(Elements, CodesLieInWordsAsDescribed) {
  const CounterRandom random(37);
  for (const uint64_t count : {2,   3,   4,   5,   6,   7,   8,   9,   11,   16,    17,    31,     64,
                               100, 127, 128, 129, 255, 256, 257, 641, 4095, 65535, 65537, 1 << 24}) {
    for (const int64_t codes : {1, 63, 64, 65, 4095, 4096, 4097, 20000}) {
      std::vector<uint32_t> values(static_cast<size_t>(codes));
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<uint32_t>(i % 5 == 0 ? count - 1 : random.below(i, count));
      }
      std::vector<uint8_t> bytes(static_cast<size_t>(packed_code_bytes(codes, count)));
      pack_codes(values, count, bytes, 2);
      int per_word = 0;
      for (unsigned __int128 power = count; power <= UINT64_MAX; power *= count) per_word += 1;
      const int width = static_cast<int>(std::bit_width(count - 1));
      const bool dense = std::has_single_bit(count) || per_word * width <= 64;
      for (int64_t i = 0; i < codes; ++i) {
        uint64_t code = 0;
        if (dense) {
          for (int bit = 0; bit < width; ++bit) {
            const int64_t at = i * width + bit;
            code |= static_cast<uint64_t>(bytes[static_cast<size_t>(at / 8)] >> (at % 8) & 1) << bit;
          }
        } else {
          uint64_t word = 0;
          for (int b = 0; b < 8; ++b) {
            word |= static_cast<uint64_t>(bytes[static_cast<size_t>(i / per_word * 8 + b)]) << (8 * b);
          }
          for (int64_t skip = i % per_word; skip > 0; --skip) word /= count;
          code = word % count;
        }
        ASSERT_EQ(code, values[static_cast<size_t>(i)])
            << "count " << count << " code " << i << " of " << codes;
      }
      std::vector<uint32_t> back(values.size());
      unpack_codes(bytes, count, back, 2);
      ASSERT_EQ(back, values) << count;
    }
  }
}

}  // namespace
}  // namespace quantloom
