// Nearest rounding and error feedback to additive codes on the device against the CPU's.
#include <gtest/gtest.h>

#include <cmath>

#include "quantloom/formats/additive.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding_cases.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;

class AdditiveRoundingCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class AdditiveRoundingCudaSmall : public AdditiveRoundingCuda {};

Hessian hessian_of(int64_t k, uint64_t seed, float correlation) {
  const int64_t tokens = 3 * k + 5;
  std::vector<float> x = normal_values(tokens * k, seed);
  for (size_t i = 1; i < x.size(); ++i) x[i] += correlation * x[i - 1];
  // A dead column.
  for (int64_t t = 0; t < tokens && k > 5; ++t) x[static_cast<size_t>(t * k + 5)] = 0;
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), tokens, k));
  return hessian;
}

// No column's error can be made up for by another.
Hessian diagonal_hessian(int64_t k, uint64_t seed) {
  Hessian hessian(k);
  const std::vector<float> sizes = normal_values(k, seed);
  for (int64_t j = 0; j < k; ++j) {
    std::vector<float> x(static_cast<size_t>(k), 0.0F);
    x[static_cast<size_t>(j)] = 0.5F + std::abs(sizes[static_cast<size_t>(j)]);
    hessian.add(MatrixView<const float>(x.data(), 1, k));
  }
  return hessian;
}

// The format with tables of its own.
std::shared_ptr<const Additive> with_tables(const std::string& spec, uint64_t seed) {
  const std::shared_ptr<const Format> parsed = format_from_spec(spec);
  const auto& format = dynamic_cast<const Additive&>(*parsed);
  const std::vector<float> tables = normal_values(format.codebooks * format.entries() * format.dim(), seed);
  return std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                          format.scale_group, format.scale_dtype, tables);
}

struct Case {
  const char* spec;
  int64_t n;
  int64_t k;  // a multiple of the columns of a block
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {{"additive:1x3:g4", 5, 24},
                                        {"additive:2x3:g4", 20, 20},
                                        {"additive:3x2:g2:f32", 3, 150},
                                        {"additive:2x3:g2x3:scale6", 33, 18},
                                        {"additive:1x4:g1:scale5:bf16", 3, 131},
                                        {"additive:2x4:g16", 2, 304},
                                        {"additive:1x4:g16x1", 30, 17},
                                        {"additive:2x8:g8", 19, 136},
                                        {"additive:1x10:g8", 17, 72},
                                        {"additive:1x1:g8", 1, 160}};
  return all;
}

TEST_F(AdditiveRoundingCudaSmall, NearestCodesAreTheCpusBytes) {
  uint64_t seed = 1;
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.spec);
    // Blocks beyond the last column, too.
    for (const int64_t k : {c.k, c.k + 1}) {
      const auto format = with_tables(c.spec, ++seed);
      const TwinMatrix w(normal_values(c.n * k, ++seed), c.n, k, c.n % 2 == 0 ? DType::bf16 : DType::f32, 3);
      const Hessian hessian = hessian_of(k, ++seed, 0.8F);
      const CudaHessian on_device(hessian);
      PackedTensor packed = poisoned_planes(format, c.n, k);
      CudaNearestOptions options;
      options.hessian = &on_device;
      options.held_out = &on_device;
      const RoundingReport report = round_nearest_cuda(w.device(), packed, options, nullptr);
      NearestOptions of_cpu;
      of_cpu.hessian = &hessian;
      const Rounded expected = round_nearest(w.host(), format, of_cpu);
      EXPECT_EQ(difference(to_host(packed), expected.tensor), "");
      EXPECT_EQ(packed.format->to_json(), expected.tensor.format->to_json());
      EXPECT_NEAR(report.mean_squared_error, expected.report.mean_squared_error,
                  1e-6 * expected.report.mean_squared_error);
      EXPECT_NEAR(report.proxy_loss, expected.report.proxy_loss, 1e-6 * expected.report.proxy_loss);
      EXPECT_EQ(report.held_out_loss, report.proxy_loss);
    }
  }
}

