// Encoders in which rows share a scale.
#pragma once

namespace quantloom {

// The rows of each step of ColumnEncoder::rows_per_step() have one scale for a group of columns; fit() takes
// the mean of their factors.
class SharedScales {
 public:
  virtual ~SharedScales() = default;
};

}  // namespace quantloom
