// Views of memory that somebody else owns: rows of contiguous elements, a stride between rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "quantloom/dtype.hpp"
#include "quantloom/error.hpp"

namespace quantloom {

// A row-major matrix [rows, cols]; row r begins at data + r * stride. stride is in elements.
template <class T>
class MatrixView {
 public:
  MatrixView() = default;
  MatrixView(T* data, int64_t rows, int64_t cols) : MatrixView(data, rows, cols, cols) {}
  MatrixView(T* data, int64_t rows, int64_t cols, int64_t stride)
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  // MatrixView<float> converts to MatrixView<const float>.
  template <class U>
  requires(std::is_const_v<T>&& std::is_same_v<const U, T> && !std::is_const_v<U>)
      MatrixView(const MatrixView<U>& other)  // NOLINT(google-explicit-constructor)
      : MatrixView(other.data(), other.rows(), other.cols(), other.stride()) {}

  T* data() const { return data_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t stride() const { return stride_; }
  T* row(int64_t r) const { return data_ + r * stride_; }
  T& operator()(int64_t r, int64_t c) const { return data_[r * stride_ + c]; }
  MatrixView block(int64_t row, int64_t col, int64_t rows, int64_t cols) const {
    return {data_ + row * stride_ + col, rows, cols, stride_};
  }

 private:
  T* data_ = nullptr;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  int64_t stride_ = 0;
};

// A row-major matrix of float32, float16 or bfloat16 values: weights or activations as the caller has
// them. The library reads it row by row in float32.
class FloatMatrix {
 public:
  FloatMatrix() = default;
  // stride in elements; throws TypeMismatch unless dtype is float32, float16 or bfloat16, and
  // InvalidArgument for a negative size, a stride below cols, or null data with rows * cols > 0.
  FloatMatrix(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride);
  FloatMatrix(MatrixView<const float> view);  // NOLINT(google-explicit-constructor)
  FloatMatrix(MatrixView<float> view)         // NOLINT(google-explicit-constructor)
      : FloatMatrix(MatrixView<const float>(view)) {}

  const void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t stride() const { return stride_; }
  // Copies columns [col, col + count) of row r to `out` as float32.
  void read(int64_t r, int64_t col, int64_t count, float* out) const;

 private:
  const void* data_ = nullptr;
  DType dtype_ = DType::f32;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  int64_t stride_ = 0;
};

// Throws NumericError naming `argument`, the row, the column and the value if any element of `matrix`
// is NaN or infinite.
void require_finite(const FloatMatrix& matrix, std::string_view argument, int threads = 0);

}  // namespace quantloom
