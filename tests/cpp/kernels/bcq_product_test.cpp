#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "quantloom/formats/bcq.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "simd_targets.hpp"
// After simd_targets.hpp.
#include <hwy/highway.h>

#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;

// The product against float64 over decoded weights, within float32's rounding: a sum in any order of k terms
// whose parts are offset and scales.
void check_products(const PackedTensor& packed, std::span<const float> x, int64_t m) {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const MatrixView<const float> inputs(x.data(), m, k);
  std::vector<float> expected(static_cast<size_t>(m * n));
  matmul_reference(inputs, packed, {expected.data(), m, n});
  std::vector<float> first;
  for (const int threads : {1, 2, 4}) {
    std::vector<float> y(static_cast<size_t>(m * n), 7.0F);
    matmul(inputs, *prepare(packed, threads), {y.data(), m, n}, {.threads = threads});
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected[i], 2e-6 * std::sqrt(static_cast<double>(k)) * 4) << i;
    }
    if (threads == 1) first = y;
    EXPECT_EQ(y, first);
  }
}

TEST(BcqProduct, IsThatOfTheDecodedMatrix) {
  uint64_t seed = 100;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    for (const std::string spec : {"bcq:3:g128", "bcq:2:g24:offset", "bcq:8:channel", "bcq:1:g32:bf16",
                                   "bcq:2:g20:offset", "bcq:4:g8", "bcq:3:g5:offset:f32", "bcq:5:g160"}) {
      for (const auto& [n, k, m] : std::vector<std::array<int64_t, 3>>{{0, 8, 2},
                                                                       {3, 0, 2},
                                                                       {5, 7, 0},
                                                                       {1, 1, 1},
                                                                       {37, 130, 1},
                                                                       {70, 257, 5},
                                                                       {130, 515, 2},
                                                                       {33, 96, 40}}) {
        SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "], ", m, " tokens, ", hwy::TargetName(target)));
        const auto w = normal_values(n * k, ++seed);
        check_products(round_nearest(MatrixView<const float>(w.data(), n, k), format_from_spec(spec)).tensor,
                       normal_values(m * k, ++seed), m);
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(BcqProduct, TakesPermutedGroups) {
  for (const std::string spec : {"bcq:2:g16", "bcq:3:g50:offset"}) {
    const int64_t n = 40;
    const int64_t k = 150;
    const auto w = normal_values(n * k, 5);
    PackedTensor packed =
        round_nearest(MatrixView<const float>(w.data(), n, k), format_from_spec(spec)).tensor;
    const int64_t width = dynamic_cast<const Bcq&>(*packed.format).group_size;
    Tensor index(DType::i32, {k});
    for (int64_t c = 0; c < k; ++c) {
      index.values<int32_t>()[static_cast<size_t>(c)] = static_cast<int32_t>(c * 37 % k / width);
    }
    packed.planes.emplace("group_index", std::move(index));
    validate(packed);
    check_products(packed, normal_values(6 * k, 6), 6);
  }
}

// Sums of inputs leave float32's range where products need not.
TEST(BcqProduct, TakesHugeAndInfiniteInputs) {
  const int64_t n = 19;
  const int64_t k = 70;
  const auto w = normal_values(n * k, 7);
  std::vector<float> small(w);
  for (float& value : small) value *= 1e-9F;
  const PackedTensor packed =
      round_nearest(MatrixView<const float>(small.data(), n, k), format_from_spec("bcq:2:g20:offset:f32"))
          .tensor;
  std::vector<float> decoded(static_cast<size_t>(n * k));
  dequantize(packed, {decoded.data(), n, k});
  const auto prepared = prepare(packed);
  for (const int64_t m : {1, 4}) {
    std::vector<float> x(static_cast<size_t>(m * k), 3e38F);
    std::vector<float> y(static_cast<size_t>(m * n));
    std::vector<float> expected(y.size());
    matmul_reference(MatrixView<const float>(x.data(), m, k), packed, {expected.data(), m, n});
    matmul(MatrixView<const float>(x.data(), m, k), *prepared, {y.data(), m, n});
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_TRUE(std::isfinite(y[i]));
      EXPECT_NEAR(y[i], expected[i], 1e26);
    }
    x[3] = std::numeric_limits<float>::infinity();
    matmul(MatrixView<const float>(x.data(), m, k), *prepared, {y.data(), m, n});
    for (int64_t row = 0; row < n; ++row) {
      EXPECT_EQ(y[static_cast<size_t>(row)], decoded[static_cast<size_t>(row * k + 3)] > 0 ? x[3] : -x[3]);
    }
    x[3] = std::numeric_limits<float>::quiet_NaN();
    matmul(MatrixView<const float>(x.data(), m, k), *prepared, {y.data(), m, n});
    for (int64_t row = 0; row < n; ++row) EXPECT_TRUE(std::isnan(y[static_cast<size_t>(row)]));
  }
}

}  // namespace
}  // namespace quantloom
