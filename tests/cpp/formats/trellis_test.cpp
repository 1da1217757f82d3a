#include "quantloom/formats/trellis.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "formats/trellis_codes.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

std::vector<float> normal_values(int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(0.02 * random.normal(i));
  return values;
}

std::vector<float> decoded_values(const PackedTensor& packed, int threads = 0) {
  std::vector<float> out(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {out.data(), packed.n, packed.k}, threads);
  return out;
}

double relative_error(const std::vector<float>& w, const std::vector<float>& decoded) {
  double error = 0;
  double energy = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    error += std::pow(double{w[i]} - double{decoded[i]}, 2);
    energy += std::pow(double{w[i]}, 2);
  }
  return error / energy;
}

// The weights by the definition: one window at a time from the bits, Hadamard matrices entry by entry.
std::vector<double> reference_decode(const PackedTensor& packed) {
  const auto& format = dynamic_cast<const Trellis&>(*packed.format);
  const TrellisShape shape = format.shape();
  const auto codes = packed.plane("codes").values<uint32_t>();
  const auto inputs = packed.plane("input_scales").values<uint16_t>();
  const auto outputs = packed.plane("output_scales").values<uint16_t>();
  const int64_t tile_columns = packed.plane("codes").shape()[0];
  const int64_t tile_rows = packed.plane("codes").shape()[1];
  const int64_t rows = tile_rows * 16;
  const int64_t cols = tile_columns * 16;
  const uint16_t* table = nullptr;
  if (packed.planes.contains("table")) table = packed.plane("table").values<uint16_t>().data();
  std::vector<double> q(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t* words = codes.data() + (c / 16 * tile_rows + r / 16) * shape.words();
      const int position = trellis::position_of(static_cast<int>(c % 16), static_cast<int>(r % 16));
      const int step = position / shape.weights_per_step;
      const uint32_t state =
          trellis::state_at(words, shape.ring_bits(), shape.first_bit(step + 1), shape.window);
      q[static_cast<size_t>(r * cols + c)] = float_from_f16(
          trellis::weight_at(format.codebook.code, format.codebook.multiplier, table, shape.weights_per_step,
                             state, position % shape.weights_per_step));
    }
  }
  const auto entry = [](int64_t a, int64_t b) {
    return (std::popcount(static_cast<uint64_t>(a & b)) % 2 == 0 ? 1 : -1) / std::sqrt(128.0);
  };
  if (format.rotation > 0) {
    std::vector<double> half(q.size(), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t i = 0; i < 128; ++i) {
          half[static_cast<size_t>(r * cols + c)] +=
              entry(i, c % 128) * q[static_cast<size_t>(r * cols + c / 128 * 128 + i)];
        }
      }
    }
    std::fill(q.begin(), q.end(), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < 128; ++i) {
        for (int64_t c = 0; c < cols; ++c) {
          q[static_cast<size_t>(r * cols + c)] +=
              entry(i, r % 128) * half[static_cast<size_t>((r / 128 * 128 + i) * cols + c)];
        }
      }
    }
  }
  std::vector<double> w;
  for (int64_t r = 0; r < packed.n; ++r) {
    for (int64_t c = 0; c < packed.k; ++c) {
      w.push_back(double{float_from_f16(outputs[static_cast<size_t>(r)])} *
                  double{float_from_f16(inputs[static_cast<size_t>(c)])} *
                  q[static_cast<size_t>(r * cols + c)]);
    }
  }
  return w;
}

TEST(Trellis, DecodesByTheDefinition) {
  for (const char* spec : {"trellis:2:mul1", "trellis:2.5:3inst", "trellis:3:mcg:plain", "trellis:4:1mad:l12",
                           "trellis:1:hyb:plain", "trellis:2:rptc2:plain:l10", "trellis:3.5:octagon",
                           "trellis:8:mul1:plain:l9"}) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{128, 256}, {40, 130}, {1, 1}}) {
      const std::vector<float> w = normal_values(n * k, 1);
      const PackedTensor packed =
          round_nearest(MatrixView<const float>(w.data(), n, k), format_from_spec(spec)).tensor;
      const std::vector<float> decoded = decoded_values(packed);
      const std::vector<double> expected = reference_decode(packed);
      for (size_t i = 0; i < expected.size(); ++i)
        ASSERT_NEAR(decoded[i], expected[i], 1e-7) << spec << " " << i;
    }
  }
}

// The scales of the rotated basis and the codes of its encoder, seen through the error of a normal source.
TEST(Trellis, ErrorsOfNormalWeights) {
  const std::vector<float> w = normal_values(256 * 256, 2);
  const MatrixView<const float> view(w.data(), 256, 256);
  for (const auto& [spec, error] : {std::pair{"trellis:2:mul1", 0.0685},
                                    {"trellis:2:mul1:plain", 0.0685},
                                    {"trellis:4:3inst", 0.0046},
                                    {"trellis:2:hyb:plain", 0.071},
                                    {"trellis:4:octagon", 0.0050}}) {
    const Rounded rounded = round_nearest(view, format_from_spec(spec));
    const double relative = relative_error(w, decoded_values(rounded.tensor));
    EXPECT_NEAR(relative, error, 0.05 * error) << spec;
    EXPECT_NEAR(rounded.report.mean_squared_error, relative * 4e-4, 4e-4 * 0.02 * relative);
  }
}

