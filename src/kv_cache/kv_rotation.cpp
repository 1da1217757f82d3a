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

void rotate_reference(float* rows, int64_t count, int64_t head_dim, const float* cosines, const float* sines,
                      int64_t half) {
  for (int64_t t = 0; t < count; ++t) {
    float* row = rows + t * head_dim;
    for (int64_t i = 0; i < half; ++i) {
      const float a = row[i];
      const float b = row[half + i];
      row[i] = a * cosines[t * half + i] - b * sines[t * half + i];
      row[half + i] = b * cosines[t * half + i] + a * sines[t * half + i];
    }
  }
}

Tensor turn_back(const KVTokens& keys, const KVRotation& rotation, const std::vector<int64_t>& positions) {
  Tensor result(keys.dtype, {keys.sequences, keys.heads, keys.tokens, keys.head_dim});
  const int64_t half = rotation.rotated / 2;
  const auto dim = static_cast<size_t>(keys.head_dim);
  std::byte* to = result.bytes();
  std::vector<float> row(dim);
  for (int64_t s = 0; s < keys.sequences; ++s) {
    for (int64_t h = 0; h < keys.heads; ++h) {
      for (int64_t t = 0; t < keys.tokens; ++t, to += keys.head_dim * size_of(keys.dtype)) {
        const int64_t position = positions[static_cast<size_t>(s)] + t;
        if (position < 0) continue;
        widen_row(keys.dtype, keys.row(s, h, t), keys.head_dim, row.data());
        for (int64_t i = 0; i < half; ++i) {
          // Some models scale cosines and sines; the inverse divides by the square of that.
          const auto c = static_cast<double>(rotation.cosines[static_cast<size_t>(position * half + i)]);
          const auto v = static_cast<double>(rotation.sines[static_cast<size_t>(position * half + i)]);
          const auto a = static_cast<double>(row[static_cast<size_t>(i)]);
          const auto b = static_cast<double>(row[static_cast<size_t>(half + i)]);
          row[static_cast<size_t>(i)] = static_cast<float>((a * c + b * v) / (c * c + v * v));
          row[static_cast<size_t>(half + i)] = static_cast<float>((b * c - a * v) / (c * c + v * v));
        }
        for (size_t d = 0; d < dim; ++d) {
          if (keys.dtype == DType::f32) {
            reinterpret_cast<float*>(to)[d] = row[d];
          } else {
            reinterpret_cast<uint16_t*>(to)[d] =
                keys.dtype == DType::f16 ? f16_from_float(row[d]) : bf16_from_float(row[d]);
          }
        }
      }
    }
  }
  return result;
}

}  // namespace quantloom::kv_cache
