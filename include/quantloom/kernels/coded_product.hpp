// Products straight from entropy-coded weights: y = x W^T + bias for x [m, k], W [n, k], y [m, n]. W is never
// held decoded as a whole.
#pragma once

#include <memory>
#include <string>

#include "quantloom/formats/coded_matrix.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// W(row, column) = values[code] * scale of the block, computed in float32. Immutable.
class CodedTensor {
 public:
  // values: one for each code that occurs, at most 256, finite. scales [ceil(n / rows_per_scale),
  // ceil(k / columns_per_scale)] of float16, bfloat16 or float32, which are copied. Throws InvalidArgument.
  CodedTensor(CodedMatrix codes, std::span<const float> values, const FloatMatrix& scales,
              int64_t rows_per_scale, int64_t columns_per_scale);

  int64_t n() const { return codes_.n(); }
  int64_t k() const { return codes_.k(); }
  const CodedMatrix& codes() const { return codes_; }
  std::span<const float> values() const { return values_; }  // [256], those of other codes 0
  // scales() points to memory of this object.
  FloatMatrix scales() const;
  int64_t rows_per_scale() const { return rows_per_scale_; }
  int64_t columns_per_scale() const { return columns_per_scale_; }
  int64_t byte_count() const;

  // Rows [first_row, first_row + out.rows()) of W.
  void dequantize(int64_t first_row, MatrixView<float> out, int threads = 0) const;

 private:
  CodedMatrix codes_;
  std::vector<float> values_;
  std::vector<std::byte> scales_;
  DType scale_dtype_ = DType::f32;
  int64_t scale_rows_ = 0;
  int64_t scale_columns_ = 0;
  int64_t rows_per_scale_ = 1;
  int64_t columns_per_scale_ = 1;
};

// Entropy codes the codes of a packed tensor, whose planes are on the CPU. Throws Unsupported for zero points
// that are stored and for groups of columns that are not consecutive.
CodedTensor code_packed(const PackedTensor& packed, const CodedOptions& options = {});

// On the CPU: rows are decoded as they are multiplied, 16 at a time. Accumulation in float32; the result does
// not depend on the thread count. y is overwritten and must not overlap x.
void matmul(const FloatMatrix& x, const CodedTensor& w, MatrixView<float> y, int threads = 0);

// What matmul_cuda() multiplies on a CUDA device: a copy in memory of the device that is current when it is
// made. Every function throws Unsupported in a CPU-only build; `stream` is a cudaStream_t.
class CudaCodedTensor {
 public:
  explicit CudaCodedTensor(const CodedTensor& tensor, void* stream = nullptr);

  int64_t n() const;
  int64_t k() const;
  int64_t byte_count() const;  // of device memory

  // "fused": codes go from their streams straight to the tensor cores; up to 32 tokens, float16 or bfloat16,
  // scales of whole rows or of multiples of 32 columns. "decode": pieces of W are decoded into the workspace
  // and multiplied by cuBLASLt. Which one matmul() picks, if options.kernel is empty.
  std::string kernel(int64_t m, DType dtype, const CudaMatmulOptions& options = {}) const;
  // Bytes of device memory, 256-byte aligned, that matmul() needs as workspace; may be 0.
  int64_t workspace(int64_t m, DType dtype, const CudaMatmulOptions& options = {}) const;
  // As matmul_cuda(): asynchronous, allocates nothing, can be captured in a graph, adds in a fixed order.
  // Table values enter "fused" rounded to dtype, evenly spaced ones exactly.
  void matmul(const CudaMatmulArguments& arguments, const CudaMatmulOptions& options = {}) const;

  // Rows [first_row, first_row + rows) of W to `out`, with `stride` elements between rows, of float16,
  // bfloat16 or float32.
  void dequantize(int64_t first_row, int64_t rows, void* out, DType dtype, int64_t stride,
                  void* stream) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace quantloom
