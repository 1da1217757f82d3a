// Keys and queries in the basis that keys are stored in.
#pragma once

#include "quantloom/kv_cache/kv_cache.hpp"

namespace quantloom::kv_cache {

// x H / sqrt(head_dim), in its own dtype or in float32; a Tensor of x's shape.
Tensor rotate_tokens(const KVTokens& x, bool widen);
KVTokens view_of(const Tensor& tokens);

}  // namespace quantloom::kv_cache
