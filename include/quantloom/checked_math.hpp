// Checked size arithmetic: the only way this library computes a size, a count or an offset that
// depends on its input. Each function throws InvalidArgument where the result would overflow.
#pragma once

#include <cstdint>
#include <span>

#include "quantloom/error.hpp"

namespace quantloom {

inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) {
    throw InvalidArgument("size", text_of(a, " + ", b), "a sum below 2^63");
  }
  return result;
}

inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw InvalidArgument("size", text_of(a, " * ", b), "a product below 2^63");
  }
  return result;
}

// ceil(a / b) for a >= 0, b > 0; cannot overflow.
inline int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + static_cast<int64_t>(a % b != 0);
}

// The smallest multiple of `multiple` that is >= a, for a >= 0, multiple > 0.
inline int64_t checked_pad(int64_t a, int64_t multiple) {
  return checked_mul(ceil_div(a, multiple), multiple);
}

// The number of elements of a shape; every dimension must be >= 0. An empty shape has one element.
inline int64_t checked_product(std::span<const int64_t> shape) {
  int64_t result = 1;
  bool empty = false;
  for (const int64_t dimension : shape) {
    if (dimension < 0) {
      throw InvalidArgument("shape", text_of("dimension ", dimension), "dimensions >= 0");
    }
    empty = empty || dimension == 0;
  }
  if (empty) return 0;
  for (const int64_t dimension : shape) result = checked_mul(result, dimension);
  return result;
}

}  // namespace quantloom
