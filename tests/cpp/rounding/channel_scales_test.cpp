#include "quantloom/rounding/channel_scales.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/scale_search.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

struct Inputs {
  std::vector<float> x;  // [tokens, k]
  Hessian hessian;
  std::vector<double> magnitudes;
};

// Correlated inputs whose channels differ in size by up to `spread`.
Inputs random_inputs(int64_t tokens, int64_t k, double spread, uint64_t seed) {
  const CounterRandom random(seed);
  Inputs inputs{testing::normal_values(tokens * k, seed), Hessian(k), {}};
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      float& value = inputs.x[t * k + j];
      if (j > 0) value += 0.5F * inputs.x[t * k + j - 1];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      inputs.x[t * k + j] *= static_cast<float>(std::pow(spread, random.uniform(1000 + j)));
    }
  }
  inputs.hessian.add(MatrixView<const float>(inputs.x.data(), tokens, k));
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; ++t) sum += std::abs(inputs.x[t * k + j]);
    inputs.magnitudes.push_back(sum / static_cast<double>(tokens));
  }
  return inputs;
}

// Mean squared output error of nearest rounding under scales, by the inputs themselves.
double slow_loss(const std::vector<float>& w, int64_t n, int64_t k,
                 const std::shared_ptr<const Format>& format, const Inputs& inputs,
                 const std::vector<int8_t>& codes) {
  std::vector<float> scaled(w);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < k; ++j) scaled[r * k + j] *= channel_scale(codes[j]);
  }
  const auto decoded =
      testing::decoded_values(round_nearest(MatrixView<const float>(scaled.data(), n, k), format).tensor);
  const auto tokens = static_cast<int64_t>(inputs.x.size()) / k;
  double total = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < n; ++r) {
      double error = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double back = static_cast<double>(decoded[r * k + j]) / channel_scale(codes[j]);
        error += (w[r * k + j] - back) * inputs.x[t * k + j];
      }
      total += error * error;
    }
  }
  return total / static_cast<double>(tokens);
}

TEST(ChannelScales, AreSixteenthsOfOctaves) {
  for (int code = -kLargestScaleCode; code <= kLargestScaleCode; ++code) {
    EXPECT_FLOAT_EQ(channel_scale(static_cast<int8_t>(code)), static_cast<float>(std::exp2(code / 16.0)));
  }
  EXPECT_EQ(channel_scale(0), 1.0F);
  EXPECT_EQ(channel_scale(32), 4.0F);
  EXPECT_EQ(channel_scale(-16), 0.5F);
}

TEST(ChannelScales, CodesFollowThePowerOfMagnitudes) {
  const std::vector<double> magnitudes = {0.25, 1, 4, 0};
  EXPECT_EQ(channel_scale_codes(magnitudes, 0), (std::vector<int8_t>{0, 0, 0, 0}));
  EXPECT_EQ(channel_scale_codes(magnitudes, 1), (std::vector<int8_t>{-32, 0, 32, 0}));
  EXPECT_EQ(channel_scale_codes(magnitudes, 0.5), (std::vector<int8_t>{-16, 0, 16, 0}));
  EXPECT_EQ(channel_scale_codes(magnitudes, 0.3, 16), (std::vector<int8_t>{-16, 0, 16, 0}));
  EXPECT_EQ(channel_scale_codes(magnitudes, 0.2, 16), (std::vector<int8_t>{0, 0, 0, 0}));
}

TEST(ChannelScales, StayFiniteForAnyMagnitudes) {
  const double tiny = std::numeric_limits<double>::denorm_min();
  const double huge = std::numeric_limits<double>::max();
  for (const auto& magnitudes :
       std::vector<std::vector<double>>{{}, {0, 0, 0}, {tiny, huge}, {0, tiny, 1, huge}, {huge, huge}, {5}}) {
    for (const double exponent : {0.0, 0.5, 0.95, 4.0, -3.0}) {
      for (const int8_t code : channel_scale_codes(magnitudes, exponent)) {
        EXPECT_LE(std::abs(code), kLargestScaleCode);
        EXPECT_TRUE(std::isfinite(channel_scale(code)) && channel_scale(code) > 0);
      }
    }
  }
  EXPECT_EQ(channel_scale_codes(std::vector<double>{0, 7, 0}, 0.9), (std::vector<int8_t>{0, 0, 0}));
}

