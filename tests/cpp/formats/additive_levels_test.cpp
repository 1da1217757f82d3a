// Scales and tables of the format "additive" as codes into levels.
#include "formats/additive_levels.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "formats/additive_encoder.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

// Weights whose groups of 4 columns differ in size.
std::vector<float> uneven_values(int64_t n, int64_t k, uint64_t seed) {
  std::vector<float> w = normal_values(n * k, seed);
  const std::vector<float> sizes = normal_values(n * ceil_div(k, int64_t{4}), seed + 1);
  for (int64_t i = 0; i < n * k; ++i) {
    w[static_cast<size_t>(i)] *=
        std::exp(sizes[static_cast<size_t>(i / k * ceil_div(k, int64_t{4}) + i % k / 4)]);
  }
  return w;
}

TEST(AdditiveLevels, AreDescribed) {
  const Additive both(2, 8, 8, 1, 16, DType::bf16, {}, {.scale_bits = 4, .table_bits = 6, .table_groups = 2});
  EXPECT_EQ(both.spec(), "additive:2x8:g8:scale16:s4:t2x6:bf16");
  EXPECT_EQ(both.to_json(),
            R"({"bits":8,"codebooks":2,"format":"additive","in_group":8,"out_group":1,"scale_bits":4,)"
            R"("scale_dtype":"bfloat16","scale_group":16,"table_bits":6,"table_groups":2,"version":1})");
  for (const char* spec : {"additive:2x8:g8:scale16:s4:t2x6:bf16", "additive:1x4:g4:s15",
                           "additive:1x4:g4:t1", "additive:1x4:g4:t16x1", "additive:2x8:g8:scale8:s1:t3"}) {
    EXPECT_EQ(format_from_spec(spec)->spec(), spec);
    EXPECT_EQ(format_from_json(format_from_spec(spec)->to_json())->spec(), spec);
  }
  for (const char* spec :
       {"additive:1x4:g4:s0", "additive:1x4:g4:s16", "additive:1x4:g4:s", "additive:1x4:s4:s4",
        "additive:1x4:t0", "additive:1x4:t16", "additive:1x4:t3x4", "additive:1x4:t32x2", "additive:1x4:t0x4",
        "additive:1x4:t4:t4", "additive:1x4:s2x2"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string good = both.to_json();
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"scale_bits\":4", "\"scale_bits\":0"},
                                                        {"\"scale_bits\":4", "\"scale_bits\":16"},
                                                        {"\"scale_bits\":4", "\"scale_bits\":4.0"},
                                                        {"\"table_bits\":6", "\"table_bits\":-1"},
                                                        {"\"table_bits\":6,", ""},
                                                        {"\"table_groups\":2,", ""},
                                                        {"\"table_groups\":2", "\"table_groups\":3"},
                                                        {"\"table_groups\":2", "\"table_groups\":512"}}) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    EXPECT_THROW(format_from_json(text), InvalidArgument) << text;
  }
  EXPECT_THROW(Additive(1, 4, 4, 1, 4, DType::f16, {}, {.scale_bits = 16}), InvalidArgument);
  EXPECT_THROW(Additive(1, 4, 4, 1, 4, DType::f16, {}, {.table_bits = -1}), InvalidArgument);
  EXPECT_THROW(Additive(1, 4, 4, 1, 4, DType::f16, {}, {.table_bits = 2, .table_groups = 5}),
               InvalidArgument);
  EXPECT_THROW(Additive(1, 4, 4, 1, 4, DType::f16, {}, {.table_groups = 2}), InvalidArgument);
}

