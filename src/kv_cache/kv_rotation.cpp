#include "kv_cache/kv_rotation.hpp"

#include "kv_cache/kv_rows.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/transforms/hadamard.hpp"

namespace quantloom::kv_cache {

KVTokens view_of(const Tensor& tokens) {
  const std::vector<int64_t>& shape = tokens.shape();
  return {tokens.bytes(),
          tokens.dtype(),
          shape[0],
          shape[1],
          shape[2],
          shape[3],
          {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]}};
}

Tensor rotate_tokens(const KVTokens& x, bool widen) {
  Tensor result(widen ? DType::f32 : x.dtype, {x.sequences, x.heads, x.tokens, x.head_dim});
  const int64_t row_bytes = x.head_dim * size_of(result.dtype());
  std::byte* to = result.bytes();
  std::vector<float> row(static_cast<size_t>(x.head_dim));
  for (int64_t s = 0; s < x.sequences; ++s) {
    for (int64_t h = 0; h < x.heads; ++h) {
      for (int64_t t = 0; t < x.tokens; ++t, to += row_bytes) {
        FloatMatrix from(x.row(s, h, t), x.dtype, 1, x.head_dim, x.head_dim);
        if (widen) {
          widen_row(x.dtype, x.row(s, h, t), x.head_dim, row.data());
          from = FloatMatrix(row.data(), DType::f32, 1, x.head_dim, x.head_dim);
        }
        hadamard(from, to, x.head_dim, {.threads = 1});
      }
    }
  }
  return result;
}

}  // namespace quantloom::kv_cache
