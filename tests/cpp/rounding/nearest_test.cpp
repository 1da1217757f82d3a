#include "quantloom/rounding/nearest.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& w, int64_t n, int64_t k) {
  return {w.data(), n, k};
}

Hessian random_hessian(int64_t k, int64_t tokens, uint64_t seed) {
  Hessian hessian(k);
  auto x = normal_values(tokens * k, seed);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= 1.0F + static_cast<float>(i % static_cast<size_t>(k) % 7);
  hessian.add(view(x, tokens, k), 1);
  return hessian;
}

// tr(E H E^T), summed term by term.
double loss(const std::vector<float>& w, const std::vector<float>& decoded, int64_t n,
            const Hessian& hessian) {
  const int64_t k = hessian.k();
  double sum = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const double e_i = static_cast<double>(decoded[r * k + i]) - w[r * k + i];
        const double e_j = static_cast<double>(decoded[r * k + j]) - w[r * k + j];
        sum += e_i * hessian.sum()(i, j) * e_j;
      }
    }
  }
  return sum / static_cast<double>(hessian.tokens());
}

TEST(Nearest, EveryFormatTakesOddShapesWhateverTheThreads) {
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{0, 0},   {0, 5},    {3, 0},     {1, 1},
                                                           {3, 129}, {65, 127}, {130, 257}, {67, 33}};
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      const auto format = format_from_spec(example);
      for (const auto& [n, k] : shapes) {
        SCOPED_TRACE(text_of(example, " [", n, ", ", k, "]"));
        const auto w = normal_values(n * k, static_cast<uint64_t>(n * 1000 + k));
        NearestOptions options{.threads = 1};
        if (n == 67) options.scale_search = ScaleSearch{.steps = 5};
        const Rounded one = round_nearest(view(w, n, k), format, options);
        validate(one.tensor);
        for (const int threads : {2, 4}) {
          options.threads = threads;
          const Rounded other = round_nearest(view(w, n, k), format, options);
          EXPECT_TRUE(same_planes(one.tensor, other.tensor));
          EXPECT_EQ(one.report.mean_squared_error, other.report.mean_squared_error);
        }
        const auto decoded = decoded_values(one.tensor);
        double sum = 0;
        for (size_t i = 0; i < w.size(); ++i) {
          ASSERT_TRUE(std::isfinite(decoded[i]));
          sum += std::pow(static_cast<double>(decoded[i]) - w[i], 2);
        }
        const double expected = w.empty() ? 0 : sum / static_cast<double>(w.size());
        EXPECT_NEAR(one.report.mean_squared_error, expected, 1e-12 * expected);
        EXPECT_EQ(one.report.method, "nearest");
        EXPECT_EQ(one.report.scale_search, n == 67);
        EXPECT_TRUE(std::isnan(one.report.proxy_loss) && std::isnan(one.report.held_out_loss));
      }
    }
  }
}

float scale_at(const PackedTensor& packed, int64_t row, int64_t group) {
  const Tensor& scales = packed.plane("scales");
  const auto i = static_cast<size_t>(scales.element_count() == 1 ? 0 : row * scales.shape()[1] + group);
  if (scales.dtype() == DType::f32) return scales.values<float>()[i];
  const uint16_t bits = scales.values<uint16_t>()[i];
  return scales.dtype() == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

double zero_at(const PackedTensor& packed, const Uniform& format, int64_t row, int64_t group) {
  if (format.symmetric) return format.symmetric_zero_point();
  const Tensor& zeros = packed.plane("zeros");
  const auto words = static_cast<size_t>(zeros.shape()[1]);
  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  uint8_t zero = 0;
  unpack_bits(zeros.values<uint32_t>().subspan(static_cast<size_t>(group) * words, words), format.bits,
              per_tensor ? 0 : row, {&zero, 1});
  return zero;
}

// The codes of `w` under the parameters fitted to `fitted`.
PackedTensor encode_under(const std::shared_ptr<const Format>& format, const std::vector<float>& fitted,
                          const std::vector<float>& w, int64_t n, int64_t k) {
  const auto transposed = [&](const std::vector<float>& rows) {
    std::vector<float> columns(rows.size());
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) columns[c * n + r] = rows[r * k + c];
    }
    return columns;
  };
  const auto fit_columns = transposed(fitted);
  const auto columns = transposed(w);
  std::vector<float> ignored(static_cast<size_t>(n));
  const auto encoder = format->column_encoder(format, n, k, {});
  const MatrixView<const float> all(fit_columns.data(), k, n);
  for (int64_t g = 0; g < encoder->group_count(); ++g) {
    const int64_t first = g * encoder->group_size();
    encoder->fit(g, 0, all.block(first, 0, std::min(encoder->group_size(), k - first), n), {});
  }
  for (int64_t c = 0; c < k; ++c) {
    encoder->encode(c, 0, MatrixView<const float>(columns.data() + c * n, 1, n),
                    MatrixView<float>(ignored.data(), 1, n));
  }
  return encoder->finish(1);
}

