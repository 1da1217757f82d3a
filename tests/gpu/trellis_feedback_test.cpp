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
    const TrellisFeedbackOptions choices{c.consistent, c.refit, c.refit, {0.95}};
    const Rounded cpu = round_trellis_feedback(w.host(), format, hessian, options, choices);

    const CudaHessian device_hessian(hessian);
    const CudaHessian device_held_out(held_out);
    CudaErrorFeedbackOptions device_options;
    device_options.act_order = c.act_order;
    device_options.held_out = &device_held_out;
    PackedTensor packed = poisoned_planes(format, c.n, c.k);
    const RoundingReport report =
        round_trellis_feedback_cuda(w.device(), packed, device_hessian, device_options, choices, nullptr);
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
                0.08 * cpu.report.mean_squared_error);
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
    round_trellis_feedback_cuda(w.device(), again, device_hessian, device_options, choices, nullptr);
    EXPECT_EQ(difference(cuda, to_host(again)), "");
  }
}

TEST_F(TrellisFeedbackCuda, TriesRatiosLikeTheCpu) {
  const int64_t n = 256;
  const int64_t k = 256;
  const TwinMatrix w(uneven_matrix(n, k, 21), n, k, DType::f32);
  const Hessian hessian = correlated_hessian(3 * k, k, 22);
  const CudaHessian device_hessian(hessian);
  for (const char* spec : {"trellis:1:mul1", "trellis:2:mul1", "trellis:4:mul1"}) {
    SCOPED_TRACE(spec);
    const auto format = trellis_of(spec);
    const auto on_device = [&](std::vector<double> factors) {
      PackedTensor packed = poisoned_planes(format, n, k);
      CudaErrorFeedbackOptions options;
      return round_trellis_feedback_cuda(w.device(), packed, device_hessian, options,
                                         {true, true, true, std::move(factors)}, nullptr);
    };
    ErrorFeedbackOptions options;
    options.measure_losses = false;
    const double cpu = round_trellis_feedback(w.host(), format, hessian, options).report.trellis_ratio;
    const RoundingReport report = on_device({});
    RecordProperty(spec, text_of(cpu, " ", report.trellis_ratio));
    EXPECT_NEAR(report.trellis_ratio, cpu, 0.06);
    EXPECT_EQ(on_device({}).trellis_ratio, report.trellis_ratio);
    EXPECT_EQ(on_device({2.5, 0.9}).trellis_ratio, 0.9 * trellis_best_ratio(format->half_bits));
    EXPECT_EQ(on_device({0.7}).trellis_ratio, 0.7 * trellis_best_ratio(format->half_bits));
    EXPECT_THROW(on_device({5.0}), InvalidArgument);
  }
}