// Rotation spreads what would be far out of a codebook's range.
TEST(Trellis, RotationTakesOutliers) {
  std::vector<float> w = normal_values(256 * 256, 3);
  for (size_t i = 0; i < w.size(); i += 509) w[i] = i % 2 == 0 ? 0.5F : -0.5F;
  const MatrixView<const float> view(w.data(), 256, 256);
  const double rotated =
      relative_error(w, decoded_values(round_nearest(view, format_from_spec("trellis:3")).tensor));
  const double plain =
      relative_error(w, decoded_values(round_nearest(view, format_from_spec("trellis:3:mul1:plain")).tensor));
  EXPECT_LT(rotated, 0.03);
  EXPECT_GT(plain, 3 * rotated);
}

TEST(Trellis, ZerosStayZero) {
  std::vector<float> w = normal_values(128 * 256, 4);
  for (int64_t r = 0; r < 128; ++r) w[static_cast<size_t>(r * 256 + 17)] = 0;
  for (int64_t c = 0; c < 256; ++c) w[static_cast<size_t>(5 * 256 + c)] = 0;
  const auto decoded = decoded_values(
      round_nearest(MatrixView<const float>(w.data(), 128, 256), format_from_spec("trellis:2")).tensor);
  for (int64_t r = 0; r < 128; ++r) EXPECT_EQ(decoded[static_cast<size_t>(r * 256 + 17)], 0);
  for (int64_t c = 0; c < 256; ++c) EXPECT_EQ(decoded[static_cast<size_t>(5 * 256 + c)], 0);
}

TEST(Trellis, RingsOfTheirOwnWeightsEncodeWithoutLoss) {
  const auto format = format_from_spec("trellis:3:mul1:plain:l12");
  const std::vector<float> w = normal_values(64 * 64, 5);
  const PackedTensor first = round_nearest(MatrixView<const float>(w.data(), 64, 64), format).tensor;
  const auto encoder = format->column_encoder(format, 64, 64, {});
  const std::vector<float> decoded = decoded_values(first);
  std::vector<float> columns(decoded.size());
  for (int64_t r = 0; r < 64; ++r) {
    for (int64_t c = 0; c < 64; ++c) {
      columns[static_cast<size_t>(c * 64 + r)] = w[static_cast<size_t>(r * 64 + c)];
    }
  }
  encoder->fit(0, 0, {columns.data(), 64, 64}, {});
  std::vector<float> again(columns.size());
  for (int64_t c = 0; c < 64; c += 16) {
    std::vector<float> values(16 * 64);
    for (int64_t i = 0; i < 16; ++i) {
      for (int64_t r = 0; r < 64; ++r) {
        values[static_cast<size_t>(i * 64 + r)] = decoded[static_cast<size_t>(r * 64 + c + i)];
      }
    }
    encoder->encode(c, 0, {values.data(), 16, 64}, {again.data() + c * 64, 16, 64});
    for (size_t i = 0; i < values.size(); ++i)
      ASSERT_NEAR(again[static_cast<size_t>(c) * 64 + i], values[i], 1e-8);
  }
}

TEST(Trellis, BandsAndThreadsDecodeAlike) {
  const std::vector<float> w = normal_values(300 * 140, 6);
  const PackedTensor packed =
      round_nearest(MatrixView<const float>(w.data(), 300, 140), format_from_spec("trellis:2:mul1:l10"))
          .tensor;
  const std::vector<float> all = decoded_values(packed, 1);
  EXPECT_EQ(decoded_values(packed, 3), all);
  for (const auto& [first, rows] :
       {std::pair<int64_t, int64_t>{0, 1}, {127, 2}, {255, 45}, {299, 1}, {7, 290}}) {
    std::vector<float> band(static_cast<size_t>(rows * 140));
    packed.format->decode(packed, first, {band.data(), rows, 140});
    EXPECT_TRUE(std::equal(band.begin(), band.end(), all.begin() + first * 140)) << first;
  }
}

// A table in the plane is what decodes, whatever the name's own table is.
TEST(Trellis, DecodesTheStoredTable) {
  const std::vector<float> w = normal_values(32 * 32, 7);
  PackedTensor packed =
      round_nearest(MatrixView<const float>(w.data(), 32, 32), format_from_spec("trellis:2:hyb:plain"))
          .tensor;
  const std::vector<float> before = decoded_values(packed);
  for (uint16_t& entry : packed.planes.at("table").values<uint16_t>()) entry ^= 0x8000U;
  const std::vector<float> after = decoded_values(packed);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_EQ(after[i], -before[i]);
  packed.planes.at("table").values<uint16_t>()[3] = 0x7C00;
  EXPECT_THROW(validate(packed), InvalidArgument);
}

