// The product of formats that have no loop of their own over packed codes: rows are decoded a slab at a time,
// in a thread's cache, and multiplied as float32.
#pragma once

#include "quantloom/kernels/matmul.hpp"

namespace quantloom::kernels {

struct PreparedRows : PreparedTensor {
  explicit PreparedRows(PackedTensor tensor) : packed(std::move(tensor)) {}

  int64_t n() const override { return packed.n; }
  int64_t k() const override { return packed.k; }
  int64_t byte_count() const override { return packed.size_in_bits() / 8; }

  PackedTensor packed;  // valid, on the CPU
};

// `packed` is valid and on the CPU; its planes are copied.
std::shared_ptr<const PreparedRows> prepare_rows(const PackedTensor& packed);

// y [m, n] = x [m, k] W^T; shapes are checked.
void multiply_rows(const FloatMatrix& x, const PreparedRows& w, MatrixView<float> y, int threads);

}  // namespace quantloom::kernels
