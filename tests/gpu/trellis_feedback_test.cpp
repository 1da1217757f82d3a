// Rounding to a rotated trellis on the device against the CPU. Rings are searched with float16 costs there
// and sums are taken in another order. Fitted scales agree to a float16 rounding, mean squared errors to a
// few percent. Losses of such small matrices hang on few directions of the Hessian and agree less; refitted
// scales hang on the codes, and are not compared.
#include "quantloom/rounding/trellis_feedback.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "quantloom/rounding/nearest.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::normal_matrix;

class TrellisFeedbackCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few rings: this suite also runs under compute-sanitizer.
class TrellisFeedbackCudaSmall : public TrellisFeedbackCuda {};

std::shared_ptr<const Trellis> trellis_of(const std::string& spec) {
  return std::dynamic_pointer_cast<const Trellis>(format_from_spec(spec));
}

// Rows and columns of different sizes.
std::vector<float> uneven_matrix(int64_t n, int64_t k, uint64_t seed) {
  std::vector<float> values = normal_matrix(n, k, seed);
  const CounterRandom random(seed + 1);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const double size = std::exp(
          0.4 * (random.normal(static_cast<uint64_t>(r)) + random.normal(static_cast<uint64_t>(100000 + c))));
      values[static_cast<size_t>(r * k + c)] *= static_cast<float>(0.02 * size);
    }
  }
  return values;
}

void expect_scales_agree(const PackedTensor& a, const PackedTensor& b, const char* name) {
  const auto left = a.plane(name).values<uint16_t>();
  const auto right = b.plane(name).values<uint16_t>();
  ASSERT_EQ(left.size(), right.size());
  for (size_t i = 0; i < left.size(); ++i) {
    const float expected = float_from_f16(left[i]);
    ASSERT_NEAR(float_from_f16(right[i]), expected, 0.001F * std::fabs(expected)) << name << " " << i;
  }
}

struct Case {
  const char* format;
  int64_t n;
  int64_t k;
  DType dtype;
  bool act_order;
  bool consistent;
  bool refit;
};

TEST_F(TrellisFeedbackCuda, ErrsLikeTheCpu) {
  const Case cases[] = {{"trellis:2:mul1", 128, 256, DType::f32, true, true, true},
                        {"trellis:3:3inst", 200, 300, DType::f16, true, true, false},
                        {"trellis:4:mcg", 300, 129, DType::bf16, false, true, true},
                        {"trellis:2.5:mul1", 128, 128, DType::f32, true, false, true},
                        {"trellis:2:octagon", 140, 256, DType::f32, false, true, true},
                        {"trellis:1:hyb", 16, 144, DType::f32, true, true, true}};
  for (const Case& c : cases) {
    SCOPED_TRACE(text_of(c.format, " ", c.n, " x ", c.k));
    const auto format = trellis_of(c.format);
    const Hessian hessian = correlated_hessian(3 * c.k, c.k, 11);
    const Hessian held_out = correlated_hessian(2 * c.k, c.k, 12);
    const TwinMatrix w(uneven_matrix(c.n, c.k, 7), c.n, c.k, c.dtype, 5);
    ErrorFeedbackOptions options;
    options.act_order = c.act_order;
    options.held_out = &held_out;
    const Rounded cpu =
        round_trellis_feedback(w.host(), format, hessian, options, {c.consistent, c.refit, c.refit});

    const CudaHessian device_hessian(hessian);
    const CudaHessian device_held_out(held_out);
    CudaErrorFeedbackOptions device_options;
    device_options.act_order = c.act_order;
    device_options.held_out = &device_held_out;
    PackedTensor packed = poisoned_planes(format, c.n, c.k);
    const RoundingReport report = round_trellis_feedback_cuda(
        w.device(), packed, device_hessian, device_options, {c.consistent, c.refit, c.refit}, nullptr);
    const PackedTensor cuda = to_host(packed);
    EXPECT_NO_THROW(validate(cuda));
    if (!c.refit) {
      expect_scales_agree(cpu.tensor, cuda, "input_scales");
      expect_scales_agree(cpu.tensor, cuda, "output_scales");
    }
    EXPECT_EQ(report.method, "gptq");
    EXPECT_EQ(report.damping, cpu.report.damping);
    EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 0.2 * cpu.report.proxy_loss);
    EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest,
                0.3 * cpu.report.proxy_loss_nearest);
    EXPECT_NEAR(report.held_out_loss, cpu.report.held_out_loss, 0.2 * cpu.report.held_out_loss);
    EXPECT_NEAR(report.mean_squared_error, cpu.report.mean_squared_error,
                0.04 * cpu.report.mean_squared_error);
    EXPECT_LT(report.proxy_loss, report.proxy_loss_nearest);

    // The report's losses are those of the planes.
    std::vector<float> decoded(static_cast<size_t>(c.n * c.k));
    format->decode(cuda, 0, {decoded.data(), c.n, c.k});
    double squares = 0;
    std::vector<float> row(static_cast<size_t>(c.k));
    for (int64_t r = 0; r < c.n; ++r) {
      w.host().read(r, 0, c.k, row.data());
      for (int64_t i = 0; i < c.k; ++i) {
        const double error = double{row[static_cast<size_t>(i)]} - decoded[static_cast<size_t>(r * c.k + i)];
        squares += error * error;
      }
    }
    EXPECT_NEAR(report.mean_squared_error, squares / static_cast<double>(c.n * c.k),
                1e-5 * report.mean_squared_error);

    PackedTensor again = poisoned_planes(format, c.n, c.k);
    round_trellis_feedback_cuda(w.device(), again, device_hessian, device_options,
                                {c.consistent, c.refit, c.refit}, nullptr);
    EXPECT_EQ(difference(cuda, to_host(again)), "");
  }
}