TEST(Trellis, ErrorFeedbackTakesPart) {
  constexpr int64_t kRows = 128;
  constexpr int64_t kCols = 256;
  const std::vector<float> w = normal_values(kRows * kCols, 8);
  const CounterRandom random(9);
  std::vector<float> x(static_cast<size_t>(2 * kCols * kCols));
  for (int64_t t = 0; t < 2 * kCols; ++t) {
    const double shared = random.normal(static_cast<uint64_t>(1000000 + t));
    for (int64_t c = 0; c < kCols; ++c) {
      const auto i = static_cast<size_t>(t * kCols + c);
      x[i] = static_cast<float>(random.normal(i) + 2 * shared);
    }
  }
  Hessian hessian(kCols);
  hessian.add(MatrixView<const float>(x.data(), 2 * kCols, kCols));
  for (const char* spec : {"trellis:2:mul1:plain:l12", "trellis:2.5:3inst:plain:l10"}) {
    const RoundingReport report =
        round_error_feedback(MatrixView<const float>(w.data(), kRows, kCols), format_from_spec(spec), hessian)
            .report;
    EXPECT_LT(report.proxy_loss, 0.9 * report.proxy_loss_nearest) << spec;
  }
}

TEST(Trellis, DescriptionsRoundTrip) {
  for (const char* spec : {"trellis:2:mul1", "trellis:2.5:mcg-FF7A83E5:plain", "trellis:8:3inst:l18",
                           "trellis:4:hyb", "trellis:1.5:rptc:plain:l12", "trellis:3:mul1-AD9A2EC5:plain:l8",
                           "trellis:3.5:octagon:l20", "trellis:2:octagon-9E3779B1"}) {
    const auto format = format_from_spec(spec);
    EXPECT_EQ(format->spec(), spec);
    EXPECT_EQ(format_from_json(format->to_json())->to_json(), format->to_json());
  }
  EXPECT_EQ(format_from_spec("trellis:2")->spec(), "trellis:2:mul1");
  EXPECT_EQ(format_from_spec("trellis:2:plain")->spec(), "trellis:2:mul1:plain");
  EXPECT_EQ(format_from_spec("trellis:2:mul1-83dcd12d")->spec(), "trellis:2:mul1");
  EXPECT_EQ(format_from_spec("trellis:2.5")->to_json(),
            R"({"bits":2.5,"codebook":"mul1","format":"trellis","rotation":128,"version":1,"window":16})");
  for (const char* spec :
       {"trellis", "trellis:", "trellis:0", "trellis:9", "trellis:8.5", "trellis:2.25", "trellis:.5",
        "trellis:2:mul2", "trellis:2:mul1:mul1", "trellis:2:plain:plain", "trellis:2:mul1:l7",
        "trellis:2:mul1:l21", "trellis:4.5:hyb", "trellis:4.5:octagon", "trellis:2:hyb:l14",
        "trellis:2:rptc:l17", "trellis:2:mul1-83DCD12C", "trellis:2:mul1:l16:l16", "trellis:-2"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string json = Trellis(2).to_json();
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = json;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  for (const std::string& bad :
       {with("\"bits\":2", "\"bits\":2.25"), with("\"bits\":2", "\"bits\":0"),
        with("\"bits\":2", "\"bits\":1e300"), with("\"bits\":2", "\"bits\":\"2\""), with("mul1", "mul3"),
        with("\"mul1\"", "7"), with(":128", ":64"), with(":128", ":\"128\""),
        with("\"version\":1", "\"version\":2"), with("16", "15.5"), with("16", "99"),
        with("\"window\":16", "\"window\":16,\"seed\":1"), with(",\"window\":16", "")}) {
    EXPECT_THROW(format_from_json(bad), InvalidArgument) << bad;
  }
}

TEST(Trellis, PlanesAndBits) {
  const Trellis format(2.5);
  const auto specs = format.planes(300, 512);
  ASSERT_EQ(specs.size(), 3U);
  EXPECT_EQ(specs[0].shape, (std::vector<int64_t>{32, 24, 20}));
  EXPECT_EQ(specs[1].shape, (std::vector<int64_t>{512}));
  EXPECT_EQ(specs[2].shape, (std::vector<int64_t>{300}));
  EXPECT_EQ(Trellis(2, "mul1", 0).planes(300, 500)[0].shape, (std::vector<int64_t>{32, 19, 16}));
  EXPECT_EQ(Trellis(2, "hyb").planes(128, 128)[3].shape, (std::vector<int64_t>{512, 2}));
  EXPECT_EQ(Trellis(2, "rptc", 128, 12).planes(128, 128)[3].shape, (std::vector<int64_t>{4096, 1}));
  const std::vector<float> w = normal_values(128 * 128, 1);
  const Rounded rounded =
      round_nearest(MatrixView<const float>(w.data(), 128, 128), format_from_spec("trellis:2:mul1:l8"));
  EXPECT_DOUBLE_EQ(rounded.tensor.bits_per_weight(), 2 + 16.0 * 256 / (128 * 128));
  EXPECT_THROW(Trellis(2, "mul1", 64), InvalidArgument);
  EXPECT_THROW(Trellis(std::numeric_limits<double>::quiet_NaN()), InvalidArgument);
  EXPECT_THROW(Trellis(2, "mul1", 128, 1 << 20), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
