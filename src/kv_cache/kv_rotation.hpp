// Keys and queries in the basis that keys are stored in.
#pragma once

#include <vector>

#include "quantloom/kv_cache/kv_cache.hpp"

namespace quantloom::kv_cache {

// x H / sqrt(head_dim), in its own dtype or in float32; a Tensor of x's shape.
Tensor rotate_tokens(const KVTokens& x, bool widen);
// Keys without rotary embeddings, in their own dtype: those of sequence s begin at positions[s], which is
// negative where tokens are padding (these become 0).
Tensor turn_back(const KVTokens& keys, const KVRotation& rotation, const std::vector<int64_t>& positions);
// rotate_rows() by plain loops.
void rotate_reference(float* rows, int64_t count, int64_t head_dim, const float* cosines, const float* sines,
                      int64_t half);
KVTokens view_of(const Tensor& tokens);

}  // namespace quantloom::kv_cache
