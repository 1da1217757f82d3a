// Attention of a few query tokens over a cache, straight from its codes.
#pragma once

#include "quantloom/kv_cache/kv_cache.hpp"

namespace quantloom {

// out[s, i, h, :] = sum over t of softmax_t(scale * q[s, h, i] . key[s, t]) value[s, t], with the KV head
// h / (heads / kv_heads), for queries q [sequences, heads, m, head_dim] of the last m tokens of each sequence
// (already appended): query i sees the tokens up to its own. A query that sees none gives zeros.
//
// out: float32 [sequences, m, heads, head_dim], contiguous. Keys and values are decoded exactly as
// KVCache::read() gives them; products and sums are float32 over pieces of 512 tokens (of all, for
// more than 64 queries of a KV head), whose results are merged in order: the same for any number of threads,
// and within 1e-5 of the float64 reference, relative to the largest |value|, where |scale * q . key| stays
// below 100.
//
// Throws TypeMismatch or InvalidArgument naming the argument. threads 0: OpenMP's default.
void attend(const KVCache& cache, const KVTokens& queries, float scale, float* out, int threads = 0);

// What attend() throws of queries and a scale, before anything is appended for them.
void require_queries(const KVShape& shape, const KVTokens& queries, float scale);

// The slow obvious reference, in float64.
void attend_reference(const KVCache& cache, const KVTokens& queries, float scale, double* out);

}  // namespace quantloom
