#include "quantloom/formats/spqr.hpp"

#include <gtest/gtest.h>

#include "encoder_driver.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "spqr_reference.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::code_at;
using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

std::vector<int32_t> groups_of(const Spqr& format, int64_t k, uint64_t seed) {
  std::vector<int32_t> groups(static_cast<size_t>(k));
  for (int64_t c = 0; c < k; ++c) groups[c] = static_cast<int32_t>(c / format.columns_per_group(k));
  if (seed == 0) return groups;
  const CounterRandom random(seed);
  for (int64_t c = k - 1; c > 0; --c) std::swap(groups[c], groups[random.below(c, c + 1)]);
  return groups;
}

TEST(Spqr, DescribesItself) {
  const Spqr format(3, 16, 3, 4, 32);
  EXPECT_EQ(format.spec(), "spqr:3:g16:s3:z4:b32");
  EXPECT_EQ(
      format.to_json(),
      R"({"bits":3,"block":32,"format":"spqr","group_size":16,"scale_bits":3,"version":1,"zero_bits":4})");
  EXPECT_EQ(format_from_spec("spqr:2")->spec(), "spqr:2:g16:s3:z3:b16");
  EXPECT_EQ(format_from_spec("spqr:2:b5:z8:g1:s1")->spec(), "spqr:2:g1:s1:z8:b5");
  for (const char* spec : {"spqr:3:g16:s3:z3:b16", "spqr:8:g1:s8:z8:b1", "spqr:1:g9000:s1:z1:b77"}) {
    const auto read = format_from_spec(spec);
    EXPECT_EQ(read->spec(), spec);
    EXPECT_EQ(format_from_json(read->to_json())->to_json(), read->to_json());
  }
  for (const char* bad : {"spqr", "spqr:", "spqr:0", "spqr:9", "spqr:3:g0", "spqr:3:g", "spqr:3:g-1",
                          "spqr:3:s9", "spqr:3:z0", "spqr:3:b0", "spqr:3:g16:g16", "spqr:3:",
                          "spqr:3:channel", "spqr:3:g1x", "spqr:3:16", "spqr:3:g99999999999999999999"}) {
    EXPECT_THROW(format_from_spec(bad), InvalidArgument) << bad;
  }
  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string text = format.to_json();
    text.replace(text.find(from), from.size(), to);
    EXPECT_THROW(format_from_json(text), InvalidArgument) << text;
  };
  refused("\"bits\":3", "\"bits\":9");
  refused("\"bits\":3", "\"bits\":3.0");
  refused("\"block\":32", "\"block\":0");
  refused("\"block\":32,", "");
  refused("\"version\":1", "\"version\":2");
  refused("\"version\":1", "\"version\":1,\"more\":1");
  EXPECT_THROW(Spqr(0), InvalidArgument);
  EXPECT_THROW(Spqr(3, 0), InvalidArgument);
  EXPECT_THROW(Spqr(3, 16, 9), InvalidArgument);
  EXPECT_THROW(Spqr(3, 16, 3, 0), InvalidArgument);
  EXPECT_THROW(Spqr(3, 16, 3, 3, -1), InvalidArgument);
}

TEST(Spqr, CountsTheBitsOfThePaperAndItsOwn) {
  EXPECT_NEAR(spqr_average_bits(Spqr(3, 16, 3, 3, 16), 0.01138), 3.99, 0.001);
  EXPECT_NEAR(spqr_average_bits(Spqr(2, 32, 3, 3, 16), 0.02358), 3.07, 0.005);
  EXPECT_THROW(spqr_average_bits(Spqr(3), -0.1), InvalidArgument);
  // Rows without padding: the planes take what the formula says.
  for (const auto& format : {Spqr(3, 16, 3, 3, 16), Spqr(2, 32, 3, 3, 16), Spqr(4, 64, 4, 2, 32)}) {
    const auto shared = std::make_shared<const Spqr>(format);
    const auto w = normal_values(64 * 256, 5);
    const PackedTensor packed = round_nearest(view(w, 64, 256), shared).tensor;
    EXPECT_DOUBLE_EQ(packed.bits_per_weight(), spqr_average_bits(format, 0));
  }
}

