// The kernels of cuda/transforms as host code: their index arithmetic needs no GPU to be checked.

// A build with CUDA holds functions of the same names, which launch kernels.
#define cuda cuda_on_cpu

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "emulated_device.hpp"
#include "quantloom/random.hpp"
#include "quantloom/transforms/hadamard.hpp"
#include "transforms/hadamard_dense.cuh"
#include "transforms/hadamard_dense_stream.cuh"
#include "transforms/hadamard_dense_wide.cuh"
#include "transforms/hadamard_walsh.cuh"

namespace quantloom {
namespace {

using cuda::HadamardArguments;
using cuda::HadamardValues;
using cuda::WalshShape;

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::f32
                         : std::is_same_v<T, __half> ? DType::f16
                                                     : DType::bf16;

// Rows of blocks, the CPU's result beside what a kernel makes of them.
template <class T>
class Job {
 public:
  // variant 0: plain; 1: signs and channels; 2: signs, rows that are not aligned to vectors
  Job(int64_t rows, int64_t block, int64_t per_row, bool inverse, int variant) : block_(block) {
    const int64_t cols = block * per_row;
    const int64_t stride = cols + (variant == 2 ? 1 : 16);
    const CounterRandom random(static_cast<uint64_t>(block));
    for (int64_t i = 0; i < rows * stride; ++i) {
      x_.push_back(
          HadamardValues<T>::from_float(static_cast<float>(random.normal(static_cast<uint64_t>(i)))));
    }
    out_ = expected_ = x_;
    signs_ = random_signs(cols, 3);
    for (int64_t i = 0; i < cols; ++i) channels_.push_back(static_cast<float>(random.uniform(1U << 30 | i)));
    arguments.x = x_.data();
    arguments.out = out_.data();
    arguments.x_stride = arguments.out_stride = stride;
    arguments.units = rows * per_row;
    arguments.per_row = per_row;
    arguments.factor = static_cast<float>(0.5 / std::sqrt(static_cast<double>(block)));
    arguments.inverse = inverse;
    arguments.vectors = variant != 2;
    HadamardOptions options;
    options.block = block;
    options.inverse = inverse;
    options.scale = 0.5F;
    if (variant > 0) {
      arguments.signs = signs_.data();
      options.signs = signs_;
    }
    if (variant == 1) {
      arguments.channels = channels_.data();
      options.channel_scale = channels_;
    }
    hadamard(FloatMatrix(x_.data(), kDType<T>, rows, cols, stride), expected_.data(), stride, options);
  }

  void expect_equal() const {
    const double unit = sizeof(T) == 4 ? 3e-6 : kDType<T> == DType::f16 ? 0x1p-10 : 0x1p-7;
    for (size_t i = 0; i < out_.size(); ++i) {
      const double expected = HadamardValues<T>::to_float(expected_[i]);
      ASSERT_NEAR(HadamardValues<T>::to_float(out_[i]), expected, unit * std::abs(expected) + 3e-6)
          << name_of(kDType<T>) << " blocks of " << block_ << " inverse " << arguments.inverse << ", element "
          << i;
    }
  }

  HadamardArguments arguments;