TEST(AdditiveLevels, BitsAreThosePublishedAndThoseStored) {
  // O I / d M nbits + M K d vb + 2^vb M groups d 16 + b NO G + NO 2^b 16
  const Additive format(2, 8, 8, 1, 8, DType::f16, {}, {.scale_bits = 4, .table_bits = 6, .table_groups = 2});
  const double published =
      512.0 * 1024 / 8 * 16 + 2 * 256 * 8 * 6 + 64 * 2 * 2 * 8 * 16 + 4 * 512 * 128 + 512 * 16 * 16;
  EXPECT_NEAR(format.average_bits(512, 1024), published / (512 * 1024), 1e-12);
  double stored = 0;
  for (const PlaneSpec& spec : format.planes(512, 1024)) {
    stored += 8 * static_cast<double>(checked_product(spec.shape) * size_of(spec.dtype));
  }
  EXPECT_EQ(stored, published);
  // Scales that are few: b for each of them, where 16 are stored.
  const Additive few(2, 8, 8, 1, 64, DType::f16, {}, {.scale_bits = 4});
  EXPECT_NEAR(few.average_bits(512, 1024), Additive(2, 8, 8, 1, 64).average_bits(512, 1024) - 12.0 / 64,
              1e-12);
}

TEST(AdditiveLevels, TheDocumentedBytesDecode) {
  // Levels 0 1 and -1 2 for the two places of an entry; scales 1 2 1.
  const auto format = std::make_shared<const Additive>(1, 2, 2, 1, 2, DType::f16, std::span<const float>(),
                                                       AdditiveLevels{.scale_bits = 1, .table_bits = 1});
  PackedTensor packed{format, 1, 6, {}};
  for (const PlaneSpec& spec : format->planes(1, 6))
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  packed.planes.at("codes").values<uint32_t>()[0] = 0x1b;           // 3 2 1
  packed.planes.at("codebook_codes").values<uint32_t>()[0] = 0xc6;  // (0, 2) (1, -1) (0, -1) (1, 2)
  packed.planes.at("scale_codes").values<uint32_t>()[0] = 2;
  const std::vector<float> levels = {0, 1, -1, 2};
  for (size_t i = 0; i < 4; ++i)
    packed.planes.at("codebook_levels").values<uint16_t>()[i] = f16_from_float(levels[i]);
  packed.planes.at("scale_levels").values<uint16_t>()[0] = f16_from_float(1);
  packed.planes.at("scale_levels").values<uint16_t>()[1] = f16_from_float(2);
  validate(packed);
  EXPECT_EQ(decoded_values(packed), (std::vector<float>{1, 2, 0, -2, 1, -1}));
  for (const auto& [name, word] :
       std::map<std::string, uint32_t>{{"codebook_codes", 0x1c6}, {"scale_codes", 10}}) {
    auto& stored = packed.planes.at(name).values<uint32_t>()[0];
    const uint32_t kept = std::exchange(stored, word);
    EXPECT_THROW(validate(packed), InvalidArgument) << name;  // a bit behind the last code
    stored = kept;
  }
  for (const char* name : {"codebook_levels", "scale_levels"}) {
    auto& stored = packed.planes.at(name).values<uint16_t>()[1];
    const uint16_t kept = std::exchange(stored, uint16_t{0x7e00});
    EXPECT_THROW(validate(packed), InvalidArgument) << name;
    stored = kept;
  }
  validate(packed);
}