TEST(Spqr, EncodesAndDecodesAsTheReference) {
  uint64_t seed = 1;
  for (const char* spec : {"spqr:3", "spqr:2:g32", "spqr:1:g4:s1:z2:b3", "spqr:8:g5:s8:z7:b64",
                           "spqr:4:g24:s2:z5:b7", "spqr:5:g1:s4:z4:b1"}) {
    const auto format = format_from_spec(spec);
    const auto& spqr = dynamic_cast<const Spqr&>(*format);
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 3}, {16, 16}, {67, 130}, {128, 33}, {5, 64}, {3, 0}, {0, 3}}) {
      for (const float shrink : {1.0F, 0.7F}) {
        for (const bool shuffled : {false, true}) {
          SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "] ", shrink, shuffled ? " shuffled" : ""));
          auto w = normal_values(n * k, ++seed);
          if (n == 67) {  // rows of zeros, of one value, of values far from 0
            for (int64_t c = 0; c < k; ++c) {
              w[2 * k + c] = 0;
              w[20 * k + c] = 0.37F;
              w[40 * k + c] = 5 + 0.01F * w[40 * k + c];
            }
          }
          const auto groups = groups_of(spqr, k, shuffled ? seed : 0);
          const auto expected = reference::quantize_spqr(w, n, k, spqr, groups, shrink);
          const int64_t slab = spqr.block * (seed % 2 == 0 ? 1 : 3);
          const auto got = testing::encode(format, w, n, k, groups, true, slab, shrink);
          validate(got.packed);
          EXPECT_EQ(got.decoded, expected.decoded);
          EXPECT_EQ(decoded_values(got.packed), expected.decoded);
          const Tensor& codes = got.packed.plane("codes");
          for (int64_t i = 0; i < n * k; ++i) {
            ASSERT_EQ(code_at(codes, spqr.bits, i / k, i % k), expected.codes[i]);
          }
          for (size_t i = 0; i < expected.scales.size(); ++i) {
            const auto at = static_cast<int64_t>(i);
            ASSERT_EQ(code_at(got.packed.plane("scales"), spqr.scale_bits, at / n, at % n),
                      expected.scales[i]);
            ASSERT_EQ(code_at(got.packed.plane("zeros"), spqr.zero_bits, at / n, at % n), expected.zeros[i]);
          }
          if (n == 0) continue;
          const auto scale_grids = got.packed.plane("scale_grids").values<uint16_t>();
          const auto zero_grids = got.packed.plane("zero_grids").values<uint16_t>();
          for (size_t i = 0; i < scale_grids.size(); ++i) {
            ASSERT_EQ(float_from_f16(scale_grids[i]), expected.grids[i / 2 * 4 + i % 2]);
            ASSERT_EQ(float_from_f16(zero_grids[i]), expected.grids[i / 2 * 4 + 2 + i % 2]);
          }
        }
      }
    }
  }
}