 private:
  int64_t block_;
  std::vector<T> x_;
  std::vector<T> out_;
  std::vector<T> expected_;
  std::vector<uint8_t> signs_;
  std::vector<float> channels_;
};

template <class T, int kLog>
void expect_walsh(int64_t rows, int64_t per_row) {
  using S = WalshShape<T, kLog>;
  for (int variant = 0; variant < 3; ++variant) {
    Job<T> job(rows, int64_t{1} << kLog, per_row, variant != 1, variant);
    const auto blocks = static_cast<int>((rows * per_row + S::kTeams - 1) / S::kTeams);
    emulated::launch(blocks, S::kThreads, 4 * S::kFloats,
                     [&] { cuda::walsh_kernel<T, kLog>(job.arguments); });
    job.expect_equal();
  }
}

template <class T, int kTiles>
void expect_dense(int order, int power) {
  const cuda::DenseShape shape{order, power};
  for (int variant = 0; variant < 3; ++variant) {
    Job<T> job(1, int64_t{order} << power, 2, variant == 1, variant);
    const auto signs = cuda::dense_signs<kTiles>(order, variant == 1);
    const int64_t bytes = 4 * (signs.kWords + order * ((1 << power) + cuda::kDensePadding));
    emulated::launch(2, 64, bytes, [&] { cuda::dense_kernel<T, kTiles>(job.arguments, shape, signs); });
    job.expect_equal();
  }
}

template <class T, int kHalves, int kPower, int kGroups = 0>
void expect_dense_stream(int order) {
  using S = cuda::DenseStream<T, kHalves, kPower, kGroups>;
  for (int variant = 0; variant < 3; ++variant) {
    const int64_t per_row = variant == 1 && kPower < 8 ? 2 : 1;
    Job<T> job(kPower < 9 ? 3 : 2, int64_t{order} << kPower, per_row, variant == 2, variant);
    const auto signs = cuda::dense_signs<S::kTiles>(order, variant == 2);
    const int stages = 2 - variant % 2;
    // Blocks of threads that work through several blocks, some of which change their columns.
    const int blocks = kPower == 8 ? 2 : 1;
    emulated::launch(blocks, S::kThreads, S::bytes(order, stages), [&] {
      cuda::dense_stream_kernel<T, kHalves, kPower, kGroups>(job.arguments, order, stages, signs);
    });
    job.expect_equal();
  }
}

template <class T, int kPower>
void expect_dense_wide(int order) {
  using S = cuda::DenseWide<T, kPower>;
  for (int variant = 0; variant < 3; ++variant) {
    Job<T> job(1, int64_t{order} << kPower, 1 + variant % 2, variant == 2, variant);
    const std::vector<uint32_t> signs = cuda::sign_words(order, variant == 2, (order + 15) / 16);
    emulated::launch(1, S::kThreads, S::bytes(order),
                     [&] { cuda::dense_wide_kernel<T, kPower>(job.arguments, order, signs.data()); });
    job.expect_equal();
  }
}

TEST(HadamardKernels, PowersOfTwoEqualTheCpu) {
  expect_walsh<__half, 4>(3, 2);
  expect_walsh<float, 4>(3, 1);
  expect_walsh<__nv_bfloat16, 5>(5, 1);
  expect_walsh<float, 6>(3, 2);
  expect_walsh<__half, 7>(3, 2);
  expect_walsh<float, 8>(2, 1);
  expect_walsh<__half, 9>(3, 1);
  expect_walsh<__half, 10>(5, 1);
  expect_walsh<float, 10>(2, 1);
  expect_walsh<__nv_bfloat16, 11>(3, 1);
  expect_walsh<float, 11>(1, 1);
  expect_walsh<__half, 12>(1, 2);
  expect_walsh<float, 12>(1, 1);
  expect_walsh<__half, 13>(1, 1);
  expect_walsh<float, 13>(1, 1);
}

TEST(HadamardKernels, LongBlocksEqualTheCpu) {
  const auto expect_ahead = []<class T, int kLog>(std::integral_constant<int, kLog>, T) {
    using S = WalshShape<T, kLog>;
    Job<T> job(2, int64_t{1} << kLog, 1, kLog == 15, 1);
    const int64_t bytes = 4 * S::kFloats + (static_cast<int64_t>(sizeof(T)) << kLog);
    emulated::launch(1, S::kThreads, bytes, [&] { cuda::walsh_ahead_kernel<T, kLog>(job.arguments); });
    job.expect_equal();
  };
  expect_ahead(std::integral_constant<int, 13>(), __half{});
  expect_ahead(std::integral_constant<int, 14>(), __half{});
  expect_ahead(std::integral_constant<int, 14>(), 0.0F);
  expect_ahead(std::integral_constant<int, 15>(), __nv_bfloat16{});
}

TEST(HadamardKernels, DenseOrdersEqualTheCpu) {
  expect_dense<float, 1>(12, 4);
  expect_dense<float, 2>(20, 5);
  expect_dense<float, 2>(28, 7);
  expect_dense<float, 4>(60, 6);
  expect_dense<__half, 7>(108, 5);
  expect_dense<__nv_bfloat16, 11>(172, 4);
  expect_dense<float, 16>(252, 4);
  expect_dense<float, 1>(12, 9);
}

TEST(HadamardKernels, DenseStreamsEqualTheCpu) {
  expect_dense_stream<__half, 2, 4>(12);
  expect_dense_stream<__nv_bfloat16, 3, 4>(20);
  expect_dense_stream<__nv_bfloat16, 2, 5>(12);
  expect_dense_stream<__half, 4, 6>(28);
  expect_dense_stream<__half, 3, 7>(20);
  expect_dense_stream<__half, 3, 8>(20);
  expect_dense_stream<__half, 3, 8, 1>(20);
  expect_dense_stream<__nv_bfloat16, 4, 9>(28);
  expect_dense_stream<__half, 4, 9, 2>(28);
  expect_dense_stream<__half, 3, 10>(20);
  expect_dense_stream<__half, 2, 11>(12);
  expect_dense_stream<float, 2, 4>(12);
  expect_dense_stream<float, 4, 6>(28);
  expect_dense_stream<float, 3, 8>(20);
  expect_dense_stream<float, 2, 10>(12);
}

TEST(HadamardKernels, DenseStreamsOfLargeOrdersEqualTheCpu) {
  expect_dense_stream<__half, 8, 4>(36);
  expect_dense_stream<__nv_bfloat16, 8, 5>(60);
  expect_dense_stream<__half, 8, 8>(44);
  expect_dense_stream<__half, 14, 6>(108);
  expect_dense_stream<__nv_bfloat16, 22, 5>(172);
  expect_dense_stream<__half, 22, 6>(148);
}

TEST(HadamardKernels, WideOrdersEqualTheCpu) {
  expect_dense_wide<__half, 4>(276);
  expect_dense_wide<__nv_bfloat16, 5>(60);
  expect_dense_wide<float, 5>(36);
  expect_dense_wide<__half, 6>(68);
}

// Lanes of a warp meet different banks in each access of the exchanges.
template <class T, int kLog>
void expect_no_bank_conflicts() {
  using S = WalshShape<T, kLog>;
  constexpr int kAll = (1 << kLog) - 1;
  const auto distinct = [](const auto& place) {
    uint32_t banks = 0;
    for (int lane = 0; lane < 32; ++lane) banks |= 1U << (place(lane) % 32);
    return banks == ~0U;
  };
  EXPECT_TRUE(distinct([](int lane) { return S::place(lane << S::kLow); })) << kLog;
  EXPECT_TRUE(distinct([](int lane) {
    return S::place((lane & ((1 << S::kLow) - 1)) | (lane >> S::kLow) << (kLog - S::kTops));
  })) << kLog;
  EXPECT_TRUE(distinct([](int lane) { return S::place(S::deposit(lane, kAll & ~S::kHeldMask)); })) << kLog;
}

TEST(HadamardKernels, ExchangesMeetNoBankTwice) {
  expect_no_bank_conflicts<__half, 10>();
  expect_no_bank_conflicts<__half, 11>();
  expect_no_bank_conflicts<__half, 12>();
  expect_no_bank_conflicts<__half, 13>();
  expect_no_bank_conflicts<__half, 14>();
  expect_no_bank_conflicts<__half, 15>();
  expect_no_bank_conflicts<float, 10>();
  expect_no_bank_conflicts<float, 11>();
  expect_no_bank_conflicts<float, 12>();
  expect_no_bank_conflicts<float, 13>();
  expect_no_bank_conflicts<float, 14>();
  expect_no_bank_conflicts<float, 15>();
}

}  // namespace
}  // namespace quantloom
