// Integer order against its definition in integer_cuda.hpp, integer by integer.
#include "kernels/integer_layout.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <set>

#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

struct Case {
  std::string format = "uniform:8:channel";
  int64_t n = 1;
  int64_t k = 1;
  int64_t outliers = 0;       // columns
  bool own_outliers = false;  // of W
  uint64_t seed = 0;
};

struct Matrix {
  PackedTensor packed;
  std::vector<int32_t> columns;
};

// As keep_columns() of Python makes outliers of W.
Matrix random_matrix(const Case& c) {
  const CounterRandom random(c.seed);
  std::vector<float> w(static_cast<size_t>(c.n * c.k));
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(random.normal(i));
  Matrix result{round_nearest(MatrixView<const float>(w.data(), c.n, c.k), format_from_spec(c.format)).tensor,
                {}};
  std::set<int32_t> drawn;
  for (uint64_t i = 0; std::ssize(drawn) < std::min(c.outliers, c.k); ++i) {
    drawn.insert(static_cast<int32_t>(random.below(w.size() + i, static_cast<uint64_t>(c.k))));
  }
  result.columns.assign(drawn.begin(), drawn.end());
  if (!c.own_outliers || w.empty() || drawn.empty()) return result;
  std::vector<float> decoded(w.size());
  dequantize(result.packed, {decoded.data(), c.n, c.k});
  std::vector<int64_t> positions;
  std::vector<uint16_t> values;
  for (int64_t r = 0; r < c.n; ++r) {
    for (const int32_t column : result.columns) {
      const int64_t at = r * c.k + column;
      positions.push_back(at);
      values.push_back(f16_from_float(w[static_cast<size_t>(at)] - decoded[static_cast<size_t>(at)]));
    }
  }
  result.packed = with_outliers(std::move(result.packed), positions, values);
  return result;
}

// W as the planes define it, and the rest of what they hold.
void check_planes(const Matrix& matrix, const IntegerPlanes& prepared) {
  const int64_t n = prepared.n;
  const int64_t k = prepared.k;
  const auto integers = prepared.plane("integers").values<int8_t>();
  const auto rows = prepared.plane("rows").values<int32_t>();
  const int64_t blocks = ceil_div(k, int64_t{128});
  ASSERT_EQ(std::ssize(integers), ceil_div(n, int64_t{128}) * 128 * blocks * 128);
  std::vector<float> w(static_cast<size_t>(n * k));
  dequantize(matrix.packed, {w.data(), n, k});
  const bool outliers = !matrix.columns.empty();
  const auto weights =
      outliers ? prepared.plane("outlier_weights").values<uint16_t>() : std::span<const uint16_t>();
  const auto own = matrix.packed.planes.contains("outlier_values")
                       ? matrix.packed.plane("outlier_values").values<uint16_t>()
                       : std::span<const uint16_t>();
  int64_t padding = 0;
  for (int64_t r = 0; r < ceil_div(n, int64_t{128}) * 128; ++r) {
    int32_t sum = 0;
    size_t next = 0;
    for (int64_t c = 0; c < blocks * 128; ++c) {
      // Slabs of 64 rows, blocks of 128 columns, pieces of 16 bytes at place p ^ (r % 8).
      const int64_t place =
          (r / 64 * blocks + c / 128) * 64 * 128 + r % 64 * 128 + ((c % 128 / 16) ^ (r % 8)) * 16 + c % 16;
      const int integer = integers[static_cast<size_t>(place)];
      sum += integer;
      if (r >= n || c >= k) {
        padding += integer != 0;
        continue;
      }
      const float scale = std::bit_cast<float>(rows[static_cast<size_t>(4 * r)]);
      const int zero = rows[static_cast<size_t>(4 * r + 2)];
      float value = scale * static_cast<float>(integer - zero);
      if (next < matrix.columns.size() && matrix.columns[next] == c) {
        const auto i = static_cast<int64_t>(next++);
        const int64_t outlier_blocks = ceil_div(std::ssize(matrix.columns), int64_t{64});
        const int64_t at =
            (r / 64 * outlier_blocks + i / 64) * 64 * 64 + r % 64 * 64 + ((i % 64 / 8) ^ (r % 8)) * 8 + i % 8;
        if (!own.empty()) {
          value += float_from_f16(own[static_cast<size_t>(r * std::ssize(matrix.columns) + i)]);
        }
        EXPECT_EQ(weights[static_cast<size_t>(at)], f16_from_float(value)) << r << " " << c;
      }
      ASSERT_EQ(value, w[static_cast<size_t>(r * k + c)]) << r << " " << c;
    }
    EXPECT_EQ(rows[static_cast<size_t>(4 * r + 1)], sum);
    EXPECT_EQ(rows[static_cast<size_t>(4 * r + 3)], 0);
  }
  EXPECT_EQ(padding, 0);
  if (outliers) {
    const auto index = prepared.plane("outlier_index").values<int32_t>();
    const auto words = static_cast<size_t>(ceil_div(k, int64_t{32}));
    ASSERT_EQ(index.size(), words + matrix.columns.size());
    EXPECT_TRUE(std::equal(matrix.columns.begin(), matrix.columns.end(), index.begin() + words));
    for (int64_t c = 0; c < k; ++c) {
      const bool bit = (static_cast<uint32_t>(index[static_cast<size_t>(c / 32)]) >> (c % 32) & 1U) != 0;
      EXPECT_EQ(bit, std::ranges::binary_search(matrix.columns, static_cast<int32_t>(c)));
    }
  } else {
    EXPECT_FALSE(prepared.has("outlier_index"));
    EXPECT_FALSE(prepared.has("outlier_weights"));
  }
}