TEST_F(AdditiveRoundingCudaSmall, TablesAreFittedFirst) {
  const TwinMatrix w(normal_values(40 * 64, 5), 40, 64, DType::f32);
  PackedTensor packed = poisoned_planes(format_from_spec("additive:2x4:g8"), 40, 64);
  const RoundingReport report = round_nearest_cuda(w.device(), packed, {}, nullptr);
  const Rounded expected = round_nearest(w.host(), format_from_spec("additive:2x4:g8"));
  validate(to_host(packed));
  EXPECT_NEAR(report.mean_squared_error, expected.report.mean_squared_error,
              0.02 * expected.report.mean_squared_error);
  EXPECT_TRUE(std::isnan(report.proxy_loss));
}

TEST_F(AdditiveRoundingCudaSmall, FeedbackWithoutCorrelationsGivesTheCpusBytes) {
  uint64_t seed = 100;
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.spec);
    const auto format = with_tables(c.spec, ++seed);
    const TwinMatrix w(normal_values(c.n * c.k, ++seed), c.n, c.k, c.n % 2 == 0 ? DType::f16 : DType::f32, 1);
    const Hessian hessian = diagonal_hessian(c.k, ++seed);
    for (const bool act_order : {false, true}) {
      ErrorFeedbackOptions of_cpu;
      of_cpu.act_order = act_order;
      CudaErrorFeedbackOptions options;
      options.act_order = act_order;
      PackedTensor packed = poisoned_planes(format, c.n, c.k);
      static_cast<void>(
          round_error_feedback_cuda(w.device(), packed, CudaHessian(hessian), options, nullptr));
      EXPECT_EQ(difference(to_host(packed), round_error_feedback(w.host(), format, hessian, of_cpu).tensor),
                "");
    }
  }
}

TEST_F(AdditiveRoundingCuda, FeedbackErrsAsOnTheCpu) {
  uint64_t seed = 200;
  for (const Case& c : cases()) {
    const auto format = with_tables(c.spec, ++seed);
    const int64_t n = 40 * c.n;
    const TwinMatrix w(normal_values(n * c.k, ++seed), n, c.k, DType::f32, 2);
    const Hessian hessian = hessian_of(c.k, ++seed, 0.8F);
    const CudaHessian on_device(hessian);
    for (const int64_t block : {int64_t{128}, int64_t{20}}) {
      SCOPED_TRACE(text_of(c.spec, " block ", block));
      ErrorFeedbackOptions of_cpu;
      of_cpu.block = block;
      of_cpu.act_order = block == 128;
      of_cpu.held_out = &hessian;
      CudaErrorFeedbackOptions options;
      options.block = block;
      options.act_order = of_cpu.act_order;
      options.held_out = &on_device;
      PackedTensor packed = poisoned_planes(format, n, c.k);
      const RoundingReport report =
          round_error_feedback_cuda(w.device(), packed, on_device, options, nullptr);
      const RoundingReport expected = round_error_feedback(w.host(), format, hessian, of_cpu).report;
      validate(to_host(packed));
      EXPECT_NEAR(report.proxy_loss, expected.proxy_loss, 0.03 * expected.proxy_loss);
      EXPECT_NEAR(report.proxy_loss_nearest, expected.proxy_loss_nearest, 1e-5 * expected.proxy_loss_nearest);
      EXPECT_EQ(report.held_out_loss, report.proxy_loss);
      EXPECT_EQ(report.method, "gptq");
      EXPECT_EQ(report.act_order, expected.act_order);
      EXPECT_EQ(report.dead_columns, expected.dead_columns);
      EXPECT_EQ(report.damping_tried, expected.damping_tried);
      PackedTensor again = poisoned_planes(format, n, c.k);
      static_cast<void>(round_error_feedback_cuda(w.device(), again, on_device, options, nullptr));
      EXPECT_EQ(difference(to_host(again), to_host(packed)), "");
    }
  }
}