// Numbers take the level nearest to them, of which none could lie better; few numbers keep their values.
TEST(AdditiveLevels, AreThoseOfKMeans) {
  const Additive format(2, 6, 4, 1, 4, DType::f16, {}, {.scale_bits = 3, .table_bits = 2, .table_groups = 4});
  const std::vector<float> scales = uneven_values(5, 40, 3);
  const LeveledNumbers of_scales = level_scales(format, scales, 160, DType::f32, {}, 1);
  ASSERT_EQ(of_scales.levels.size(), 5U * 8U);
  const std::vector<float> tables = normal_values(2 * 64 * 4, 4);
  const LeveledNumbers of_tables = level_tables(format, tables, DType::f32, {}, 1);
  ASSERT_EQ(of_tables.levels.size(), 2U * 4U * 4U * 4U);
  const auto check = [](const LeveledNumbers& leveled, const std::vector<float>& numbers, int64_t count,
                        const auto& run_of) {
    std::map<int64_t, std::vector<double>> members;
    for (size_t i = 0; i < numbers.size(); ++i) {
      const int64_t run = run_of(static_cast<int64_t>(i));
      ASSERT_EQ(leveled.places[i] / count, run);
      members[leveled.places[i]].push_back(static_cast<double>(numbers[i]));
      for (int64_t l = run * count; l < (run + 1) * count; ++l) {
        EXPECT_LE(std::abs(numbers[i] - leveled.levels[static_cast<size_t>(leveled.places[i])]),
                  std::abs(numbers[i] - leveled.levels[static_cast<size_t>(l)]));
      }
    }
    for (const auto& [place, own] : members) {
      double mean = 0;
      for (const double value : own) mean += value / static_cast<double>(own.size());
      EXPECT_NEAR(leveled.levels[static_cast<size_t>(place)], mean, 1e-5 * std::abs(mean) + 1e-6);
    }
  };
  check(of_scales, scales, 8, [](int64_t i) { return i / 40; });
  // Entry i / 4 of its table, place i % 4: 16 entries share levels.
  check(of_tables, tables, 4, [](int64_t i) { return i / 64 * 4 + i % 4; });
  for (const int threads : {2, 3}) {
    EXPECT_EQ(level_scales(format, scales, 160, DType::f32, {}, threads).places, of_scales.places);
  }
  // From its own result nothing moves; and few numbers are exact.
  EXPECT_EQ(level_scales(format, scales, 160, DType::f32, of_scales.levels, 1).levels, of_scales.levels);
  const std::vector<float> few = of_scales.numbers();
  EXPECT_EQ(level_scales(format, few, 160, DType::f32, {}, 1).numbers(), few);
  EXPECT_EQ(nearest_level(std::vector<float>{1, 2, 4, 4}, 3), 2);
  EXPECT_EQ(nearest_level(std::vector<float>{1, 2, 4, 4}, 9), 4);
  EXPECT_EQ(nearest_level(std::vector<float>{1, 2, 4, 4}, -9), 1);
}

TEST(AdditiveLevels, AreLosslessWhereThereAreEnough) {
  const int64_t n = 12;
  const int64_t k = 37;
  const std::vector<float> w = uneven_values(n, k, 8);
  const PackedTensor plain =
      round_nearest(view(w, n, k), format_from_spec("additive:2x4:g4:scale8:bf16")).tensor;
  // 5 scales in a row, 16 entries in a table.
  for (const AdditiveLevels& levels :
       {AdditiveLevels{.scale_bits = 3}, AdditiveLevels{.table_bits = 4},
        AdditiveLevels{.scale_bits = 15, .table_bits = 2, .table_groups = 4}}) {
    const PackedTensor same = with_levels(plain, levels);
    validate(same);
    EXPECT_TRUE(same_planes(same, plain));
    EXPECT_EQ(decoded_values(same), decoded_values(plain));
    EXPECT_EQ(dynamic_cast<const Additive&>(*same.format).levels, levels);
  }
  const PackedTensor fewer = with_levels(plain, {.scale_bits = 1, .table_bits = 2});
  validate(fewer);
  EXPECT_TRUE(fewer.planes.contains("scale_levels") && fewer.planes.contains("codebook_levels"));
  EXPECT_NE(decoded_values(fewer), decoded_values(plain));
  EXPECT_LT(fewer.bits_per_weight(), plain.bits_per_weight());
  // Without levels, and with the same again.
  const PackedTensor expanded = with_levels(fewer, {});
  EXPECT_EQ(decoded_values(expanded), decoded_values(fewer));
  EXPECT_EQ(expanded.format->to_json(), plain.format->to_json());
  EXPECT_TRUE(same_planes(with_levels(expanded, {.scale_bits = 1, .table_bits = 2}), fewer));
  EXPECT_THROW(with_levels(round_nearest(view(w, n, k), format_from_spec("uniform:4")).tensor, {}),
               InvalidArgument);
}