// The same in register order, from what register_order.hpp says in words.
void check_records(const Matrix& matrix, const IntegerPlanes& prepared) {
  const auto& format = dynamic_cast<const Uniform&>(*matrix.packed.format);
  const int64_t n = prepared.n;
  const int64_t k = prepared.k;
  const bool grouped = format.group_size > 0;
  const bool nibbles = format.bits <= 4;
  const bool pairs = grouped && !format.symmetric && (nibbles || format.bits == 8);
  const int64_t run = !grouped                       ? 128
                      : format.group_size % 128 == 0 ? 128
                      : format.group_size % 64 == 0  ? 64
                                                     : 32;
  const int64_t term_bytes = !grouped ? 0 : pairs ? 8 : 4;
  const int64_t code_bytes = nibbles ? 4096 : 8192;
  const int64_t record_bytes = code_bytes + 128 / run * 64 * term_bytes;
  const int64_t blocks = ceil_div(k, int64_t{128});
  const auto records = prepared.plane("integers").values<int8_t>();
  const auto rows = prepared.plane("rows").values<int32_t>();
  ASSERT_EQ(std::ssize(records), ceil_div(n, int64_t{128}) * 2 * blocks * record_bytes);
  std::vector<float> w(static_cast<size_t>(n * k));
  dequantize(matrix.packed, {w.data(), n, k});
  for (int64_t r = 0; r < ceil_div(n, int64_t{128}) * 128; ++r) {
    double sum = 0;
    int32_t codes = 0;
    for (int64_t c = 0; c < blocks * 128; ++c) {
      const int64_t at = (r / 64 * blocks + c / 128) * record_bytes;
      const int64_t thread = r % 64 / 16 * 32 + r % 8 * 4 + c % 16 / 4;
      const int64_t step = c % 128 / 32;
      const int64_t half = c % 32 / 16;
      const bool lower = r % 16 >= 8;
      const int64_t place = nibbles ? (step / 2 * 128 + thread) * 16 + (step % 2 * 2 + half) * 4 + c % 4
                                    : (step * 128 + thread) * 16 + (half * 2 + (lower ? 1 : 0)) * 4 + c % 4;
      const int byte = records[static_cast<size_t>(at + place)];
      int code = nibbles ? (lower ? byte >> 4 : byte) & 15 : byte;
      if (nibbles && !pairs) code = (code ^ 8) - 8;
      if (r >= n || c >= k) {
        ASSERT_EQ(code, 0) << r << " " << c;
        continue;
      }
      codes += code;
      float value = 0;
      if (grouped) {
        const int64_t term = at + code_bytes + (c % 128 / run * 64 + r % 64) * term_bytes;
        float scale = 0;
        std::memcpy(&scale, records.data() + term, 4);
        if (nibbles && !pairs) scale *= 16;
        if (pairs && nibbles) code -= records[static_cast<size_t>(term + 4)];
        if (pairs && !nibbles) {
          float center_less_zero = 0;
          std::memcpy(&center_less_zero, records.data() + term + 4, 4);
          code += static_cast<int>(center_less_zero);
        }
        value = scale * static_cast<float>(code);
        sum += value;
      } else {
        value = std::bit_cast<float>(rows[static_cast<size_t>(4 * r)]) *
                static_cast<float>(code - rows[static_cast<size_t>(4 * r + 2)]);
      }
      ASSERT_EQ(value, w[static_cast<size_t>(r * k + c)]) << r << " " << c;
    }
    if (grouped) {
      const float stored = std::bit_cast<float>(rows[static_cast<size_t>(4 * r + 1)]);
      EXPECT_NEAR(stored, sum, 1e-5 * (1 + std::abs(sum)));
    } else {
      EXPECT_EQ(rows[static_cast<size_t>(4 * r + 1)], codes);
    }
  }
}

