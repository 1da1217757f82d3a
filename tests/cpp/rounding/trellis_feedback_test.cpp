#include "quantloom/rounding/trellis_feedback.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "quantloom/random.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

struct Layer {
  std::vector<float> w;
  int64_t n;
  int64_t k;
  Hessian hessian;
  MatrixView<const float> view() const { return {w.data(), n, k}; }
};

// Weights whose columns and rows differ in size, inputs that are correlated and of different sizes.
Layer random_layer(int64_t n, int64_t k, uint64_t seed, double spread) {
  const CounterRandom random(seed);
  Layer layer{std::vector<float>(static_cast<size_t>(n * k)), n, k, Hessian(k)};
  std::vector<double> sizes(static_cast<size_t>(k));
  for (int64_t c = 0; c < k; ++c) {
    sizes[static_cast<size_t>(c)] = std::exp(spread * random.normal(static_cast<uint64_t>(c)));
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const auto i = static_cast<size_t>(r * k + c);
      layer.w[i] = static_cast<float>(0.02 * sizes[static_cast<size_t>(c)] * random.normal(100000 + i));
    }
  }
  const int64_t tokens = 2 * k;
  std::vector<float> x(static_cast<size_t>(tokens * k));
  for (int64_t t = 0; t < tokens; ++t) {
    const double shared = random.normal(static_cast<uint64_t>(50000000 + t));
    for (int64_t c = 0; c < k; ++c) {
      const auto i = static_cast<size_t>(t * k + c);
      x[i] =
          static_cast<float>((random.normal(10000000 + i) + shared) * sizes[static_cast<size_t>(k - 1 - c)]);
    }
  }
  layer.hessian.add(MatrixView<const float>(x.data(), tokens, k));
  return layer;
}

std::shared_ptr<const Trellis> trellis_of(const char* spec) {
  return std::dynamic_pointer_cast<const Trellis>(format_from_spec(spec));
}

bool same_planes(const PackedTensor& a, const PackedTensor& b) {
  if (a.planes.size() != b.planes.size()) return false;
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.plane(name);
    if (plane.shape() != other.shape() ||
        std::memcmp(plane.bytes(), other.bytes(), static_cast<size_t>(plane.byte_count())) != 0) {
      return false;
    }
  }
  return true;
}

TEST(TrellisFeedback, TheConsistentHessianErrsLess) {
  for (const uint64_t seed : {1, 2, 3}) {
    const Layer layer = random_layer(128, 256, seed, 0.7);
    const auto format = trellis_of("trellis:2:mul1:l12");
    const auto loss = [&](bool consistent, bool outputs, bool inputs) {
      return round_trellis_feedback(layer.view(), format, layer.hessian, {}, {consistent, outputs, inputs})
          .report;
    };
    const RoundingReport plain = loss(false, false, false);
    const RoundingReport consistent = loss(true, false, false);
    const RoundingReport outputs = loss(true, true, false);
    const RoundingReport inputs = loss(true, false, true);
    const RoundingReport refitted = loss(true, true, true);
    EXPECT_LT(consistent.proxy_loss, plain.proxy_loss);
    EXPECT_LE(outputs.proxy_loss, consistent.proxy_loss * 1.0001);
    EXPECT_LT(inputs.proxy_loss, consistent.proxy_loss);
    EXPECT_LT(refitted.proxy_loss, outputs.proxy_loss);
    RecordProperty("with_outputs", text_of(outputs.proxy_loss / consistent.proxy_loss));
    RecordProperty("with_both", text_of(refitted.proxy_loss / consistent.proxy_loss));
    EXPECT_LT(refitted.proxy_loss, 0.8 * refitted.proxy_loss_nearest);
    EXPECT_EQ(refitted.method, "gptq");
    EXPECT_EQ(refitted.tokens, 512);
  }
}

TEST(TrellisFeedback, IsWhatErrorFeedbackDoes) {
  const Layer layer = random_layer(128, 128, 4, 0.3);
  const auto format = trellis_of("trellis:3:3inst:l10");
  const Rounded direct = round_trellis_feedback(layer.view(), format, layer.hessian);
  for (const int threads : {1, 2, 4}) {
    ErrorFeedbackOptions options;
    options.threads = threads;
    const Rounded through = round_error_feedback(layer.view(), format, layer.hessian, options);
    EXPECT_TRUE(same_planes(direct.tensor, through.tensor));
    EXPECT_EQ(direct.report.proxy_loss, through.report.proxy_loss);
  }
}

