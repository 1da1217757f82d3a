// Division by a number known before a launch, against the division of the processor.
#include "common/divisor.cuh"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <random>

namespace quantloom::cuda {
namespace {

constexpr int kMost = 0x7FFFFFFF;

void expect_division(int a, int divisor) {
  const Divisor by(divisor);
  ASSERT_EQ(by.quotient(a), a / divisor) << a << " / " << divisor;
  ASSERT_EQ(by.remainder(a), a % divisor) << a << " % " << divisor;
}

TEST(Divisor, DividesAllNumbers) {
  for (int divisor = 1; divisor <= 300; ++divisor) {
    for (int a = 0; a <= 3000; ++a) expect_division(a, divisor);
  }
}

TEST(Divisor, DividesNumbersBesideMultiplesAndLimits) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> bits(0, 30);
  for (int i = 0; i < 200000; ++i) {
    const auto draw = [&] { return static_cast<int>(generator() >> 1) >> bits(generator); };
    const int divisor = std::max(draw(), 1);
    const int a = draw();
    expect_division(a, divisor);
    const int multiple = a - a % divisor;
    expect_division(multiple, divisor);
    if (multiple > 0) expect_division(multiple - 1, divisor);
    expect_division(kMost, divisor);
    expect_division(kMost - 1, divisor);
  }
  expect_division(kMost, kMost);
  expect_division(kMost - 1, kMost);
  expect_division(kMost, 1);
  expect_division(kMost, 1 << 30);
}

}  // namespace
}  // namespace quantloom::cuda