void check_case(const Case& c) {
  SCOPED_TRACE(text_of(c.format, " [", c.n, ", ", c.k, "] outliers=", c.outliers, " own=", c.own_outliers,
                       " seed=", c.seed));
  const Matrix matrix = random_matrix(c);
  const IntegerPlanes prepared = prepare_integers(matrix.packed, matrix.columns);
  EXPECT_NO_THROW(validate_integers(prepared));
  EXPECT_FALSE(prepared.has("codes"));
  if (prepared.plane("integers").shape().size() == 3) {
    check_records(matrix, prepared);
  } else {
    check_planes(matrix, prepared);
  }
  const PackedTensor back = unprepare_integers(prepared);
  EXPECT_EQ(back.format->to_json(), matrix.packed.format->to_json());
  ASSERT_EQ(back.planes.size(), matrix.packed.planes.size());
  for (const auto& [name, plane] : matrix.packed.planes) {
    EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), back.plane(name).bytes()))
        << name;
  }
}

TEST(IntegerLayout, HoldsTheMatrixAndGivesItBack) {
  const std::vector<std::string> formats = {"uniform:8:channel",
                                            "uniform:8:channel:asym",
                                            "uniform:8:tensor",
                                            "uniform:7:channel:bf16",
                                            "uniform:6:channel:f32",
                                            "uniform:5:tensor:asym",
                                            "uniform:4:channel",
                                            "uniform:3:channel:asym:bf16",
                                            "uniform:2:channel:asym",
                                            "uniform:2:tensor",
                                            "sdr:4:g16",
                                            "sdr:3:g24",
                                            "sdr:6:g8:f32",
                                            "sdr:2:g128:bf16",
                                            "uniform:4:g128",
                                            "uniform:4:g64:asym",
                                            "uniform:3:g96:asym:bf16",
                                            "uniform:2:g32:f32",
                                            "uniform:8:g256",
                                            "uniform:8:g128:asym",
                                            "uniform:8:g32:asym",
                                            "uniform:7:g64:asym",
                                            "uniform:5:g32:asym:bf16",
                                            "uniform:6:g64"};
  const CounterRandom random(7);
  uint64_t draw = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    for (const std::string& format : formats) {
      Case c{format,
             static_cast<int64_t>(random.below(draw, 200)),
             static_cast<int64_t>(random.below(draw + 1, 300)),
             0,
             false,
             seed};
      const bool grouped = format.starts_with("uniform") && format.find(":g") != std::string::npos;
      if (random.below(draw + 2, 2) == 0 && c.k > 0 && !grouped) {
        c.outliers = 1 + static_cast<int64_t>(random.below(draw + 3, 80));
        c.own_outliers = random.below(draw + 4, 2) == 0;
      }
      draw += 5;
      check_case(c);
    }
  }
}

