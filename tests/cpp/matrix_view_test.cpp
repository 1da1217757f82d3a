#include "quantloom/matrix_view.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "test_matrices.hpp"

namespace quantloom {
namespace {

TEST(FloatMatrix, ReadsEveryDTypeAtAnyAlignmentAndStride) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kCols = 9;
  constexpr int64_t kStride = 13;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int offset = 0; offset < 16; ++offset) {
      std::vector<std::byte> memory(kRows * kStride * 4 + 16);
      std::vector<float> expected;
      const auto values = testing::normal_values(kRows * kStride, 3);
      for (int64_t i = 0; i < kRows * kStride; ++i) {
        const auto bits = dtype == DType::f16 ? f16_from_float(values[i]) : bf16_from_float(values[i]);
        std::byte* at = memory.data() + offset + i * size_of(dtype);
        if (dtype == DType::f32) {
          std::memcpy(at, &values[i], 4);
          expected.push_back(values[i]);
        } else {
          std::memcpy(at, &bits, 2);
          expected.push_back(dtype == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits));
        }
      }
      const FloatMatrix matrix(memory.data() + offset, dtype, kRows, kCols, kStride);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t col = 0; col <= kCols; ++col) {
          std::vector<float> out(static_cast<size_t>(kCols - col) + 1, -7.0F);
          matrix.read(r, col, kCols - col, out.data());
          ASSERT_TRUE(std::equal(out.begin(), out.end() - 1, expected.begin() + r * kStride + col));
          ASSERT_EQ(out.back(), -7.0F);
        }
      }
    }
  }
}

TEST(FloatMatrix, RefusesWhatIsNoMatrixOfFloats) {
  float memory[12] = {};
  EXPECT_NO_THROW(FloatMatrix(memory, DType::f32, 3, 4, 4));
  EXPECT_NO_THROW(FloatMatrix(nullptr, DType::f32, 0, 4, 4));
  EXPECT_NO_THROW(FloatMatrix(nullptr, DType::f32, 4, 0, 0));
  EXPECT_THROW(FloatMatrix(nullptr, DType::f32, 3, 4, 4), InvalidArgument);
  EXPECT_THROW(FloatMatrix(memory, DType::f32, -1, 4, 4), InvalidArgument);
  EXPECT_THROW(FloatMatrix(memory, DType::f32, 3, -4, 4), InvalidArgument);
  EXPECT_THROW(FloatMatrix(memory, DType::f32, 3, 4, 3), InvalidArgument);
  EXPECT_THROW(FloatMatrix(memory, DType::f32, 3, 4, -4), InvalidArgument);
  EXPECT_THROW(FloatMatrix(memory, DType::f32, INT64_MAX / 4, 4, 4), InvalidArgument);
  for (const DType dtype : {DType::f64, DType::i32, DType::i8, DType::boolean}) {
    EXPECT_THROW(FloatMatrix(memory, dtype, 1, 1, 1), TypeMismatch);
  }
}

TEST(FloatMatrix, RequireFiniteNamesTheFirstBadElementWhateverTheThreads) {
  constexpr int64_t kRows = 67;
  constexpr int64_t kCols = 31;
  constexpr int64_t kStride = 40;
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    auto values = testing::normal_values(kRows * kStride, 5);
    const FloatMatrix matrix(MatrixView<const float>(values.data(), kRows, kCols, kStride));
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = kCols; c < kStride; ++c) values[r * kStride + c] = bad;  // between the rows
    }
    EXPECT_NO_THROW(require_finite(matrix, "w"));
    values[50 * kStride + 2] = bad;
    values[33 * kStride + 30] = bad;
    values[33 * kStride + 7] = bad;
    for (const int threads : {1, 2, 4}) {
      try {
        require_finite(matrix, "weights of layer 3", threads);
        FAIL();
      } catch (const NumericError& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find("weights of layer 3"), std::string::npos) << text;
        EXPECT_NE(text.find("row 33, column 7"), std::string::npos) << text;
      }
    }
  }
  const float extremes[] = {std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(),
                            -0.0F, std::numeric_limits<float>::lowest()};
  EXPECT_NO_THROW(require_finite(MatrixView<const float>(extremes, 1, 4), "w"));
  EXPECT_NO_THROW(require_finite(MatrixView<const float>(nullptr, 7, 0), "w"));
}

TEST(MatrixView, BlocksShareTheMemory) {
  float memory[20] = {};
  const MatrixView<float> whole(memory, 4, 4, 5);
  const MatrixView<float> part = whole.block(1, 2, 2, 2);
  part(1, 1) = 3;
  EXPECT_EQ(memory[2 * 5 + 3], 3);
  EXPECT_EQ(part.row(1), memory + 2 * 5 + 2);
  const MatrixView<const float> constant = part;
  EXPECT_EQ(constant(1, 1), 3);
  EXPECT_EQ(constant.stride(), 5);
}

}  // namespace
}  // namespace quantloom