TEST(Nearest, ErrsByHalfAStepAtMostAndDecodedWeightsKeepTheirCodes) {
  constexpr int64_t kRows = 3;
  constexpr int64_t kCols = 21;
  constexpr int kMatrices = 10000;
  constexpr DType kDTypes[] = {DType::f16, DType::bf16, DType::f32};
  for (int bits = 1; bits <= 8; ++bits) {
    for (int i = 0; i < kMatrices; ++i) {
      const CounterRandom random(static_cast<uint64_t>(bits * kMatrices + i));
      const int64_t group_size =
          i % 11 == 0 ? Uniform::kPerTensor : 1 + static_cast<int64_t>(random.below(0, 24));
      const auto format =
          std::make_shared<const Uniform>(bits, group_size, i % 2 == 0, kDTypes[random.below(1, 3)]);
      std::vector<float> w(kRows * kCols);
      const double spread = std::ldexp(1.0, static_cast<int>(random.below(2, 24)) - 16);
      const double shift = i % 5 == 0 ? spread : 0;
      for (size_t j = 0; j < w.size(); ++j) {
        w[j] = static_cast<float>(shift + spread * (random.uniform(j + 3) - 0.5) * 2);
      }
      const Rounded rounded = round_nearest(view(w, kRows, kCols), format, {.threads = 1});
      const auto decoded = decoded_values(rounded.tensor);
      const int64_t width = std::min(format->columns_per_group(kCols), kCols);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < kCols; ++c) {
          const double value = w[r * kCols + c];
          const double decoded_value = decoded[r * kCols + c];
          const double scale = scale_at(rounded.tensor, r, c / width);
          const double zero = zero_at(rounded.tensor, *format, r, c / width);
          const double low = -scale * zero;
          const double high = scale * (static_cast<double>((1 << bits) - 1) - zero);
          const auto magnitude = static_cast<float>(std::abs(value));
          const double ulp = std::nextafter(magnitude, HUGE_VALF) - magnitude;
          if (value < low) {
            ASSERT_EQ(decoded_value, static_cast<float>(low)) << format->spec();
          } else if (value > high) {
            ASSERT_EQ(decoded_value, static_cast<float>(high)) << format->spec();
          } else {
            ASSERT_LE(std::abs(decoded_value - value), scale / 2 + ulp) << format->spec() << " " << value;
          }
        }
      }
      ASSERT_TRUE(same_planes(encode_under(format, w, decoded, kRows, kCols), rounded.tensor))
          << format->spec();
    }
  }
}

struct Hazard {
  const char* name;
  int64_t n, k;
  std::vector<float> w;
};

