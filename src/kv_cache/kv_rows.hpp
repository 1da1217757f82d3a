// The vectorized loops over rows of a cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_cache/kv_codes.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/kv_cache/kv_layout.hpp"

namespace quantloom::kv_cache {

// Elements beyond the last one that the loops write, or read as any finite value.
inline constexpr int64_t kRowPadding = 16;
// Bytes that they read beyond a record.
inline constexpr int64_t kRecordPadding = 16;

// decode_reference(), bit for bit. Of a grid, whose codes are below 2^8 or numbers of float16 and scales
// float16, scale * code is exact in float32: a fused multiplication and addition rounds the same.
void decode_rows(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                 float* out, const HeadTables& tables);
// Turns the channels i and i + half, i < half, of each of `count` vectors by the angle of its position:
// cosines and sines [count, half].
void rotate_rows(float* rows, int64_t count, int64_t head_dim, const float* cosines, const float* sines,
                 int64_t half);
// count numbers of `dtype` as float32.
void widen_row(DType dtype, const std::byte* from, int64_t count, float* out);

// What is known of the softmax of one query after some tokens: the largest score, the sum of exp(score -
// largest), and the sum of values with those weights.
struct SoftmaxRow {
  float largest;
  float sum;
};
// Adds `tokens` tokens (at most 64) to the softmax of each of `rows` queries, of which query r sees the first
// visible[r]. Vectors of queries and of `sums` are `stride` apart, a multiple of 16, and queries padded with
// zeros; keys and values [tokens, head_dim] are padded.
void attend_block(const float* queries, int64_t rows, int64_t stride, const int64_t* visible,
                  const float* keys, const float* values, int64_t tokens, int64_t head_dim, SoftmaxRow* state,
                  float* sums);

}  // namespace quantloom::kv_cache