TEST_F(TrellisFeedbackCuda, TwoSidedErrsLikeTheCpu) {
  const Case cases[] = {{"trellis:2:mul1", 256, 128, DType::f32, true, true, true},
                        {"trellis:3:mcg", 130, 300, DType::f16, false, true, true},
                        {"trellis:2:octagon", 384, 200, DType::bf16, true, true, false}};
  for (const Case& c : cases) {
    SCOPED_TRACE(text_of(c.format, " ", c.n, " x ", c.k));
    const auto format = trellis_of(c.format);
    const Hessian hessian = correlated_hessian(3 * c.k, c.k, 31);
    const Hessian outputs = correlated_hessian(3 * c.n, c.n, 32);
    const TwinMatrix w(uneven_matrix(c.n, c.k, 33), c.n, c.k, c.dtype, 3);
    const TrellisFeedbackOptions choices{c.consistent, c.refit, c.refit, {0.9}};
    ErrorFeedbackOptions options;
    options.act_order = c.act_order;
    options.output_hessian = &outputs;
    const RoundingReport cpu = round_trellis_feedback(w.host(), format, hessian, options, choices).report;

    const CudaHessian device_hessian(hessian);
    const CudaHessian device_outputs(outputs);
    CudaErrorFeedbackOptions device_options;
    device_options.act_order = c.act_order;
    const auto on_device = [&](const CudaHessian* given, RoundingReport* report) {
      device_options.output_hessian = given;
      PackedTensor packed = poisoned_planes(format, c.n, c.k);
      *report =
          round_trellis_feedback_cuda(w.device(), packed, device_hessian, device_options, choices, nullptr);
      return to_host(packed);
    };
    const auto loss_of = [&](const PackedTensor& packed) {
      std::vector<float> decoded(static_cast<size_t>(c.n * c.k));
      format->decode(packed, 0, {decoded.data(), c.n, c.k});
      return proxy_loss(w.host(), {decoded.data(), c.n, c.k}, hessian, outputs);
    };
    RoundingReport report;
    RoundingReport again;
    RoundingReport one_sided;
    const PackedTensor packed = on_device(&device_outputs, &report);
    EXPECT_NO_THROW(validate(packed));
    EXPECT_EQ(difference(packed, on_device(&device_outputs, &again)), "");
    EXPECT_NEAR(report.two_sided_loss, cpu.two_sided_loss, 0.2 * cpu.two_sided_loss);
    // Nearest rounding's hangs on the one direction that all inputs and outputs share, and on other rings.
    EXPECT_GT(report.two_sided_loss_nearest, report.two_sided_loss);
    EXPECT_NEAR(report.two_sided_loss, loss_of(packed), 1e-3 * report.two_sided_loss);
    EXPECT_NEAR(report.mean_squared_error, cpu.mean_squared_error, 0.05 * cpu.mean_squared_error);
    EXPECT_LT(report.two_sided_loss, 0.9 * loss_of(on_device(nullptr, &one_sided)));
    EXPECT_TRUE(std::isnan(one_sided.two_sided_loss));
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
  const auto refuses = [&](const Hessian& outputs, PackedTensor planes) -> std::string {
    const CudaHessian device_outputs(outputs);
    CudaErrorFeedbackOptions two_sided;
    two_sided.output_hessian = &device_outputs;
    two_sided.damping = 0;
    two_sided.damping_ladder = {};
    try {
      round_error_feedback_cuda(w.device(), planes, hessian, two_sided, nullptr);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refuses(correlated_hessian(64, 16, 6), poisoned_planes(trellis_of("trellis:2:mul1"), 32, 32))
                .find("output_hessian"),
            std::string::npos);
  EXPECT_NE(refuses(correlated_hessian(64, 32, 6), poisoned_planes(format_from_spec("uniform:4:g16"), 32, 32))
                .find("output_hessian"),
            std::string::npos);
  std::vector<double> negative(32 * 32, 0.0);
  for (size_t i = 0; i < 32; ++i) negative[i * 33] = i == 7 ? -1 : 1;
  EXPECT_NE(refuses(Hessian(MatrixView<const double>(negative.data(), 32, 32), 1),
                    poisoned_planes(trellis_of("trellis:2:mul1"), 32, 32))
                .find("output_hessian: got -1 at row 7"),
            std::string::npos);
  PackedTensor uniform = poisoned_planes(format_from_spec("uniform:4:g16"), 32, 32);
  EXPECT_THROW(round_trellis_feedback_cuda(w.device(), uniform, hessian, {}, {}, nullptr), InvalidArgument);
}

TEST_F(TrellisFeedbackCudaSmall, TwoSided) {
  const CudaHessian hessian(correlated_hessian(60, 20, 5));
  const CudaHessian outputs(correlated_hessian(60, 20, 8));
  const TwinMatrix w(normal_matrix(20, 20, 6), 20, 20, DType::f32, 2);
  PackedTensor packed = poisoned_planes(trellis_of("trellis:4:mul1"), 20, 20);
  CudaErrorFeedbackOptions options;
  options.measure_losses = false;
  options.output_hessian = &outputs;
  round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr);
  EXPECT_NO_THROW(validate(to_host(packed)));
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