TEST(Spqr, RefinesAmongAllCodes) {
  for (const char* spec : {"spqr:3", "spqr:2:g32:s2:z4:b7", "spqr:4:g5:s1:z1:b64"}) {
    const auto format = format_from_spec(spec);
    const auto& spqr = dynamic_cast<const Spqr&>(*format);
    const int64_t n = 67;
    const int64_t k = 130;
    const auto w = normal_values(n * k, 7);
    auto weights = normal_values(k, 8);
    for (float& weight : weights) weight *= weight;
    const auto groups = groups_of(spqr, k, 0);
    const auto expected = reference::quantize_spqr(w, n, k, spqr, groups, 1, weights);
    const auto encoder = format->column_encoder(format, n, k, {});
    std::vector<float> columns(w.size());
    for (int64_t i = 0; i < n * k; ++i) columns[i % k * n + i / k] = w[i];
    std::vector<float> decoded(w.size());
    for (int64_t g = 0; g < encoder->group_count(); ++g) {
      const int64_t first = g * encoder->group_size();
      const int64_t width = std::min(encoder->group_size(), k - first);
      const MatrixView<const float> values(columns.data() + first * n, width, n);
      encoder->fit(g, 0, values, {});
      encoder->refine(g, 0, values, std::span(weights).subspan(first, width));
    }
    for (int64_t c = 0; c < k; ++c) {
      encoder->encode(c, 0, {columns.data() + c * n, 1, n}, {decoded.data() + c * n, 1, n});
    }
    for (int64_t i = 0; i < n * k; ++i) ASSERT_EQ(decoded[i % k * n + i / k], expected.decoded[i]) << spec;
    const auto plain = reference::quantize_spqr(w, n, k, spqr, groups);
    double error = 0;
    double plain_error = 0;
    for (int64_t i = 0; i < n * k; ++i) {
      error += weights[i % k] * std::pow(expected.decoded[i] - w[i], 2);
      plain_error += weights[i % k] * std::pow(plain.decoded[i] - w[i], 2);
    }
    EXPECT_LT(error, 0.97 * plain_error) << spec;
  }
  // Codes too many to try all: never worse.
  const auto w = normal_values(64 * 64, 9);
  const auto plain = round_nearest(view(w, 64, 64), format_from_spec("spqr:3:g16:s8:z8:b16"));
  const auto searched = round_nearest(view(w, 64, 64), format_from_spec("spqr:3:g16:s8:z8:b16"),
                                      {.scale_search = ScaleSearch{.steps = 1}});
  EXPECT_LT(searched.report.mean_squared_error, plain.report.mean_squared_error);
}

TEST(Spqr, KeepsMiddlesAndScalesOfAnySize) {
  for (const float size : {1e-7F, 1e-4F, 1.0F, 1e4F}) {
    auto w = normal_values(64 * 64, 11);
    for (float& value : w) value *= size;
    const Rounded rounded = round_nearest(view(w, 64, 64), format_from_spec("spqr:4"));
    // Steps of scales are float16: below 2^-14 they lose digits, at 1e-7 they are 0.
    if (size > 1e-5F) {
      EXPECT_LT(rounded.report.mean_squared_error, 0.008 * size * size);
    } else {
      EXPECT_LT(rounded.report.mean_squared_error, 1.01 * size * size);
    }
  }
  auto w = normal_values(32 * 32, 12);
  for (float& value : w) value *= 1e7F;
  EXPECT_THROW(round_nearest(view(w, 32, 32), format_from_spec("spqr:4")), NumericError);
  // Rows that span 8 orders of magnitude in a block of scales.
  w = normal_values(16 * 64, 13);
  for (size_t i = 0; i < w.size(); ++i) w[i] *= std::pow(10.0F, static_cast<float>(i / 64) / 2 - 6);
  for (const float value :
       decoded_values(round_nearest(view(w, 16, 64), format_from_spec("spqr:3")).tensor)) {
    EXPECT_TRUE(std::isfinite(value));
  }
}

TEST(Spqr, DoesNotDependOnThreads) {
  const auto w = normal_values(300 * 70, 14);
  for (const char* spec : {"spqr:3", "spqr:3:b7", "spqr:2:b1000"}) {
    const auto format = format_from_spec(spec);
    const NearestOptions options{.scale_search = ScaleSearch{.steps = 3}};
    const auto once = round_nearest(view(w, 300, 70), format, options);
    for (const int threads : {1, 2, 4}) {
      auto other = options;
      other.threads = threads;
      EXPECT_TRUE(same_planes(round_nearest(view(w, 300, 70), format, other).tensor, once.tensor));
    }
  }
}