TEST(AdditiveLevels, ScalesAreTheNearestLevels) {
  const int64_t n = 10;
  const int64_t k = 70;
  const std::vector<float> w = uneven_values(n, k, 5);
  for (const char* spec :
       {"additive:2x4:g4:scale4:s2", "additive:1x5:g2x4:scale8:s1:t3", "additive:1x6:g2:scale2:s3:f32"}) {
    SCOPED_TRACE(spec);
    const auto wanted = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
    const auto format = fit_additive(*wanted, view(w, n, k));
    const PackedTensor packed = round_nearest(view(w, n, k), format).tensor;
    validate(packed);
    EXPECT_TRUE(same_planes(packed, round_nearest(view(w, n, k), wanted, {.threads = 3}).tensor));
    const AdditiveParts parts = unpack_additive(*format, packed);
    EXPECT_EQ(parts.tables, format->tables);
    const int64_t count = int64_t{1} << format->levels.scale_bits;
    const int64_t width = format->scale_columns(k);
    for (int64_t r = 0; r < format->row_groups(n); ++r) {
      const std::span<const float> levels(format->scale_levels.data() + r * count,
                                          static_cast<size_t>(count));
      for (int64_t s = 0; s < format->scale_count(k); ++s) {
        double squares = 0;
        int64_t of = 0;
        for (int64_t row = r * format->out_group; row < (r + 1) * format->out_group; ++row) {
          for (int64_t c = s * width; c < std::min((s + 1) * width, k); ++c, ++of) {
            squares += std::pow(static_cast<double>(w[static_cast<size_t>(row * k + c)]), 2);
          }
        }
        const double wanted_scale = std::sqrt(squares / static_cast<double>(of));
        const double scale = parts.scales[static_cast<size_t>(r * format->scale_count(k) + s)];
        for (const float level : levels) {
          EXPECT_LE(std::abs(scale - wanted_scale), std::abs(level - wanted_scale) + 1e-3 * wanted_scale);
        }
      }
    }
    // Another matrix has other levels; one of another size has none.
    const std::vector<float> other = uneven_values(n, k, 50);
    EXPECT_TRUE(
        same_planes(round_nearest(view(other, n, k), format).tensor,
                    round_nearest(view(other, n, k), format->fitted(format, view(other, n, k), 1)).tensor));
    EXPECT_THROW(format->column_encoder(format, 2 * n, k, {}), InvalidArgument);
  }
}

TEST(AdditiveLevels, TakeZerosAndExtremes) {
  const int64_t n = 4;
  const int64_t k = 64;
  std::vector<float> w = uneven_values(n, k, 6);
  std::fill_n(w.begin(), k, 0.0F);          // a row
  std::fill_n(w.begin() + k, k / 2, 0.0F);  // half of one
  for (int64_t c = 0; c < k; ++c) w[static_cast<size_t>(2 * k + c)] *= c < 4 ? 1e3F : 1e-6F;
  const auto format = format_from_spec("additive:1x4:g4:scale4:s2");
  const PackedTensor packed = round_nearest(view(w, n, k), format).tensor;
  validate(packed);
  const AdditiveParts parts = unpack_additive(dynamic_cast<const Additive&>(*packed.format), packed);
  for (size_t i = 0; i < 16; ++i) EXPECT_EQ(parts.scales[i], 1);
  // Zeros take the least level.
  for (size_t i = 16; i < 24; ++i)
    EXPECT_LE(parts.scales[i], *std::min_element(parts.scales.begin() + 24, parts.scales.begin() + 32));
  w[3] = 1e30F;
  EXPECT_THROW(round_nearest(view(w, n, k), format), NumericError);  // beyond float16, named with its row
  for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{0, 64}, {4, 0}, {1, 1}}) {
    const PackedTensor empty =
        round_nearest(view(w, rows, columns), format_from_spec("additive:1x4:g4:scale4:s2:t2:f32")).tensor;
    validate(empty);
    EXPECT_EQ(std::ssize(decoded_values(empty)), rows * columns);
  }
}

}  // namespace
}  // namespace quantloom
