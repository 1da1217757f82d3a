// The loops over the inputs of one token of producers.hpp, before results are rounded to a dtype.
#pragma once

#include <cstdint>

namespace quantloom::activations {

// out = the normalized x; `weight` [count], `bias` [count] or null, centred: layer_norm.
void normalize_row(const float* x, int64_t count, const float* weight, const float* bias, float epsilon,
                   bool centred, float* out);
// out = silu(x); may be x.
void silu_row(const float* x, int64_t count, float* out);

}  // namespace quantloom::activations
