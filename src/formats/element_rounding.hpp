// Rounding of short runs to each kind of element, one at a time: codes from float32, values from codes. For
// the sets that element_runs.hpp does not take, and as its reference.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "quantloom/formats/elements.hpp"

namespace quantloom::element_rounding {

inline constexpr int kRun = 512;  // elements that are converted, rounded and stored at a time

// 2^exponent for exponents of normal doubles.
inline double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

struct TableRounder {
  explicit TableRounder(const TableElements& table)
      : boundaries(table.boundaries.data()),
        values(table.values.data()),
        boundary_count(static_cast<int64_t>(table.boundaries.size())) {}

  void codes(const float* x, int count, uint32_t* out) const {
    for (int i = 0; i < count; ++i) {
      int64_t first = 0;  // boundaries before `first` are below x
      for (int64_t length = boundary_count; length > 0;) {
        const int64_t half = (length + 1) / 2;
        first += x[i] > boundaries[first + half - 1] ? half : 0;
        length -= half;
      }
      out[i] = static_cast<uint32_t>(first);
    }
  }
  float value(uint32_t code) const { return values[code]; }

  const float* boundaries;
  const float* values;
  int64_t boundary_count;
};

// All steps are exact in float64.
struct FloatRounder {
  explicit FloatRounder(const FloatElements& format)
      : mantissa_bits(format.mantissa_bits),
        bias(1 << (format.exponent_bits - 1)),
        has_sign(format.has_sign),
        rounding(format.rounding),
        largest_code((uint32_t{1} << (format.exponent_bits + format.mantissa_bits)) - 1),
        zero_code(has_sign ? largest_code : 0),
        largest(magnitude(largest_code)) {}

  void codes(const float* x, int count, uint32_t* out) const {
    for (int i = 0; i < count; ++i) out[i] = code(x[i]);
  }
  uint32_t code(float x) const {
    const double size = std::fabs(static_cast<double>(x));
    if (!(size > 0) || (x < 0 && !has_sign)) return zero_code;
    const uint32_t place = size >= largest ? largest_code : place_of(size);
    return x < 0 ? zero_code - place : zero_code + place;
  }
  float value(uint32_t code) const {
    return code >= zero_code ? static_cast<float>(magnitude(code - zero_code))
                             : -static_cast<float>(magnitude(zero_code - code));
  }

  // The place among the values >= 0, by the steps of the binade that the number is in.
  uint32_t place_of(double size) const {
    const int exponent = static_cast<int>(std::bit_cast<uint64_t>(size) >> 52) - 1023;
    const int binade = exponent < 1 - bias ? 1 - bias : exponent;
    const double steps = size * power_of_two(mantissa_bits - binade);
    const double rounded = rounding == FloatRounding::nearest  ? std::ceil(steps - 0.5)
                           : rounding == FloatRounding::to_inf ? std::ceil(steps)
                                                               : std::floor(steps);
    // The first binade begins at place 0; each further one continues where the one before ends.
    return (static_cast<uint32_t>(binade - 1 + bias) << mantissa_bits) + static_cast<uint32_t>(rounded);
  }
  double magnitude(uint32_t place) const {
    const uint32_t field = place >> mantissa_bits;
    const uint32_t fraction = place & ((uint32_t{1} << mantissa_bits) - 1);
    const int exponent = field == 0 ? 1 - bias : static_cast<int>(field) - bias;
    const uint32_t steps = field == 0 ? fraction : fraction + (uint32_t{1} << mantissa_bits);
    return steps * power_of_two(exponent - mantissa_bits);
  }

  int mantissa_bits;
  int bias;
  bool has_sign;
  FloatRounding rounding;
  uint32_t largest_code;
  uint32_t zero_code;
  double largest;
};

struct IntRounder {
  explicit IntRounder(const IntElements& format)
      : offset(format.symmetric && format.count % 2 == 0 ? 0.5 : 0.0),
        lowest(format.symmetric ? -0.5 * static_cast<double>(format.count - 1)
                                : -std::floor(0.5 * static_cast<double>(format.count))),
        top(static_cast<double>(format.count - 1)) {}

  void codes(const float* x, int count, uint32_t* out) const {
    for (int i = 0; i < count; ++i) {
      const double place = std::nearbyint(static_cast<double>(x[i]) + offset) - offset - lowest;
      const double clipped = place > 0 ? (place < top ? place : top) : 0.0;  // NaN: 0
      out[i] = static_cast<uint32_t>(static_cast<int64_t>(clipped));
    }
  }
  float value(uint32_t code) const { return static_cast<float>(lowest + static_cast<double>(code)); }

  double offset;
  double lowest;
  double top;
};

struct PowerRounder {
  explicit PowerRounder(const PowerElements& format)
      : lowest(1 - static_cast<int>(format.count / 2)),
        highest(std::min<int>(lowest + static_cast<int>(format.count) - 1, 127)) {}

  void codes(const float* x, int count, uint32_t* out) const {
    for (int i = 0; i < count; ++i) {
      int exponent = lowest;
      if (x[i] > 0) {
        const uint64_t bits = std::bit_cast<uint64_t>(static_cast<double>(x[i]));
        exponent = static_cast<int>(bits >> 52) - 1023 + ((bits << 12) != 0 ? 1 : 0);
        exponent = exponent < lowest ? lowest : (exponent > highest ? highest : exponent);
      }
      out[i] = static_cast<uint32_t>(exponent - lowest);
    }
  }
  float value(uint32_t code) const {
    return static_cast<float>(power_of_two(std::min(lowest + static_cast<int>(code), highest)));
  }

  int lowest;
  int highest;
};

// The interface of element_runs.hpp around a rounder.
template <class Rounder>
struct OneByOne {
  Rounder rounder;

  void codes(const float* x, int count, uint32_t* out) const {
    rounder.codes(x, count, out);
    for (int i = 0; i < count; ++i) out[i] = std::isnan(x[i]) ? 0 : out[i];
  }
  void values(const uint32_t* codes, int count, float* out) const {
    for (int i = 0; i < count; ++i) out[i] = rounder.value(codes[i]);
  }
};

}  // namespace quantloom::element_rounding