std::vector<Hazard> hazards() {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  std::vector<Hazard> all;
  const auto add = [&](const char* name, int64_t n, int64_t k, auto value_at) {
    Hazard hazard{name, n, k, {}};
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) hazard.w.push_back(value_at(r, c));
    }
    all.push_back(hazard);
  };
  const CounterRandom random(9);
  const auto noise = [&](int64_t r, int64_t c) {
    return static_cast<float>(random.normal(static_cast<uint64_t>(r * 1000 + c)));
  };
  add("all zero", 3, 40, [](auto, auto) { return 0.0F; });
  add("all -0", 3, 40, [](auto, auto) { return -0.0F; });
  add("zeros of both signs", 3, 40, [](auto, auto c) { return c % 2 == 0 ? 0.0F : -0.0F; });
  add("all equal", 3, 40, [](auto, auto) { return 0.37F; });
  add("all equal, negative", 3, 40, [](auto, auto) { return -0.37F; });
  add("one row zero", 3, 40, [&](auto r, auto c) { return r == 1 ? 0.0F : noise(r, c); });
  add("one column zero", 3, 40, [&](auto r, auto c) { return c == 7 ? 0.0F : noise(r, c); });
  add("one weight not zero", 3, 40, [](auto r, auto c) { return r == 1 && c == 39 ? -2.5F : 0.0F; });
  add("all positive", 3, 40, [&](auto r, auto c) { return std::abs(noise(r, c)) + 1; });
  add("all negative", 3, 40, [&](auto r, auto c) { return -std::abs(noise(r, c)) - 1; });
  add("far from zero", 3, 40, [&](auto r, auto c) { return 1000 + noise(r, c); });
  add("one 1e30", 3, 40, [&](auto r, auto c) { return r == 2 && c == 33 ? 1e30F : noise(r, c); });
  add("one -1e30", 3, 40, [&](auto r, auto c) { return r == 0 && c == 0 ? -1e30F : noise(r, c); });
  add("1e30 and -1e30", 3, 40, [](auto, auto c) { return c % 2 == 0 ? 1e30F : -1e30F; });
  add("largest float", 3, 40, [&](auto r, auto c) { return r == 1 && c == 3 ? kMax : noise(r, c); });
  add("largest and lowest float", 3, 40, [](auto, auto c) { return c % 2 == 0 ? kMax : -kMax; });
  add("all largest", 3, 40, [](auto, auto) { return kMax; });
  add("a third of the largest", 3, 40, [](auto, auto c) { return c % 2 == 0 ? kMax / 3 : -kMax / 3; });
  add("smallest subnormal", 3, 40, [](auto, auto) { return kTiny; });
  add("subnormals", 3, 40, [](auto r, auto c) { return static_cast<float>(c - r * 13) * kTiny; });
  add("subnormal and normal", 3, 40, [&](auto r, auto c) { return c % 3 == 0 ? kTiny : noise(r, c); });
  add("smallest normal", 3, 40, [](auto, auto c) { return c % 2 == 0 ? 0x1p-126F : -0x1p-126F; });
  add("float16 scale underflows", 3, 40, [&](auto r, auto c) { return 1e-9F * noise(r, c); });
  add("float16 scale is subnormal", 3, 40, [&](auto r, auto c) { return 1e-6F * noise(r, c); });
  add("largest float16 scales", 3, 40, [](auto, auto c) { return c % 2 == 0 ? 65504.0F : -65504.0F; });
  add("near 2^-24", 3, 40,
      [](auto r, auto c) { return std::ldexp(c % 2 == 0 ? 1.0F : -1.0F, -20 - static_cast<int>(r)); });
  add("spread over all exponents", 3, 40,
      [](auto r, auto c) { return std::ldexp(1.0F, static_cast<int>(c * 3 - r) - 120); });
  add("spread over float16's exponents", 3, 40,
      [](auto r, auto c) { return std::ldexp(1.0F, static_cast<int>(c - r) - 26); });
  add("halves of steps", 3, 40, [](auto, auto c) { return static_cast<float>(c - 20) / 2; });
  add("group not dividing k", 2, 131, noise);
  add("group above k", 2, 5, noise);
  add("one element", 1, 1, noise);
  add("no rows", 0, 40, noise);
  add("no columns", 3, 0, noise);
  add("one row more than a slab", 65, 9, noise);
  return all;
}

