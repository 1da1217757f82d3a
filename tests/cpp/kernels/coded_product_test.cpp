// Products of coded tensors on the CPU against float64 products of decoded values.
#include "quantloom/kernels/coded_product.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/random_packed.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

PackedTensor packed_of(const char* spec, int64_t n, int64_t k, uint64_t seed) {
  const auto format = std::dynamic_pointer_cast<const GroupedFormat>(format_from_spec(spec));
  return testing::random_packed(n, k, format, seed, false);
}

TEST(CodedProduct, ValuesAreThoseOfThePackedTensor) {
  uint64_t seed = 0;
  for (const char* spec :
       {"uniform:3:g32", "uniform:1:channel", "uniform:5:tensor:sym:f32", "codebook:nf4:g64"}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {17, 100}, {40, 257}, {3, 64}}) {
      SCOPED_TRACE(text_of(spec, " ", n, " x ", k));
      const PackedTensor packed = packed_of(spec, n, k, ++seed);
      const CodedTensor coded = code_packed(packed);
      std::vector<float> expected(static_cast<size_t>(n * k));
      std::vector<float> got(expected.size(), NAN);
      dequantize(packed, {expected.data(), n, k});
      coded.dequantize(0, {got.data(), n, k});
      EXPECT_EQ(got, expected);

      const int64_t m = 3;
      const CounterRandom random(seed);
      std::vector<float> x(static_cast<size_t>(m * k));
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
      std::vector<float> y(static_cast<size_t>(m * n), NAN);
      matmul(MatrixView<const float>(x.data(), m, k), coded, {y.data(), m, n});
      for (const int threads : {1, 2, 4}) {
        std::vector<float> again(y.size(), NAN);
        matmul(MatrixView<const float>(x.data(), m, k), coded, {again.data(), m, n}, threads);
        EXPECT_EQ(again, y);
      }
      for (int64_t t = 0; t < m; ++t) {
        for (int64_t row = 0; row < n; ++row) {
          double sum = 0;
          double size = 0;
          for (int64_t c = 0; c < k; ++c) {
            const double term =
                double{expected[static_cast<size_t>(row * k + c)]} * x[static_cast<size_t>(t * k + c)];
            sum += term;
            size += std::abs(term);
          }
          EXPECT_NEAR(y[static_cast<size_t>(t * n + row)], sum, 1e-6 * size);
        }
      }
    }
  }
}

TEST(CodedProduct, RefusesWhatItDoesNotTake) {
  EXPECT_THROW(code_packed(packed_of("uniform:4:g32:asym", 4, 64, 1)), Unsupported);
  const std::vector<uint8_t> codes{0, 1, 2, 3, 3, 3};
  const CodedMatrix matrix(codes, 2, 3);
  const std::vector<float> values{0, 1, 2, 3};
  const float one = 1;
  const auto make = [&](std::span<const float> table, int64_t scale_rows, int64_t rows, int64_t columns) {
    return CodedTensor(matrix, table, MatrixView<const float>(&one, scale_rows, 1), rows, columns);
  };
  EXPECT_NO_THROW(make(values, 1, 2, 3));
  EXPECT_NO_THROW(make(values, 1, 9, 9));
  EXPECT_THROW(make(std::span(values).first(3), 1, 2, 3), InvalidArgument);
  EXPECT_THROW(make({}, 1, 2, 3), InvalidArgument);
  EXPECT_THROW(make(values, 1, 1, 3), InvalidArgument);
  EXPECT_THROW(make(values, 1, 0, 3), InvalidArgument);
  EXPECT_THROW(make(values, 1, 2, 0), InvalidArgument);
  const std::vector<float> bad{0, 1, 2, NAN};
  EXPECT_THROW(make(bad, 1, 2, 3), InvalidArgument);
  const CodedTensor tensor = make(values, 1, 2, 3);
  std::vector<float> x(4);
  std::vector<float> y(4);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 1, 4), tensor, {y.data(), 1, 2}), InvalidArgument);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 1, 3), tensor, {y.data(), 1, 3}), InvalidArgument);
  EXPECT_THROW(tensor.dequantize(1, {y.data(), 2, 3}), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
