// The product of a format with outliers: that of the dense format, and the outliers' on top.
#pragma once

#include "quantloom/formats/outliers.hpp"
#include "quantloom/kernels/matmul.hpp"

namespace quantloom::kernels {

struct PreparedOutliers final : PreparedTensor {
  int64_t n() const override { return dense->n(); }
  int64_t k() const override { return dense->k(); }
  int64_t byte_count() const override {
    return dense->byte_count() +
           static_cast<int64_t>(offsets.size() * 8 + columns.size() * sizeof(int32_t) + values.size() * 4);
  }

  std::shared_ptr<const PreparedTensor> dense;
  std::vector<int64_t> offsets;  // [n + 1]; [1] without columns
  std::vector<int32_t> columns;
  std::vector<float> values;
};

// `packed` is valid, on the CPU, and of the format Outliers; `dense`: its dense part, prepared.
std::shared_ptr<const PreparedTensor> prepare_outliers(const PackedTensor& packed,
                                                       std::shared_ptr<const PreparedTensor> dense);

// y [m, n] += x [m, k] S^T with S the outliers alone, in float32; shapes are checked.
void add_outliers(const FloatMatrix& x, const PreparedOutliers& w, MatrixView<float> y, int threads);

}  // namespace quantloom::kernels
