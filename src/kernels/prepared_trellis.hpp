// The product of trellises on the CPU: rings are decoded by arithmetic in vectors and multiplied in the
// rotated basis, into which inputs are brought before and out of which outputs are brought after.
#pragma once

#include <vector>

#include "kernels/prepared_strips.hpp"
#include "kernels/trellis_job.hpp"
#include "quantloom/formats/trellis.hpp"

namespace quantloom::kernels {

struct PreparedTrellis final : PreparedTensor {
  int64_t n() const override { return rows; }
  int64_t k() const override { return columns; }
  int64_t byte_count() const override {
    return words.size() +
           4 * static_cast<int64_t>(table.size() + pairs.size() + input_scales.size() + output_scales.size());
  }
  int64_t strip_count() const { return ceil_div(padded_rows, kTrellisOutputs); }

  std::shared_ptr<const Trellis> format;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t padded_rows = 0;  // to whole tiles, and blocks of the rotation
  int64_t padded_columns = 0;
  std::vector<float> input_scales;   // [columns]
  std::vector<float> output_scales;  // [rows]
  std::vector<float> table;          // as TrellisMatrix has them
  std::vector<uint32_t> pairs;
  AlignedBytes words;  // in kernel order
};

// `packed` is valid, a trellis, and on the CPU.
std::shared_ptr<const PreparedTrellis> prepare_trellis(const PackedTensor& packed, int threads);

// True for the codes whose weights are sums of bytes.
bool takes_int8(const PreparedTrellis& w);

// y [m, n] = x [m, k] W^T; shapes are checked, and for int8 activations takes_int8().
void multiply_trellis(const FloatMatrix& x, const PreparedTrellis& w, MatrixView<float> y,
                      Activations activations, int threads);

}  // namespace quantloom::kernels