TEST(ChannelScales, SearchFindsTheLeastOutputError) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const int64_t k = 48;
    const int64_t n = 9;
    const Inputs inputs = random_inputs(100, k, 60, seed);
    const auto w = testing::normal_values(n * k, 50 + seed);
    const auto v = testing::normal_values(5 * k, 90 + seed);
    const auto coarse = std::make_shared<const Uniform>(2, 16, false);
    const auto fine = std::make_shared<const Uniform>(3, Uniform::kPerChannel);
    const std::vector<ScaledLayer> layers = {{MatrixView<const float>(w.data(), n, k), coarse},
                                             {MatrixView<const float>(v.data(), 5, k), fine}};
    const ChannelScales found =
        search_channel_scales(layers, inputs.hessian, inputs.magnitudes, {.steps = 8, .threads = 1});
    ASSERT_EQ(found.losses.size(), 8U);
    size_t best = 0;
    for (size_t i = 0; i < 8; ++i) {
      const auto codes = channel_scale_codes(inputs.magnitudes, static_cast<double>(i) / 8);
      const double slow = slow_loss(w, n, k, coarse, inputs, codes) + slow_loss(v, 5, k, fine, inputs, codes);
      EXPECT_NEAR(found.losses[i], slow, 2e-5 * slow) << "exponent " << i << "/8, seed " << seed;
      if (found.losses[i] < found.losses[best]) best = i;
    }
    EXPECT_EQ(found.exponent, static_cast<double>(best) / 8);
    EXPECT_EQ(found.loss, found.losses[best]);
    EXPECT_GT(found.exponent, 0) << "channels of such different sizes gain by scaling";
    EXPECT_EQ(found.codes, channel_scale_codes(inputs.magnitudes, found.exponent));
    for (const int threads : {2, 4}) {
      const ChannelScales again =
          search_channel_scales(layers, inputs.hessian, inputs.magnitudes, {.steps = 8, .threads = threads});
      EXPECT_EQ(again.codes, found.codes);
      EXPECT_EQ(again.losses, found.losses);
    }
  }
}

TEST(ChannelScales, DeadInputsAndWeightsAtTheEndOfFloat16StayFinite) {
  const int64_t k = 32;
  const int64_t n = 4;
  Inputs inputs = random_inputs(64, k, 1e4, 3);
  for (int64_t t = 0; t < 64; ++t) inputs.x[t * k + 5] = 0;
  inputs.hessian = Hessian(k);
  inputs.hessian.add(MatrixView<const float>(inputs.x.data(), 64, k));
  inputs.magnitudes[5] = 1;  // contradicts the Hessian, which counts
  auto w = testing::normal_values(n * k, 4);
  for (float& value : w) value *= 6.0e4F / 4;
  const auto format = std::make_shared<const Uniform>(4, 16);
  const std::vector<ScaledLayer> layers = {{MatrixView<const float>(w.data(), n, k), format}};
  const ChannelScales found = search_channel_scales(layers, inputs.hessian, inputs.magnitudes);
  EXPECT_EQ(found.codes[5], 0);
  EXPECT_TRUE(std::isfinite(found.loss));
  EXPECT_TRUE(std::isinf(found.losses.back())) << "such scales leave float16";
  std::vector<float> scaled(w.size());
  const MatrixView<float> out(scaled.data(), n, k);
  scale_columns(layers[0].w, found.codes, out);
  for (const float value : testing::decoded_values(round_nearest(out, format).tensor)) {
    EXPECT_TRUE(std::isfinite(value));
  }
  // All inputs dead: nothing to scale by.
  const std::vector<double> zeros(static_cast<size_t>(k * k), 0.0);
  const Hessian dead(MatrixView<const double>(zeros.data(), k, k), 1);
  EXPECT_EQ(search_channel_scales(layers, dead, inputs.magnitudes).exponent, 0);
}

TEST(ChannelScales, RefuseWhatContradictsItself) {
  const Inputs inputs = random_inputs(8, 4, 2, 1);
  const auto w = testing::normal_values(8, 1);
  const std::vector<ScaledLayer> layers = {
      {MatrixView<const float>(w.data(), 2, 4), std::make_shared<const Uniform>(4, 4)}};
  const std::vector<ScaledLayer> wide = {
      {MatrixView<const float>(w.data(), 1, 8), std::make_shared<const Uniform>(4, 4)}};
  auto magnitudes = inputs.magnitudes;
  EXPECT_THROW(search_channel_scales({}, inputs.hessian, magnitudes), InvalidArgument);
  EXPECT_THROW(search_channel_scales(wide, inputs.hessian, magnitudes), InvalidArgument);
  EXPECT_THROW(search_channel_scales(layers, inputs.hessian, magnitudes, {.steps = 0}), InvalidArgument);
  EXPECT_THROW(search_channel_scales(layers, inputs.hessian, magnitudes, {.code_step = 5}), InvalidArgument);
  magnitudes[2] = -1;
  EXPECT_THROW(search_channel_scales(layers, inputs.hessian, magnitudes), InvalidArgument);
  magnitudes[2] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(search_channel_scales(layers, inputs.hessian, magnitudes), InvalidArgument);
  magnitudes.pop_back();
  EXPECT_THROW(search_channel_scales(layers, inputs.hessian, magnitudes), InvalidArgument);
}