TEST(Nearest, TakesOrRefusesEveryHazard) {
  int taken = 0;
  int refused = 0;
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      const auto format = format_from_spec(example);
      // A trellis ends a few standard deviations out, whatever the largest weight.
      const float reach = entry.name == "trellis" ? 8.0F : 2.01F;
      for (const Hazard& hazard : hazards()) {
        SCOPED_TRACE(text_of(example, ": ", hazard.name));
        float largest = 0;
        for (const float value : hazard.w) largest = std::max(largest, std::abs(value));
        try {
          const Rounded rounded = round_nearest(view(hazard.w, hazard.n, hazard.k), format, {.threads = 1});
          validate(rounded.tensor);
          for (const float value : decoded_values(rounded.tensor)) {
            ASSERT_TRUE(std::isfinite(value));
            ASSERT_LE(std::abs(value), reach * std::max(largest, 0x1p-22F));
          }
          ASSERT_TRUE(std::isfinite(rounded.report.mean_squared_error));
          ++taken;
        } catch (const NumericError& error) {
          ASSERT_GT(largest, 60000.0F) << error.what();
          const std::string text = error.what();
          if (entry.name == "trellis") {  // it has a scale for each row and each column
            EXPECT_NE(text.find("scale of"), std::string::npos);
          } else {
            EXPECT_NE(text.find("row"), std::string::npos);
            EXPECT_TRUE(entry.name == "outliers" || text.find("group") != std::string::npos);
          }
          ++refused;
        }
      }
    }
  }
  EXPECT_GT(taken, 200);
  EXPECT_GT(refused, 10);
}

// A size without elements costs nothing, whatever its other dimension claims.
TEST(Nearest, TakesHugeEmptyMatrices) {
  constexpr int64_t kHuge = int64_t{1} << 58;
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{kHuge, 0}, {0, kHuge}}) {
        const FloatMatrix w(nullptr, DType::f32, n, k, k);
        const Rounded rounded = round_nearest(w, format_from_spec(example));
        int64_t table = 0;
        for (const auto& [name, plane] : rounded.tensor.planes) {
          if (name.starts_with("codebook")) table += 8 * plane.byte_count();
        }
        EXPECT_LE(rounded.tensor.size_in_bits(), 64 + table);  // per-tensor parameters and tables
        dequantize(rounded.tensor, MatrixView<float>(nullptr, n, k));
      }
    }
  }
}

TEST(Nearest, RefusesAFloat16ScaleThatOverflowsWithAdvice) {
  auto w = normal_values(4 * 64, 1);
  w[2 * 64 + 40] = 1e6F;
  try {
    round_nearest(view(w, 4, 64), format_from_spec("uniform:4:g16"));
    FAIL();
  } catch (const NumericError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("row 2, group 2"), std::string::npos) << text;
    EXPECT_NE(text.find("bfloat16"), std::string::npos) << text;
    EXPECT_NE(text.find("float32"), std::string::npos) << text;
  }
  for (const char* spec : {"uniform:4:g16:bf16", "uniform:4:g16:f32"}) {
    const auto decoded = decoded_values(round_nearest(view(w, 4, 64), format_from_spec(spec)).tensor);
    EXPECT_NEAR(decoded[2 * 64 + 40], 1e6F, 7e4F);
  }
}

TEST(Nearest, RefusesNonFiniteValuesByRowAndColumn) {
  for (const float bad : {NAN, -NAN, HUGE_VALF, -HUGE_VALF}) {
    for (const FormatEntry& entry : format_table()) {
      for (const std::string& example : entry.examples) {
        auto w = normal_values(5 * 7, 1);
        w[2 * 7 + 3] = bad;
        try {
          round_nearest(view(w, 5, 7), format_from_spec(example), {.threads = 1});
          FAIL() << "accepted " << bad;
        } catch (const NumericError& error) {
          EXPECT_NE(std::string(error.what()).find("row 2, column 3"), std::string::npos) << error.what();
        }
      }
    }
  }
}

TEST(Nearest, ReadsHalvesAndStridesAsTheSameValuesInFloat32) {
  constexpr int64_t kRows = 7;
  constexpr int64_t kCols = 150;
  constexpr int64_t kStride = 163;
  const auto format = format_from_spec("uniform:4:g128:asym");
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    std::vector<std::byte> memory(kRows * kStride * 4 + 16, std::byte{0xff});  // NaN between the rows
    std::vector<float> dense;
    const auto values = normal_values(kRows * kCols, 2);
    const int64_t size = size_of(dtype);
    std::byte* start = memory.data() + 3;
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kCols; ++c) {
        const float value = values[r * kCols + c];
        const uint16_t bits = dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
        std::byte* at = start + (r * kStride + c) * size;
        if (dtype == DType::f32) {
          std::memcpy(at, &value, 4);
          dense.push_back(value);
        } else {
          std::memcpy(at, &bits, 2);
          dense.push_back(dtype == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits));
        }
      }
    }
    const Rounded strided = round_nearest(FloatMatrix(start, dtype, kRows, kCols, kStride), format);
    EXPECT_TRUE(same_planes(strided.tensor, round_nearest(view(dense, kRows, kCols), format).tensor));
  }
}

