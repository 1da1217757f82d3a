#include "kernels/prepared_rows.hpp"

#include <algorithm>

#include "algebra/dense_tiles.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kSlabRows = 32;
// Tokens that are read as float32 at once.
constexpr int64_t kBatchTokens = 512;

}  // namespace

std::shared_ptr<const PreparedRows> prepare_rows(const PackedTensor& packed) {
  PackedTensor copy{packed.format, packed.n, packed.k, {}};
  for (const auto& [name, plane] : packed.planes) {
    Tensor own(plane.dtype(), plane.shape());
    std::copy_n(plane.bytes(), plane.byte_count(), own.bytes());
    copy.planes.emplace(name, std::move(own));
  }
  return std::make_shared<const PreparedRows>(std::move(copy));
}

void multiply_rows(const FloatMatrix& x, const PreparedRows& w, MatrixView<float> y, int threads) {
  const int64_t n = w.n();
  const int64_t k = w.k();
  const auto& tiles = algebra::tiles();
  std::vector<float> tokens(static_cast<size_t>(checked_mul(std::min(x.rows(), kBatchTokens), k)));
  for (int64_t first = 0; first < x.rows(); first += kBatchTokens) {
    const int64_t count = std::min(kBatchTokens, x.rows() - first);
    parallel_for(k > 0 ? count : 0, threads,
                 [&](int64_t token) { x.read(first + token, 0, k, tokens.data() + token * k); });
    parallel_for(ceil_div(n, kSlabRows), threads, [&](int64_t slab) {
      const int64_t row = slab * kSlabRows;
      const int64_t rows = std::min(kSlabRows, n - row);
      for (int64_t token = 0; token < count; ++token) std::fill_n(y.row(first + token) + row, rows, 0.0F);
      if (k == 0) return;
      std::vector<float> decoded(static_cast<size_t>(rows * k));
      w.packed.format->decode(w.packed, row, {decoded.data(), rows, k});
      tiles.gemm_nt_f32(count, rows, k, 1.0F, tokens.data(), k, decoded.data(), k, y.row(first) + row,
                        y.stride());
    });
  }
}

}  // namespace quantloom::kernels