// e^T H e of each row and group at a factor, straight from the definition.
TEST(OutputErrorSearch, FindsTheBestFactorOfEachRowAndGroup) {
  const int64_t k = 40;
  const int64_t n = 11;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    const Inputs inputs = random_inputs(90, k, 10, seed);
    auto w = testing::normal_values(n * k, 70 + seed);
    for (float& value : w) value = value * value * value;
    const auto format = std::make_shared<const Uniform>(3, 16, seed % 2 == 0);
    const ScaleSearch search{.steps = 9, .smallest = 0.3, .norm = 2, .output_error = true};
    const MatrixView<const float> view(w.data(), n, k);
    const Rounded rounded =
        round_nearest(view, format, {.scale_search = search, .hessian = &inputs.hessian, .threads = 1});
    const auto decoded = testing::decoded_values(rounded.tensor);
    const auto error_of = [&](const std::vector<float>& values, int64_t r, int64_t first, int64_t last) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = first; j < last; ++j) {
          sum += (static_cast<double>(values[r * k + i]) - w[r * k + i]) * inputs.hessian.sum()(i, j) *
                 (static_cast<double>(values[r * k + j]) - w[r * k + j]);
        }
      }
      return sum;
    };
    for (int64_t first = 0; first < k; first += 16) {
      const int64_t last = std::min<int64_t>(k, first + 16);
      std::vector<double> least(static_cast<size_t>(n), std::numeric_limits<double>::infinity());
      for (int i = 0; i < search.steps; ++i) {
        const auto factor = static_cast<float>(1 - i / 8.0 * 0.7);
        const auto encoder = format->column_encoder(format, n, k, {});
        std::vector<float> tried(w);
        for (int64_t begin = 0; begin < k; begin += 16) {
          const int64_t width = std::min<int64_t>(16, k - begin);
          std::vector<float> columns(static_cast<size_t>(width * n));
          const MatrixView<float> values(columns.data(), width, n);
          for (int64_t c = 0; c < width; ++c) {
            for (int64_t r = 0; r < n; ++r) values(c, r) = w[r * k + begin + c];
          }
          encoder->fit(begin / 16, 0, values, std::vector<float>(static_cast<size_t>(n), factor));
          std::vector<float> one(static_cast<size_t>(n));
          for (int64_t c = 0; c < width; ++c) {
            encoder->encode(begin + c, 0, values.block(c, 0, 1, n), {one.data(), 1, n});
            for (int64_t r = 0; r < n; ++r) tried[r * k + begin + c] = one[r];
          }
        }
        for (int64_t r = 0; r < n; ++r) least[r] = std::min(least[r], error_of(tried, r, first, last));
      }
      for (int64_t r = 0; r < n; ++r) {
        const double own = error_of(decoded, r, first, last);
        EXPECT_LE(own, least[r] * (1 + 1e-4) + 1e-9) << "row " << r << ", column " << first;
      }
    }
    const Rounded threaded =
        round_nearest(view, format, {.scale_search = search, .hessian = &inputs.hessian, .threads = 3});
    EXPECT_TRUE(testing::same_planes(threaded.tensor, rounded.tensor));
  }
}

TEST(OutputErrorSearch, WorksInErrorFeedbackWithPermutedGroups) {
  const int64_t k = 64;
  const int64_t n = 20;
  const Inputs inputs = random_inputs(200, k, 20, 9);
  auto w = testing::normal_values(n * k, 10);
  for (float& value : w) value = value * value * value;
  const MatrixView<const float> view(w.data(), n, k);
  const auto format = std::make_shared<const Uniform>(2, 16, false);
  for (const bool static_groups : {true, false}) {
    ErrorFeedbackOptions options;
    options.static_groups = static_groups;
    options.threads = 1;
    const double plain = round_error_feedback(view, format, inputs.hessian, options).report.proxy_loss;
    options.scale_search = ScaleSearch{.steps = 20, .smallest = 0.4, .norm = 2, .output_error = true};
    const Rounded searched = round_error_feedback(view, format, inputs.hessian, options);
    EXPECT_LT(searched.report.proxy_loss, plain);
    options.threads = 3;
    EXPECT_TRUE(testing::same_planes(round_error_feedback(view, format, inputs.hessian, options).tensor,
                                     searched.tensor));
  }
}

TEST(OutputErrorSearch, RefusesWhatItCannotMeasure) {
  const auto w = testing::normal_values(8, 1);
  const MatrixView<const float> view(w.data(), 2, 4);
  const auto format = std::make_shared<const Uniform>(4, 4);
  const ScaleSearch search{.steps = 4, .smallest = 0.5, .norm = 2, .output_error = true};
  EXPECT_THROW(round_nearest(view, format, {.scale_search = search}), InvalidArgument);
  const Inputs inputs = random_inputs(8, 4, 2, 1);
  ScaleSearch other = search;
  other.norm = 2.4;
  EXPECT_THROW(round_nearest(view, format, {.scale_search = other, .hessian = &inputs.hessian}),
               InvalidArgument);
}

}  // namespace
}  // namespace quantloom
