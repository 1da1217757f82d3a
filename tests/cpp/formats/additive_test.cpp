#include "quantloom/formats/additive.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "formats/encoder_driver.hpp"
#include "quantloom/fit/kmeans.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

std::vector<Additive> formats() {
  return {Additive(2, 6),
          Additive(1, 8, 4, 1, 64, DType::bf16),
          Additive(3, 4, 3, 2, Additive::kPerChannel, DType::f32),
          Additive(8, 1, 1),
          Additive(1, 3, 2, 8, 6),
          Additive(1, 10, 16)};
}

TEST(Additive, DescribesItself) {
  EXPECT_EQ(Additive(2, 8).to_json(),
            R"({"bits":8,"codebooks":2,"format":"additive","in_group":8,"out_group":1,)"
            R"("scale_dtype":"float16","scale_group":"channel","version":1})");
  EXPECT_EQ(Additive(2, 8).spec(), "additive:2x8:g8");
  EXPECT_EQ(Additive(1, 16, 4, 2, 64, DType::bf16).spec(), "additive:1x16:g2x4:scale64:bf16");
  for (const Additive& format : formats()) {
    EXPECT_EQ(format_from_json(format.to_json())->to_json(), format.to_json());
    EXPECT_EQ(format_from_spec(format.spec())->to_json(), format.to_json());
  }
  EXPECT_EQ(format_from_spec("additive:2x8")->spec(), "additive:2x8:g8");
  EXPECT_EQ(format_from_spec("additive:2x8:f32:channel:g16")->spec(), "additive:2x8:g16:f32");
}

TEST(Additive, RefusesWhatItDoesNotUnderstand) {
  for (const char* spec : {"additive",
                           "additive:",
                           "additive:8",
                           "additive:2x",
                           "additive:x8",
                           "additive:0x8",
                           "additive:9x8",
                           "additive:2x17",
                           "additive:2x0",
                           "additive:2x8:g0",
                           "additive:2x8:g17",
                           "additive:2x8:g4x8",
                           "additive:2x8:g8:g8",
                           "additive:2x8:scale12",
                           "additive:2x8:scale0",
                           "additive:2x8:scale8:channel",
                           "additive:2x8:tensor",
                           "additive:2x8:f16:bf16",
                           "additive:2x8x8",
                           "additive:2x8:g1x2x3"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string good = Additive(2, 8, 8, 1, 64).to_json();
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"bits\":8", "\"bits\":17"},
                                                        {"\"codebooks\":2", "\"codebooks\":2.0"},
                                                        {"\"in_group\":8", "\"in_group\":5"},
                                                        {"\"out_group\":1", "\"out_group\":3"},
                                                        {"\"scale_group\":64", "\"scale_group\":\"row\""},
                                                        {"float16", "int8"},
                                                        {"\"version\":1", "\"version\":2"},
                                                        {"\"out_group\":1,", ""}}) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    EXPECT_ANY_THROW(format_from_json(text)) << text;
  }
  EXPECT_THROW(Additive(2, 8, 8, 4), InvalidArgument);
  EXPECT_THROW(Additive(2, 8, 8, 1, 12), InvalidArgument);
  EXPECT_THROW(Additive(2, 8, 8, 1, 8, DType::i8), TypeMismatch);
  EXPECT_THROW(Additive(1, 1, 2, 1, 2, DType::f16, std::vector<float>(3)), InvalidArgument);
  EXPECT_THROW(Additive(1, 1, 1, 1, 2, DType::f16, std::vector<float>{0, 1e6F}), InvalidArgument);
  const auto format = std::make_shared<const Additive>(1, 4, 4);
  EXPECT_THROW(format->column_encoder(format, 4, 8, {}), InvalidArgument);  // without tables
  const auto w = normal_values(64, 1);
  EXPECT_THROW(static_cast<void>(fit_additive(*format, view(w, 4, 16), {.sweeps = -1})), InvalidArgument);
  EXPECT_THROW(static_cast<void>(fit_additive(*format, view(w, 4, 16), {.vectors_per_entry = -1})),
               InvalidArgument);
  const std::vector<double> few(15, 1.0);
  EXPECT_THROW(static_cast<void>(fit_additive(*format, view(w, 4, 16), {.column_weights = few})),
               InvalidArgument);
  std::vector<double> bad(16, 1.0);
  bad[3] = -1;
  EXPECT_THROW(static_cast<void>(fit_additive(*format, view(w, 4, 16), {.column_weights = bad})),
               NumericError);
  PackedTensor packed = round_nearest(view(w, 4, 16), format).tensor;
  packed.planes.at("codebook").values<uint16_t>()[5] = 0x7c00;
  EXPECT_THROW(validate(packed), InvalidArgument);
}

