#include "quantloom/matrix_view.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

template <class FromBits>
void convert(const std::byte* bytes, int64_t count, FromBits from_bits, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes + i * 2, sizeof bits);
    out[i] = from_bits(bits);
  }
}

}  // namespace

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
  if (count <= 0) return;
  // memcpy throughout: the caller's memory may have any alignment.
  const auto* bytes = static_cast<const std::byte*>(data_) + (r * stride_ + col) * size_of(dtype_);
  if (dtype_ == DType::f32) {
    std::memcpy(out, bytes, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  if (dtype_ == DType::bf16) {
    convert(
        bytes, count, [](uint16_t bits) { return float_from_bf16(bits); }, out);
  } else {
    convert(
        bytes, count, [](uint16_t bits) { return float_from_f16(bits); }, out);
  }
}

void require_finite(const FloatMatrix& matrix, std::string_view argument, int threads) {
  constexpr int64_t kRows = 16;
  const int64_t cols = matrix.cols();
  parallel_for(cols > 0 ? ceil_div(matrix.rows(), kRows) : 0, threads, [&](int64_t slab) {
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t r = slab * kRows; r < std::min((slab + 1) * kRows, matrix.rows()); ++r) {
      matrix.read(r, 0, cols, row.data());
      uint32_t largest = 0;  // of the magnitudes' bits: as integers, Inf and NaN are above all others
      for (const float value : row) largest = std::max(largest, std::bit_cast<uint32_t>(value) & 0x7fffffffU);
      if (largest < 0x7f800000U) continue;
      const auto bad = std::find_if(row.begin(), row.end(), [](float v) { return !std::isfinite(v); });
      throw NumericError(text_of(argument, ": got ", *bad, " at row ", r, ", column ", bad - row.begin(),
                                 ", expected finite values"));
    }
  });
}

}  // namespace quantloom