TEST(Nearest, ReportsProxyLossesOfBothHessians) {
  constexpr int64_t kRows = 9;
  constexpr int64_t kCols = 50;
  const auto w = normal_values(kRows * kCols, 4);
  const Hessian hessian = random_hessian(kCols, 80, 5);
  const Hessian held_out = random_hessian(kCols, 30, 6);
  const auto format = format_from_spec("uniform:3:g16:asym");
  const Rounded plain =
      round_nearest(view(w, kRows, kCols), format, {.hessian = &hessian, .held_out = &held_out});
  const auto decoded = decoded_values(plain.tensor);
  const double expected = loss(w, decoded, kRows, hessian);
  const double expected_held_out = loss(w, decoded, kRows, held_out);
  EXPECT_NEAR(plain.report.proxy_loss, expected, 1e-5 * expected);
  EXPECT_NEAR(plain.report.held_out_loss, expected_held_out, 1e-5 * expected_held_out);
  EXPECT_EQ(plain.report.proxy_loss_nearest, plain.report.proxy_loss);
  EXPECT_EQ(plain.report.held_out_loss_nearest, plain.report.held_out_loss);
  EXPECT_EQ(plain.report.tokens, 80);

  const Rounded searched =
      round_nearest(view(w, kRows, kCols), format,
                    {.scale_search = ScaleSearch{}, .hessian = &hessian, .held_out = &held_out});
  EXPECT_EQ(searched.report.proxy_loss_nearest, plain.report.proxy_loss);
  EXPECT_EQ(searched.report.held_out_loss_nearest, plain.report.held_out_loss);
  const double searched_loss = loss(w, decoded_values(searched.tensor), kRows, hessian);
  EXPECT_NEAR(searched.report.proxy_loss, searched_loss, 1e-5 * searched_loss);
  EXPECT_TRUE(searched.report.scale_search);

  const Rounded only_held_out = round_nearest(view(w, kRows, kCols), format, {.held_out = &held_out});
  EXPECT_TRUE(std::isnan(only_held_out.report.proxy_loss));
  EXPECT_EQ(only_held_out.report.held_out_loss, plain.report.held_out_loss);
}

TEST(Nearest, RefusesBadOptionsByName) {
  const auto w = normal_values(3 * 8, 1);
  const auto format = format_from_spec("uniform:4");
  const Hessian empty(8);
  const Hessian other = random_hessian(7, 9, 1);
  struct Case {
    const char* named;
    NearestOptions options;
  };
  const std::vector<Case> cases = {
      {"threads", {.threads = -1}},
      {"hessian", {.hessian = &empty}},
      {"hessian", {.hessian = &other}},
      {"held_out", {.held_out = &other}},
      {"held_out", {.held_out = &empty}},
      {"scale_search.steps", {.scale_search = ScaleSearch{.steps = 0}}},
      {"scale_search.smallest", {.scale_search = ScaleSearch{.smallest = 0}}},
      {"scale_search.smallest", {.scale_search = ScaleSearch{.smallest = 1}}},
      {"scale_search.smallest", {.scale_search = ScaleSearch{.smallest = NAN}}},
      {"scale_search.norm", {.scale_search = ScaleSearch{.norm = 0}}},
      {"scale_search.norm", {.scale_search = ScaleSearch{.norm = HUGE_VAL}}},
      {"scale_search.norm", {.scale_search = ScaleSearch{.norm = NAN}}},
  };
  for (const Case& each : cases) {
    try {
      round_nearest(view(w, 3, 8), format, each.options);
      ADD_FAILURE() << "accepted a bad " << each.named;
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()).rfind(each.named, 0), 0U) << error.what();
    }
  }
  EXPECT_THROW(round_nearest(view(w, 3, 8), nullptr), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