TEST_F(AdditiveRoundingCuda, BeamSearchStartsWithFeedback) {
  const int64_t n = 96;
  const int64_t k = 128;
  const auto format = with_tables("additive:2x5:g8", 7);
  const TwinMatrix w(normal_values(n * k, 8), n, k, DType::f32);
  const Hessian hessian = hessian_of(k, 9, 0.8F);
  const CudaHessian on_device(hessian);
  BeamSearchOptions options;
  options.start = CodeStart::error_feedback;
  options.max_rounds = 0;
  options.refit_steps = 0;
  PackedTensor packed = poisoned_planes(format, n, k);
  const CudaBeamSearched found =
      round_beam_search_cuda(w.device(), packed, on_device, options, nullptr, nullptr);
  const BeamSearched expected = round_beam_search(w.host(), format, hessian, options);
  ASSERT_EQ(found.losses.size(), 1U);
  EXPECT_NEAR(found.losses[0], expected.losses[0], 0.03 * expected.losses[0]);
  EXPECT_NEAR(found.report.proxy_loss_nearest, expected.report.proxy_loss_nearest,
              1e-5 * expected.report.proxy_loss_nearest);
  EXPECT_LT(found.losses[0], found.report.proxy_loss_nearest);
  options.max_rounds = 3;
  options.refit_steps = 5;
  PackedTensor searched = poisoned_planes(format, n, k);
  const CudaBeamSearched better =
      round_beam_search_cuda(w.device(), searched, on_device, options, nullptr, nullptr);
  EXPECT_LT(better.losses.back(), found.losses[0]);
}

TEST_F(AdditiveRoundingCudaSmall, EmptyMatricesAndZeros) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{0, 16}, {3, 0}, {0, 0}}) {
    const TwinMatrix w({}, n, k, DType::f32);
    const auto format = with_tables("additive:2x3:g8", 1);
    PackedTensor packed = poisoned_planes(format, n, k);
    static_cast<void>(round_nearest_cuda(w.device(), packed, {}, nullptr));
    EXPECT_EQ(difference(to_host(packed), round_nearest(w.host(), format).tensor), "");
  }
  const TwinMatrix w(std::vector<float>(6 * 16, 0.0F), 6, 16, DType::f32);
  const auto format = with_tables("additive:2x3:g8", 2);
  PackedTensor packed = poisoned_planes(format, 6, 16);
  static_cast<void>(round_nearest_cuda(w.device(), packed, {}, nullptr));
  EXPECT_EQ(difference(to_host(packed), round_nearest(w.host(), format).tensor), "");
}

TEST_F(AdditiveRoundingCudaSmall, Refusals) {
  TwinMatrix w(normal_values(6 * 24, 3), 6, 24, DType::f32);
  const auto format = with_tables("additive:1x3:g8:scale8", 4);
  PackedTensor packed = poisoned_planes(format, 6, 24);
  const CudaHessian hessian(hessian_of(24, 5, 0.5F));
  const auto feedback = [&](const CudaErrorFeedbackOptions& options) {
    static_cast<void>(round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr));
  };
  CudaNearestOptions nearest;
  nearest.scale_search = ScaleSearch{};
  EXPECT_NE(message_of<Unsupported>([&] {
              static_cast<void>(round_nearest_cuda(w.device(), packed, nearest, nullptr));
            }).find("scale_search"),
            std::string::npos);
  CudaErrorFeedbackOptions options;
  options.scale_search = ScaleSearch{};
  EXPECT_THROW(feedback(options), Unsupported);
  options = {};
  options.static_groups = false;
  EXPECT_NE(message_of<Unsupported>([&] { feedback(options); }).find("static_groups"), std::string::npos);
  options = {};
  options.outliers = OutlierSearch{.percent = 1.0};
  EXPECT_THROW(feedback(options), InvalidArgument);
  options = {};
  options.damping = -1;
  EXPECT_THROW(feedback(options), InvalidArgument);
  const TwinMatrix odd(normal_values(6 * 20, 6), 6, 20, DType::f32);
  PackedTensor odd_planes = poisoned_planes(format, 6, 20);
  const CudaHessian odd_hessian(hessian_of(20, 7, 0.5F));
  EXPECT_NE(
      message_of<InvalidArgument>([&] {
        static_cast<void>(round_error_feedback_cuda(odd.device(), odd_planes, odd_hessian, {}, nullptr));
      }).find("multiple of 8"),
      std::string::npos);
  w.replace(4, 7, NAN);
  EXPECT_NE(message_of<NumericError>([&] { feedback({}); }).find("row 4, column 7"), std::string::npos);
  EXPECT_EQ(difference(to_host(packed), to_host(poisoned_planes(format, 6, 24))), "");
}

}  // namespace
}  // namespace quantloom
