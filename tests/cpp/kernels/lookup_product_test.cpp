#include <gtest/gtest.h>

#include "kernels/prepared_lookups.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::normal_values;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

void check(const char* spec, int64_t n, int64_t k) {
  const std::vector<float> w = normal_values(n * k, static_cast<uint64_t>(n * 7 + k));
  const PackedTensor packed = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
  const auto prepared = prepare(packed, 2);
  ASSERT_NE(dynamic_cast<const kernels::PreparedLookups*>(prepared.get()), nullptr);
  EXPECT_EQ(prepared->n(), n);
  EXPECT_EQ(prepared->k(), k);
  for (const int64_t m : {1, 2, 7, 9, 33}) {
    SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "] tokens ", m));
    const std::vector<float> x = normal_values(m * k, 3);
    std::vector<float> expected(static_cast<size_t>(m * n));
    matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
    std::vector<float> first;
    for (const int threads : {1, 2, 4}) {
      // Rows of y have a gap, which nobody writes.
      std::vector<float> y(static_cast<size_t>(m * (n + 3)), -77.0F);
      matmul(view(x, m, k), *prepared, {y.data(), m, n, n + 3}, {.threads = threads});
      for (int64_t t = 0; t < m; ++t) {
        for (int64_t r = 0; r < n; ++r)
          ASSERT_NEAR(y[t * (n + 3) + r], expected[t * n + r], 2e-5 * static_cast<double>(k));
        for (int64_t r = n; r < n + 3; ++r) ASSERT_EQ(y[t * (n + 3) + r], -77.0F);
      }
      if (first.empty()) first = y;
      ASSERT_EQ(first, y);
    }
  }
}

TEST(LookupProduct, EqualsTheDecodedProduct) {
  for (const char* spec :
       {"additive:2x8:g8", "additive:4x4:g8", "additive:5x3:g4:scale12", "additive:1x7:g3",
        "additive:8x1:g2x2:scale4:bf16", "additive:3x2:g8x2:f32", "vector_codebook:256x4:g16",
        "vector_codebook:3x100x8:channel", "vector_codebook:5x2:tensor:f32"}) {
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {17, 33}, {45, 100}})
      check(spec, n, k);
  }
  check("additive:2x8:g8", 1100, 300);  // more than one piece
  check("additive:2x6:g2x4", 1100, 72);
}

TEST(LookupProduct, LeavesWideCodesToRows) {
  const std::vector<float> w = normal_values(16 * 32, 1);
  for (const char* spec : {"additive:1x9:g4", "vector_codebook:257x4:g16"}) {
    const PackedTensor packed = round_nearest(view(w, 16, 32), format_from_spec(spec)).tensor;
    EXPECT_EQ(dynamic_cast<const kernels::PreparedLookups*>(prepare(packed).get()), nullptr);
  }
}

}  // namespace
}  // namespace quantloom
