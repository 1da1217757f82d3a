// Sums that do not depend on their order: float64 values as multiples of a power of two, added as integers.
// CUDA makes the same sums, so that both devices give the same centroids.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace quantloom::fit {

// A sum of up to 2^31 integers below 2^62, as high * 2^32 + low.
struct FixedSum {
  int64_t high = 0;
  uint64_t low = 0;  // below 2^63 while adding; below 2^32 once normalized

  void add(int64_t value) {
    high += value >> 32;
    low += static_cast<uint64_t>(value) & 0xffffffffU;
  }
  void add(const FixedSum& other) {
    high += other.high;
    low += other.low;
  }
  double value() const {
    const auto whole = static_cast<double>(high + static_cast<int64_t>(low >> 32));
    return whole * 0x1p32 + static_cast<double>(low & 0xffffffffU);
  }
};

// The exponent e for which values up to `largest` in magnitude, times 2^e, are integers of `bits` bits.
inline int fixed_exponent(double largest, int bits = 61) {
  int exponent = 0;
  static_cast<void>(std::frexp(largest, &exponent));
  return largest > 0 ? std::min(bits - exponent, 1000) : 0;
}

inline int64_t to_fixed(double value, double power) {
  return std::llrint(value * power);
}

}  // namespace quantloom::fit
