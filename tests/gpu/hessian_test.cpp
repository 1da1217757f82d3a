#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "quantloom/calibration/cuda_hessian.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_inputs;
using feedback_cases::normal_matrix;

constexpr std::array<DType, 3> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

class HessianCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

// The largest difference, relative to sqrt(H_ii H_jj); checks that the device's matrix is symmetric.
double largest_difference(const Hessian& expected, const Hessian& got) {
  const int64_t k = expected.k();
  double largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      EXPECT_EQ(got.sum()(i, j), got.sum()(j, i)) << i << ", " << j;
      const double scale = std::sqrt(expected.sum()(i, i)) * std::sqrt(expected.sum()(j, j));
      const double error = std::abs(got.sum()(i, j) - expected.sum()(i, j));
      if (scale > 0) {
        largest = std::max(largest, error / scale);
      } else {
        EXPECT_EQ(error, 0);
      }
    }
  }
  return largest;
}

TEST_F(HessianCuda, AgreesWithTheCpu) {
  uint64_t seed = 0;
  for (const int64_t k : {1, 7, 64, 130, 301}) {
    for (const int64_t tokens : {1, 3, 256, 1024, 1025, 2500}) {
      ++seed;
      const TwinMatrix x(correlated_inputs(tokens, k, seed), tokens, k, kFloatTypes[seed % 3],
                         static_cast<int64_t>(seed % 4));
      const TwinMatrix more(normal_matrix(5, k, seed), 5, k, DType::f32);
      Hessian expected(k);
      CudaHessian hessian(k);
      expected.add(x.host());
      hessian.add(x.device(), nullptr);
      EXPECT_LT(largest_difference(expected, hessian.to_cpu(nullptr)), 1e-5) << k << ", " << tokens;
      // Reading it leaves it fit for more tokens.
      expected.add(more.host());
      hessian.add(more.device(), nullptr);
      EXPECT_EQ(hessian.tokens(), tokens + 5);
      EXPECT_LT(largest_difference(expected, hessian.to_cpu(nullptr)), 1e-5) << k << ", " << tokens;
      const std::vector<double> diagonal = hessian.diagonal(nullptr);
      const Hessian copy = hessian.to_cpu(nullptr);
      ASSERT_EQ(diagonal.size(), static_cast<size_t>(k));
      EXPECT_EQ(diagonal, copy.diagonal());
    }
  }
}

// More columns than one panel of the sum, with a ragged end.
TEST_F(HessianCuda, TakesManyInputs) {
  const int64_t k = 4500;
  const int64_t tokens = 40;
  const TwinMatrix x(normal_matrix(tokens, k, 9), tokens, k, DType::bf16);
  Hessian expected(k);
  expected.add(x.host());
  CudaHessian hessian(k);
  hessian.add(x.device(), nullptr);
  EXPECT_LT(largest_difference(expected, hessian.to_cpu(nullptr)), 1e-5);
}

TEST_F(HessianCuda, IsDeterministic) {
  const TwinMatrix x(normal_matrix(3000, 200, 4), 3000, 200, DType::f16);
  std::vector<std::vector<double>> sums;
  for (int repeat = 0; repeat < 3; ++repeat) {
    CudaHessian hessian(200);
    hessian.add(x.device(), nullptr);
    hessian.add(x.device(), nullptr);
    const Hessian copy = hessian.to_cpu(nullptr);
    sums.emplace_back(copy.sum().data(), copy.sum().data() + 200 * 200);
  }
  EXPECT_EQ(sums[0], sums[1]);
  EXPECT_EQ(sums[0], sums[2]);
}

TEST_F(HessianCuda, GoesToTheDeviceAndBack) {
  const Hessian hessian = feedback_cases::correlated_hessian(100, 90, 3);
  const Hessian back = CudaHessian(hessian).to_cpu(nullptr);
  EXPECT_EQ(back.tokens(), hessian.tokens());
  for (int64_t i = 0; i < 90; ++i) {
    for (int64_t j = 0; j < 90; ++j) ASSERT_EQ(back.sum()(i, j), hessian.sum()(i, j));
  }
}

TEST_F(HessianCuda, OrdersStreams) {
  const TwinMatrix x(normal_matrix(2000, 256, 4), 2000, 256, DType::f32);
  CudaHessian expected(256);
  for (int i = 0; i < 6; ++i) expected.add(x.device(), nullptr);
  std::array<cudaStream_t, 3> streams{};
  for (cudaStream_t& stream : streams) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  }
  CudaHessian hessian(256);
  for (int i = 0; i < 6; ++i) hessian.add(x.device(), streams[static_cast<size_t>(i % 3)]);
  EXPECT_EQ(hessian.diagonal(streams[1]), expected.diagonal(nullptr));
  for (cudaStream_t stream : streams) check_cuda(cudaStreamDestroy(stream), "stream");
}

TEST_F(HessianCuda, FindsBadValuesOnUse) {
  for (const DType dtype : kFloatTypes) {
    TwinMatrix x(normal_matrix(50, 33, 4), 50, 33, dtype, 1);
    CudaHessian hessian(33);
    hessian.add(x.device(), nullptr);
    x.replace(49, 32, std::numeric_limits<float>::infinity());
    hessian.add(x.device(), nullptr);
    x.replace(2, 3, std::numeric_limits<float>::quiet_NaN());
    hessian.add(x.device(), nullptr);
    for (int use = 0; use < 2; ++use) {
      EXPECT_EQ(message_of<NumericError>([&] { hessian.diagonal(nullptr); }),
                "x: got inf at row 99 of all tokens added, column 32, expected finite values");
    }
  }
}

TEST_F(HessianCuda, RefusesWrongArguments) {
  CudaHessian hessian(33);
  const TwinMatrix x(normal_matrix(5, 32, 4), 5, 32, DType::f32);
  EXPECT_THROW(hessian.add(x.device(), nullptr), InvalidArgument);
  EXPECT_THROW(hessian.diagonal(nullptr), InvalidArgument);
  EXPECT_THROW(CudaHessian(-1), InvalidArgument);
  const std::vector<float> host(33);
  EXPECT_THROW(hessian.add({host.data(), DType::f32, 1, 33, 33}, nullptr), TypeMismatch);
  EXPECT_EQ(hessian.tokens(), 0);
}

}  // namespace
}  // namespace quantloom