TEST(Additive, BitsAreThosePublishedAndThoseStored) {
  EXPECT_NEAR(Additive(1, 16).average_bits(4096, 4096), 2.504, 5e-4);
  EXPECT_NEAR(Additive(2, 8).average_bits(4096, 4096), 2.008, 5e-4);
  EXPECT_NEAR(Additive(1, 8).average_bits(4096, 4096), 1.006, 5e-4);
  EXPECT_EQ(Additive(1, 8).average_bits(0, 4096), 0);
  // The Linears of Llama-2-7B.
  for (const auto& [format, published] :
       std::vector<std::pair<Additive, double>>{{Additive(1, 16), 2.294},
                                                {Additive(2, 8), 2.006},
                                                {Additive(1, 8), 1.0045},
                                                {Additive(1, 16, 16), 1.58}}) {
    double bits = 4 * format.average_bits(4096, 4096) * 4096 * 4096;
    bits += 2 * format.average_bits(11008, 4096) * 11008 * 4096;
    bits += format.average_bits(4096, 11008) * 4096 * 11008;
    EXPECT_NEAR(bits / (4.0 * 4096 * 4096 + 3.0 * 11008 * 4096), published, 0.006);
  }
  const auto w = normal_values(64 * 512, 3);
  for (const char* spec : {"additive:2x8:g8", "additive:1x6:g2x8:scale64"}) {
    const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
    EXPECT_NEAR(round_nearest(view(w, 64, 512), format).tensor.bits_per_weight(),
                format->average_bits(64, 512), 1e-12);
  }
}

TEST(Additive, TheDocumentedBytesDecode) {
  // Two tables of 2 entries for blocks of 1 x 2: (0 1), (2 -1); (0 0), (0.5 0.25).
  const auto format = std::make_shared<const Additive>(2, 1, 2, 1, 4);
  PackedTensor packed{format, 1, 6, {}};
  for (const PlaneSpec& spec : format->planes(1, 6))
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  packed.planes.at("codes").values<uint32_t>()[0] = 0x1e;  // 0 1, 1 1, 1 0
  const std::vector<float> tables = {0, 1, 2, -1, 0, 0, 0.5, 0.25};
  for (size_t i = 0; i < tables.size(); ++i)
    packed.planes.at("codebook").values<uint16_t>()[i] = f16_from_float(tables[i]);
  packed.planes.at("scales").values<uint16_t>()[0] = f16_from_float(2);
  packed.planes.at("scales").values<uint16_t>()[1] = f16_from_float(-1);
  validate(packed);
  EXPECT_EQ(decoded_values(packed), (std::vector<float>{1, 2.5, 5, -1.5, -2, 1}));
  packed.planes.at("codes").values<uint32_t>()[0] = 0x5e;
  EXPECT_THROW(validate(packed), InvalidArgument);  // a bit behind the last code
}

// Scale, then one table after the other, by the nearest entry.
TEST(Additive, NearestRoundingFollowsItsDefinition) {
  for (const Additive& plain : formats()) {
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{24, 48}, {5, 37}, {1, 1}}) {
      SCOPED_TRACE(plain.spec());
      const auto w = normal_values(n * k, 7);
      const auto format = fit_additive(plain, view(w, n, k));
      const PackedTensor packed = round_nearest(view(w, n, k), format).tensor;
      validate(packed);
      const std::vector<float> decoded = decoded_values(packed);
      const Tensor& scales = packed.plane("scales");
      const int64_t groups = plain.scale_count(k);
      const int64_t width = plain.scale_columns(k);
      for (int64_t first_row = 0; first_row < n; first_row += plain.out_group) {
        const int64_t rows = std::min(plain.out_group, n - first_row);
        for (int64_t g = 0; g < groups; ++g) {
          double squares = 0;
          const int64_t end = std::min(k, (g + 1) * width);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = g * width; c < end; ++c)
              squares += std::pow(static_cast<double>(w[(first_row + r) * k + c]), 2);
          }
          const float scale = testing::scale_at(scales, first_row / plain.out_group * groups + g);
          EXPECT_NEAR(scale, std::sqrt(squares / static_cast<double>(rows * (end - g * width))),
                      0.004 * scale);
          for (int64_t first = g * width; first < end; first += plain.in_group) {
            const int64_t columns = std::min(plain.in_group, k - first);
            std::vector<float> left(static_cast<size_t>(plain.dim()), 0.0F);
            std::vector<float> sum(left.size(), 0.0F);
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t c = 0; c < columns; ++c)
                left[r * plain.in_group + c] = w[(first_row + r) * k + first + c] / scale;
            }
            for (int64_t book = 0; book < plain.codebooks; ++book) {
              const float* const table = format->tables.data() + book * plain.entries() * plain.dim();
              int64_t best = 0;
              double least = INFINITY;
              for (int64_t entry = 0; entry < plain.entries(); ++entry) {
                double distance = 0;
                for (int64_t i = 0; i < plain.dim(); ++i)
                  distance += std::pow(static_cast<double>(left[i]) - table[entry * plain.dim() + i], 2);
                if (distance < least) best = entry;
                least = std::min(least, distance);
              }
              for (int64_t i = 0; i < plain.dim(); ++i) {
                sum[i] = book == 0 ? table[best * plain.dim() + i] : sum[i] + table[best * plain.dim() + i];
                if (i % plain.in_group < columns) left[i] -= table[best * plain.dim() + i];
              }
            }
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t c = 0; c < columns; ++c) {
                ASSERT_EQ(decoded[(first_row + r) * k + first + c], sum[r * plain.in_group + c] * scale);
              }
            }
          }
        }
      }
    }
  }
}