TEST_F(TrellisFeedbackCuda, NearestErrsLikeTheCpu) {
  for (const char* spec : {"trellis:2:mul1", "trellis:3.5:1mad", "trellis:1:rptc2"}) {
    SCOPED_TRACE(spec);
    const auto format = trellis_of(spec);
    const int64_t n = 200;
    const int64_t k = 260;
    const TwinMatrix w(uneven_matrix(n, k, 9), n, k, DType::f16, 1);
    const Hessian hessian = correlated_hessian(2 * k, k, 3);
    NearestOptions options;
    options.hessian = &hessian;
    const Rounded cpu = round_nearest(w.host(), format, options);
    const CudaHessian device_hessian(hessian);
    CudaNearestOptions device_options;
    device_options.hessian = &device_hessian;
    PackedTensor packed = poisoned_planes(format, n, k);
    const RoundingReport report = round_nearest_cuda(w.device(), packed, device_options, nullptr);
    const PackedTensor cuda = to_host(packed);
    expect_scales_agree(cpu.tensor, cuda, "input_scales");
    expect_scales_agree(cpu.tensor, cuda, "output_scales");
    EXPECT_NEAR(report.mean_squared_error, cpu.report.mean_squared_error,
                0.02 * cpu.report.mean_squared_error);
    EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 0.3 * cpu.report.proxy_loss);
  }
}

TEST_F(TrellisFeedbackCuda, DeadColumnsAndEmptyMatrices) {
  const int64_t n = 40;
  const int64_t k = 200;
  std::vector<double> sum(static_cast<size_t>(k * k), 0.0);
  for (int64_t i = 0; i < k; ++i)
    sum[static_cast<size_t>(i * k + i)] = i % 3 == 0 || i < 64 ? 0.0 : 1.0 + static_cast<double>(i);
  const Hessian hessian(MatrixView<const double>(sum.data(), k, k), 10);
  const CudaHessian device_hessian(hessian);
  const auto format = trellis_of("trellis:4:mul1");
  const TwinMatrix w(normal_matrix(n, k, 2), n, k, DType::f32);
  PackedTensor packed = poisoned_planes(format, n, k);
  const RoundingReport report = round_error_feedback_cuda(w.device(), packed, device_hessian, {}, nullptr);
  EXPECT_EQ(report.dead_columns, 64 + (k - 64) / 3);
  const PackedTensor cuda = to_host(packed);
  std::vector<float> decoded(static_cast<size_t>(n * k));
  format->decode(cuda, 0, {decoded.data(), n, k});
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      if (sum[static_cast<size_t>(c * k + c)] == 0) {
        ASSERT_EQ(decoded[static_cast<size_t>(r * k + c)], 0.0F);
      }
    }
  }
  const TwinMatrix none({}, 0, k, DType::f32);
  PackedTensor empty = poisoned_planes(format, 0, k);
  EXPECT_NO_THROW(round_error_feedback_cuda(none.device(), empty, device_hessian, {}, nullptr));
  EXPECT_NO_THROW(validate(to_host(empty)));
}

TEST_F(TrellisFeedbackCuda, RefusesWhatItDoesNotTake) {
  const TwinMatrix w(normal_matrix(32, 32, 2), 32, 32, DType::f32);
  const CudaHessian hessian(correlated_hessian(64, 32, 5));
  for (const char* spec : {"trellis:2:mul1:plain", "trellis:2:mul1:l14"}) {
    PackedTensor packed = poisoned_planes(trellis_of(spec), 32, 32);
    EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, hessian, {}, nullptr), Unsupported) << spec;
    EXPECT_THROW(round_nearest_cuda(w.device(), packed, {}, nullptr), Unsupported) << spec;
  }
  PackedTensor packed = poisoned_planes(trellis_of("trellis:2:mul1"), 32, 32);
  CudaErrorFeedbackOptions searching;
  searching.scale_search = ScaleSearch{};
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, hessian, searching, nullptr), InvalidArgument);
  TwinMatrix broken(normal_matrix(32, 32, 2), 32, 32, DType::f32);
  broken.replace(3, 4, std::nanf(""));
  EXPECT_THROW(round_error_feedback_cuda(broken.device(), packed, hessian, {}, nullptr), NumericError);
  const CudaHessian other(correlated_hessian(64, 16, 5));
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, other, {}, nullptr), InvalidArgument);
  PackedTensor uniform = poisoned_planes(format_from_spec("uniform:4:g16"), 32, 32);
  EXPECT_THROW(round_trellis_feedback_cuda(w.device(), uniform, hessian, {}, {}, nullptr), InvalidArgument);
}

TEST_F(TrellisFeedbackCudaSmall, Feedback) {
  const CudaHessian hessian(correlated_hessian(60, 20, 5));
  const TwinMatrix w(normal_matrix(20, 20, 6), 20, 20, DType::f32, 2);
  const auto format = trellis_of("trellis:4:mul1");
  PackedTensor packed = poisoned_planes(format, 20, 20);
  CudaErrorFeedbackOptions options;
  options.measure_losses = false;
  round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr);
  EXPECT_NO_THROW(validate(to_host(packed)));
}

}  // namespace
}  // namespace quantloom