TEST(TrellisFeedback, TakesAnySize) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {40, 130}, {300, 70}, {129, 257}}) {
    const Layer layer = random_layer(n, k, 5, 0.3);
    const Rounded rounded =
        round_error_feedback(layer.view(), trellis_of("trellis:4:mul1:l10"), layer.hessian);
    validate(rounded.tensor);
    EXPECT_LT(rounded.report.proxy_loss, 1.05 * rounded.report.proxy_loss_nearest) << n << " " << k;
    EXPECT_TRUE(std::isfinite(rounded.report.mean_squared_error));
  }
  const Layer none{{}, 0, 64, random_layer(1, 64, 6, 0.1).hessian};
  validate(round_error_feedback(none.view(), trellis_of("trellis:2:hyb:l15"), none.hessian).tensor);
}

TEST(TrellisFeedback, DeadColumnsBecomeZero) {
  Layer layer = random_layer(64, 128, 7, 0.3);
  std::vector<double> sum(128 * 128);
  for (int64_t r = 0; r < 128; ++r) {
    for (int64_t c = 0; c < 128; ++c) {
      sum[static_cast<size_t>(r * 128 + c)] = r == 9 || c == 9 ? 0 : layer.hessian.sum()(r, c);
    }
  }
  const Hessian hessian(MatrixView<const double>(sum.data(), 128, 128), 256);
  const Rounded rounded = round_error_feedback(layer.view(), trellis_of("trellis:2:mul1:l10"), hessian);
  EXPECT_EQ(rounded.report.dead_columns, 1);
  std::vector<float> decoded(64 * 128);
  dequantize(rounded.tensor, {decoded.data(), 64, 128});
  for (int64_t r = 0; r < 64; ++r) EXPECT_EQ(decoded[static_cast<size_t>(r * 128 + 9)], 0);
}

TEST(TrellisFeedback, Refuses) {
  const Layer layer = random_layer(128, 128, 8, 0.3);
  EXPECT_THROW(round_trellis_feedback(layer.view(), trellis_of("trellis:2:mul1:plain:l10"), layer.hessian),
               InvalidArgument);
  EXPECT_THROW(round_trellis_feedback(layer.view(), nullptr, layer.hessian), InvalidArgument);
  ErrorFeedbackOptions options;
  options.scale_search = ScaleSearch{};
  EXPECT_THROW(round_error_feedback(layer.view(), trellis_of("trellis:2:mul1:l10"), layer.hessian, options),
               InvalidArgument);
  EXPECT_THROW(round_error_feedback(layer.view(), trellis_of("trellis:2:mul1:l10"), Hessian(64)),
               InvalidArgument);
}

TEST(TrellisFeedback, TriesRatios) {
  const auto format = trellis_of("trellis:2:mul1:l10");
  const double best = trellis_best_ratio(4);
  double tried = 0;
  double plain = 0;
  for (const uint64_t seed : {11, 12, 13}) {
    const Layer layer = random_layer(256, 256, seed, 0.3);
    const auto report = [&](std::vector<double> factors, int threads = 0) {
      ErrorFeedbackOptions options;
      options.threads = threads;
      return round_trellis_feedback(layer.view(), format, layer.hessian, options,
                                    {true, true, true, std::move(factors)})
          .report;
    };
    const RoundingReport searched = report({});
    EXPECT_EQ(report({0.75, 0.85, 0.95, 1.05}, 1).proxy_loss, searched.proxy_loss);
    EXPECT_EQ(report({0.75, 0.85, 0.95, 1.05}, 4).proxy_loss, searched.proxy_loss);
    const double factor = searched.trellis_ratio / best;
    EXPECT_GE(factor, 0.749);
    EXPECT_LE(factor, 1.051);
    // What was chosen, taken alone, is the same.
    EXPECT_EQ(report({std::round(factor * 100) / 100}).proxy_loss, searched.proxy_loss);
    EXPECT_EQ(report({1}).trellis_ratio, best);
    tried += searched.proxy_loss;
    plain += report({1}).proxy_loss;
    // Far off, so that a choice between it and a sensible one is plain.
    EXPECT_EQ(report({2.5, 0.9}).trellis_ratio, 0.9 * best);
  }
  EXPECT_LT(tried, plain);
  EXPECT_EQ(round_error_feedback(random_layer(64, 64, 1, 0.1).view(), trellis_of("trellis:4:mul1:l10"),
                                 random_layer(64, 64, 1, 0.1).hessian)
                .report.trellis_ratio,
            0.96 * trellis_best_ratio(8));
  const Layer layer = random_layer(32, 32, 1, 0.1);
  for (const double bad : {0.2, 4.5, std::nan("")}) {
    EXPECT_THROW(round_trellis_feedback(layer.view(), format, layer.hessian, {}, {true, true, true, {bad}}),
                 InvalidArgument);
  }
}

}  // namespace
}  // namespace quantloom