TEST(Additive, TablesFitWhatCounts) {
  const int64_t n = 256;
  const int64_t k = 64;
  std::vector<float> w = normal_values(n * k, 11);
  const auto weighted_error = [&](const PackedTensor& packed, std::span<const double> weights) {
    const auto decoded = decoded_values(packed);
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i)
      sum += weights[i % k] * std::pow(static_cast<double>(w[i]) - static_cast<double>(decoded[i]), 2);
    return sum;
  };
  // Columns of the second half are of another shape, and of no weight.
  for (int64_t i = 0; i < n * k; ++i) {
    if (i % k >= k / 2) w[i] = w[i] > 0 ? 1.0F : -1.0F;
  }
  std::vector<double> weights(k, 1.0);
  std::fill(weights.begin() + k / 2, weights.end(), 1e-6);
  const Additive format(2, 4, 4);
  const auto plain = round_nearest(view(w, n, k), fit_additive(format, view(w, n, k))).tensor;
  const auto weighted =
      round_nearest(view(w, n, k), fit_additive(format, view(w, n, k), {.column_weights = weights})).tensor;
  EXPECT_LT(weighted_error(weighted, weights), 0.95 * weighted_error(plain, weights));
  // A second table halves the error at least, whatever the threads.
  const double one =
      round_nearest(view(w, n, k), format_from_spec("additive:1x4:g4")).report.mean_squared_error;
  const double two =
      round_nearest(view(w, n, k), format_from_spec("additive:2x4:g4")).report.mean_squared_error;
  EXPECT_LT(two, 0.5 * one);
  for (const int threads : {1, 2, 4}) {
    AdditiveFitOptions options;
    options.threads = threads;
    EXPECT_EQ(fit_additive(format, view(w, n, k), options)->tables,
              fit_additive(format, view(w, n, k))->tables);
  }
}

TEST(Additive, ErrorFeedbackErrsLess) {
  const int64_t n = 40;
  const int64_t k = 96;
  std::vector<float> x = normal_values(400 * k, 8);
  for (size_t i = 1; i < x.size(); ++i) x[i] += 0.8F * x[i - 1];
  Hessian hessian(k);
  hessian.add(view(x, 400, k));
  const auto w = normal_values(n * k, 9);
  for (const char* spec : {"additive:2x5:g4", "additive:2x5:g2x4:scale32"}) {
    const auto format = format_from_spec(spec);
    const double nearest = round_nearest(view(w, n, k), format, {.hessian = &hessian}).report.proxy_loss;
    const Rounded fed = round_error_feedback(view(w, n, k), format, hessian, {});
    EXPECT_LT(fed.report.proxy_loss, 0.85 * nearest) << spec;
    EXPECT_TRUE(
        same_planes(fed.tensor, round_error_feedback(view(w, n, k), format, hessian, {.threads = 3}).tensor));
  }
}

TEST(Additive, RowsOfABlockShareTheirFactor) {
  const int64_t n = 16;
  const int64_t k = 48;
  std::vector<float> w = normal_values(n * k, 12);
  for (float& value : w) value = value * value * value;
  for (const char* spec : {"additive:2x3:g4x3:scale12", "outliers:1%:additive:2x3:g4x3:scale12"}) {
    const auto format = format_from_spec(spec);
    const double plain = round_nearest(view(w, n, k), format).report.mean_squared_error;
    const double searched = round_nearest(view(w, n, k), format, {.scale_search = ScaleSearch{.steps = 12}})
                                .report.mean_squared_error;
    EXPECT_LE(searched, plain * (1 + 1e-9)) << spec;
  }
}

TEST(Additive, Multiplies) {
  const int64_t n = 45;
  const int64_t k = 100;
  const auto w = normal_values(n * k, 21);
  for (const Additive& format : formats()) {
    const PackedTensor packed = round_nearest(view(w, n, k), std::make_shared<const Additive>(format)).tensor;
    const auto prepared = prepare(packed);
    for (const int64_t m : {1, 7}) {
      const auto x = normal_values(m * k, 22);
      std::vector<float> expected(static_cast<size_t>(m * n));
      std::vector<float> y(expected.size());
      matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
      matmul(view(x, m, k), *prepared, {y.data(), m, n});
      for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-3) << format.spec();
    }
  }
}

}  // namespace
}  // namespace quantloom
