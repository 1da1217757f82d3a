// The loops over the inputs of one token. Inputs and codes are padded: memory for kActivationPadding more
// elements follows `count` inputs, of which any finite value is read, and `count` codes.
#pragma once

#include <cstdint>

#include "activations/activation_grid.hpp"

namespace quantloom::activations {

inline constexpr int64_t kActivationPadding = 16;

// The range of x and 0; false if any value is not finite or too large. Padding must be 0.
bool range_of_row(const float* x, int64_t count, ActivationRange& range);

// codes = clamp(rne(x / scale), low, high) + zero.
struct RowGrid {
  float scale = 1.0F;
  float low = 0.0F;   // integers: the steps of the least
  float high = 0.0F;  // and the largest code
  int zero = 0;
};
void encode_row(const float* x, int64_t count, const RowGrid& grid, int8_t* codes);

// integers = clamp(rne(x / scale), -levels, levels), levels below 2^15.
void round_row(const float* x, int64_t count, float scale, int levels, int32_t* integers);

// Cuts each run of `group_size` integers to `bits` bits behind a shift.
void cut_row(const int32_t* integers, int64_t count, int bits, int64_t group_size, int8_t* codes,
             uint8_t* shifts);

}  // namespace quantloom::activations
