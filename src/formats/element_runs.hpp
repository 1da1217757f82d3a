// The SIMD loops of rounding to elements, over short runs in buffers of whole vectors: `count` is a multiple
// of kRunVector. Every instruction set computes the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "quantloom/formats/elements.hpp"

namespace quantloom::element_runs {

inline constexpr int kRunVector = 16;

// x / scale / factor, without the first division where a scale is 0. `scales` is null for none.
void divide_run(float* x, const float* scales, float factor, int count);
// value * factor * scale, or x where that is NaN. `scales` is null for none.
void multiply_run(float* values, const float* x, const float* scales, float factor, int count);

// The largest magnitudes above and below zero as bits of float32, which order them like numbers, with NaN
// above all.
struct Extremes {
  int32_t positive = 0;
  int32_t negative = 0;
};
Extremes extremes(const float* x, int64_t count);  // any count

// A table for searches by halves: level l holds the boundaries that are met after l steps, in order, so that
// short levels and short tables stay in registers.
class BoundaryTable {
 public:
  static constexpr int64_t kMostBoundaries = (int64_t{1} << 16) - 1;

  // At most kMostBoundaries boundaries.
  explicit BoundaryTable(const TableElements& table);
  // Boundaries below x; 0 for NaN.
  void codes(const float* x, int count, uint32_t* out) const;
  // Codes below the number of values.
  void values(const uint32_t* codes, int count, float* out) const;

  const float* level(int index) const { return levels_.data() + offsets_[static_cast<size_t>(index)]; }
  int level_count() const { return static_cast<int>(offsets_.size()); }
  const float* table() const { return values_.data(); }
  int64_t value_count() const { return value_count_; }

 private:
  std::vector<float> levels_;  // each at least kRunVector long; boundaries that do not exist are infinite
  std::vector<size_t> offsets_;
  std::vector<float> values_;  // padded to kRunVector
  int64_t value_count_;
};

// Small floats of at most 7 exponent bits, whose subnormals are normal in float32.
struct FloatRuns {
  int mantissa_bits = 0;
  int bias = 0;
  FloatRounding rounding = FloatRounding::nearest;
  bool has_sign = false;
  uint32_t largest_code = 0;
  uint32_t zero_code = 0;
  float largest = 0;

  // As elements.hpp says; 0 for NaN.
  void codes(const float* x, int count, uint32_t* out) const;
  void values(const uint32_t* codes, int count, float* out) const;
};

// At most 2^31 integers: code = round(x + offset) - offset - lowest, clipped; value = lowest + code.
struct IntRuns {
  double offset = 0;
  double lowest = 0;
  double top = 0;

  void codes(const float* x, int count, uint32_t* out) const;
  void values(const uint32_t* codes, int count, float* out) const;
};

}  // namespace quantloom::element_runs
