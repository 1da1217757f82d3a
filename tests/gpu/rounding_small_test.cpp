// Rounding and calibration on the device at sizes that compute-sanitizer gets through in seconds.
#include <gtest/gtest.h>

#include "quantloom/rounding/nearest.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::correlated_inputs;
using feedback_cases::normal_matrix;

class RoundingCudaSmall : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

TEST_F(RoundingCudaSmall, Nearest) {
  for (const int64_t group : {int64_t{7}, Uniform::kPerChannel, Uniform::kPerTensor}) {
    for (const int bits : {1, 3, 4}) {
      for (const bool symmetric : {true, false}) {
        const auto format = std::make_shared<const Uniform>(bits, group, symmetric);
        const TwinMatrix w(normal_matrix(5, 41, 3), 5, 41, DType::f16, 3);
        NearestOptions cpu;
        CudaNearestOptions options;
        if (bits != 4) cpu.scale_search = options.scale_search = ScaleSearch{33, 0.5, 2.0};
        PackedTensor packed = poisoned_planes(format, 5, 41);
        round_nearest_cuda(w.device(), packed, options, nullptr);
        EXPECT_EQ(difference(round_nearest(w.host(), format, cpu).tensor, to_host(packed)), "");
      }
    }
  }
}

TEST_F(RoundingCudaSmall, Hessian) {
  const TwinMatrix x(correlated_inputs(70, 33, 5), 70, 33, DType::bf16, 1);
  CudaHessian hessian(33);
  hessian.add(x.device(), nullptr);
  const Hessian copy = hessian.to_cpu(nullptr);
  for (int64_t i = 0; i < 33; ++i) {
    for (int64_t j = 0; j < 33; ++j) EXPECT_EQ(copy.sum()(i, j), copy.sum()(j, i));
  }
}

TEST_F(RoundingCudaSmall, ErrorFeedback) {
  const CudaHessian hessian(correlated_hessian(400, 150, 5));
  const TwinMatrix w(normal_matrix(37, 150, 6), 37, 150, DType::f32, 2);
  for (const bool static_groups : {true, false}) {
    const auto format = std::make_shared<const Uniform>(3, 40, false);
    PackedTensor packed = poisoned_planes(format, 37, 150, !static_groups);
    CudaErrorFeedbackOptions options;
    options.static_groups = static_groups;
    options.scale_search = ScaleSearch{8, 0.5, 2.0};
    const RoundingReport report = round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr);
    EXPECT_LT(report.proxy_loss, report.proxy_loss_nearest);
    EXPECT_NO_THROW(validate(to_host(packed)));
  }
}

}  // namespace
}  // namespace quantloom