TEST(Spqr, ProductsEqualTheReference) {
  uint64_t seed = 50;
  for (const char* spec : {"spqr:1:g8", "spqr:2:g32:b7", "spqr:3", "spqr:3:g64", "spqr:3:g40", "spqr:4:g200",
                           "spqr:6:g5:s8:z7:b1", "spqr:8:g16"}) {
    for (const auto& [n, k, m] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 1},
                                                                                    {33, 96, 3},
                                                                                    {130, 70, 1},
                                                                                    {17, 257, 9},
                                                                                    {64, 640, 2},
                                                                                    {7, 64, 40},
                                                                                    {3, 0, 2},
                                                                                    {4, 8, 0}}) {
      SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "], ", m, " tokens"));
      const auto w = normal_values(n * k, ++seed);
      const auto x = normal_values(m * k, ++seed);
      const PackedTensor packed = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
      std::vector<float> expected(static_cast<size_t>(m * n), NAN);
      matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
      const auto prepared = prepare(packed);
      for (const int threads : {1, 3}) {
        std::vector<float> y(expected.size(), NAN);
        matmul(view(x, m, k), *prepared, {y.data(), m, n}, {.threads = threads});
        for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 2e-4) << i;
        std::vector<float> rounded(expected.size(), NAN);
        matmul(view(x, m, k), *prepared, {rounded.data(), m, n},
               {.activations = Activations::int8, .threads = threads});
        double error = 0;
        double norm = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          error += std::pow(static_cast<double>(rounded[i]) - expected[i], 2);
          norm += std::pow(static_cast<double>(expected[i]), 2);
        }
        EXPECT_LE(error, 0.02 * 0.02 * norm);
      }
    }
  }
}

TEST(Spqr, RefusesHostilePlanes) {
  const auto w = normal_values(17 * 33, 15);
  const PackedTensor packed = round_nearest(view(w, 17, 33), format_from_spec("spqr:3:g16:s3:z3:b16")).tensor;
  const auto refused = [&](const char* name, const auto& change) {
    PackedTensor copy = packed;
    Tensor plane(packed.plane(name).dtype(), packed.plane(name).shape());
    std::memcpy(plane.bytes(), packed.plane(name).bytes(), static_cast<size_t>(plane.byte_count()));
    change(plane);
    copy.planes.at(name) = plane;
    try {
      validate(copy);
      ADD_FAILURE() << "accepted a bad " << name;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  refused("codes", [](Tensor& t) { t.values<uint32_t>()[3] |= 1U << 31; });
  refused("scales", [](Tensor& t) { t.values<uint32_t>()[1] |= 1U << 19; });
  refused("zeros", [](Tensor& t) { t.values<uint32_t>()[1] |= 1U << 19; });
  refused("scale_grids", [](Tensor& t) { t.values<uint16_t>()[3] = 0x7C00; });
  refused("zero_grids", [](Tensor& t) { t.values<uint16_t>()[2] = 0x7E00; });
  PackedTensor indexed = packed;
  indexed.planes.emplace("group_index", Tensor(DType::i32, {33}));
  EXPECT_THROW(validate(indexed), InvalidArgument);  // 33 columns in group 0
  EXPECT_THROW(spqr_parameters(round_nearest(view(w, 17, 33), format_from_spec("uniform:4")).tensor),
               InvalidArgument);
  const auto parameters = spqr_parameters(packed);
  const auto decoded = decoded_values(packed);
  for (int64_t i = 0; i < 17 * 33; ++i) {
    const int64_t at = i / 33 * 3 + i % 33 / 16;
    const auto code = static_cast<float>(code_at(packed.plane("codes"), 3, i / 33, i % 33));
    EXPECT_EQ(decoded[i], parameters.scales[at] * (code - parameters.zeros[at]));
  }
}

}  // namespace
}  // namespace quantloom
