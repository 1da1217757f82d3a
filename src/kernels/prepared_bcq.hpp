// Products with binary coding by look-up tables (LUT-GEMM: Park et al., 2024): for each 8 columns of a token
// a table of all 256 sums of +-x, so that a byte of signs costs one look-up. For few tokens; beyond those,
// rows are decoded.
#pragma once

#include "kernels/prepared_rows.hpp"

namespace quantloom::kernels {

// The most tokens for which look-ups are faster than decoding.
inline constexpr int64_t kLookedUpTokens = 8;

struct PreparedBcq final : PreparedRows {
  using PreparedRows::PreparedRows;

  int64_t byte_count() const override {
    return PreparedRows::byte_count() + static_cast<int64_t>(parameters.size() * sizeof(float));
  }

  // [n, groups, bits + 1]: the scales of a group and its offset (0 without one). Empty if groups are not of
  // consecutive columns in whole bytes: then nothing is looked up.
  std::vector<float> parameters;
};

// `packed` is valid and on the CPU; its planes are copied.
std::shared_ptr<const PreparedBcq> prepare_bcq(const PackedTensor& packed);

// y [m, n] = x [m, k] W^T; shapes are checked.
void multiply_bcq(const FloatMatrix& x, const PreparedBcq& w, MatrixView<float> y, int threads);

}  // namespace quantloom::kernels