TEST(IntegerLayout, TakesEmptyMatrices) {
  for (const char* format : {"uniform:8:channel", "uniform:4:tensor:asym", "sdr:4:g16"}) {
    check_case({format, 0, 5});
    check_case({format, 5, 0});
    check_case({format, 0, 0});
    check_case({format, 1, 1, 1, true});
  }
  for (const char* format : {"uniform:4:channel", "uniform:4:g128", "uniform:8:g64:asym"}) {
    check_case({format, 0, 5});
    check_case({format, 5, 0});
    check_case({format, 0, 0});
    check_case({format, 1, 1});
  }
}

TEST(IntegerLayout, SaysWhyNot) {
  const auto reason = [](const char* spec) { return why_not_integers(*format_from_spec(spec)).value_or(""); };
  EXPECT_EQ(reason("uniform:2:channel"), "");
  EXPECT_EQ(reason("outliers:1%:uniform:8:channel"), "");
  EXPECT_EQ(reason("sdr:4:g16"), "");
  EXPECT_NE(reason("uniform:1:channel").find("2 to 8 bits"), std::string::npos);
  EXPECT_EQ(reason("uniform:4:g128"), "");
  EXPECT_NE(reason("uniform:4:g48").find("multiple of 32"), std::string::npos);
  EXPECT_NE(reason("outliers:1%:uniform:4:g128").find("one scale for each output"), std::string::npos);
  EXPECT_NE(reason("codebook:nf4:channel").find("uniform and sdr"), std::string::npos);
  EXPECT_NE(reason("outliers:1%:codebook:nf4:g64").find("uniform and sdr"), std::string::npos);
  EXPECT_THROW(integer_planes(*format_from_spec("uniform:4:g16"), 8, 256, 0, false), Unsupported);
  EXPECT_THROW(integer_planes(*format_from_spec("uniform:4:g128"), 8, 256, 3, false), Unsupported);
}

TEST(IntegerLayout, RefusesOutliersElsewhere) {
  const Matrix matrix = random_matrix({"uniform:8:channel", 20, 90, 4, true, 3});
  std::vector<int32_t> other = matrix.columns;
  for (int32_t column = 0; other == matrix.columns; ++column) {
    if (!std::ranges::binary_search(other, column)) {
      other.back() = column;
      std::ranges::sort(other);
    }
  }
  EXPECT_THROW(prepare_integers(matrix.packed, other), Unsupported);
  EXPECT_THROW(prepare_integers(matrix.packed, {}), Unsupported);
  std::vector<int32_t> fewer = matrix.columns;
  fewer.pop_back();
  EXPECT_THROW(prepare_integers(matrix.packed, fewer), Unsupported);
}

TEST(IntegerLayout, RefusesColumnsThatDoNotRise) {
  const Matrix matrix = random_matrix({"uniform:8:channel", 3, 40});
  for (const std::vector<int32_t>& columns : std::vector<std::vector<int32_t>>{{-1}, {40}, {3, 3}, {5, 2}}) {
    EXPECT_THROW(prepare_integers(matrix.packed, columns), InvalidArgument);
  }
}

TEST(IntegerLayout, ChecksPlanes) {
  const Matrix matrix = random_matrix({"uniform:8:channel", 70, 200, 3});
  const IntegerPlanes prepared = prepare_integers(matrix.packed, matrix.columns);
  for (const char* name : {"integers", "rows", "outlier_index", "outlier_weights", "scales"}) {
    IntegerPlanes without = prepared;
    without.planes.erase(name);
    EXPECT_THROW(validate_integers(without), Error) << name;
    EXPECT_THROW(unprepare_integers(without), Error) << name;
  }
  IntegerPlanes fewer = prepared;
  fewer.outlier_columns.pop_back();
  EXPECT_THROW(validate_integers(fewer), Error);
  IntegerPlanes nothing;
  EXPECT_THROW(validate_integers(nothing), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
