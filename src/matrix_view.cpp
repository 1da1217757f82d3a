#include "quantloom/matrix_view.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

FloatMatrix::FloatMatrix(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride)
    : data_(data), dtype_(dtype), rows_(rows), cols_(cols), stride_(stride) {
  if (!is_float16_or_32(dtype)) {
    throw TypeMismatch("matrix dtype", name_of(dtype), "float32, float16 or bfloat16");
  }
  if (rows < 0 || cols < 0) {
    throw InvalidArgument("matrix shape", text_of("[", rows, ", ", cols, "]"), "sizes >= 0");
  }
  if (stride < cols) throw InvalidArgument("row stride", text_of(stride), text_of("at least ", cols));
  static_cast<void>(checked_mul(checked_mul(rows, stride), size_of(dtype)));
  if (data == nullptr && rows > 0 && cols > 0) {
    throw InvalidArgument("matrix data", "a null pointer", text_of(rows, " x ", cols, " elements"));
  }
}

FloatMatrix::FloatMatrix(MatrixView<const float> view)
    : FloatMatrix(view.data(), DType::f32, view.rows(), view.cols(), view.stride()) {}

void FloatMatrix::read(int64_t r, int64_t col, int64_t count, float* out) const {
  const int64_t first = r * stride_ + col;
  if (dtype_ == DType::f32) {
    if (count > 0) {
      std::memcpy(out, static_cast<const float*>(data_) + first, static_cast<size_t>(count) * sizeof(float));
    }
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(data_) + first;
  if (dtype_ == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_from_bf16(bits[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = float_from_f16(bits[i]);
  }
}

void require_finite(const FloatMatrix& matrix, std::string_view argument, int threads) {
  parallel_for(matrix.rows(), threads, [&](int64_t r) {
    thread_local std::vector<float> row;
    row.resize(static_cast<size_t>(matrix.cols()));
    matrix.read(r, 0, matrix.cols(), row.data());
    const auto bad = std::find_if(row.begin(), row.end(), [](float v) { return !std::isfinite(v); });
    if (bad != row.end()) {
      throw NumericError(text_of(argument, ": got ", *bad, " at row ", r, ", column ", bad - row.begin(),
                                 ", expected finite values"));
    }
  });
}

}  // namespace quantloom
