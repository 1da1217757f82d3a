// What formats share that store one scale for each group of columns; and those of them with scalar codes.
#pragma once

#include "quantloom/formats/format.hpp"

namespace quantloom {

// One scale for each group of columns along in_features.
struct ScaledFormat : Format {
  static constexpr int64_t kPerChannel = -1;  // one group per row
  static constexpr int64_t kPerTensor = -2;   // one group for the whole matrix

  int64_t group_size;  // > 0, kPerChannel or kPerTensor
  DType scale_dtype;   // float16, bfloat16 or float32

  int64_t columns_per_group(int64_t k) const { return group_size > 0 ? group_size : (k > 0 ? k : 1); }
  int64_t group_count(int64_t k) const { return ceil_div(k, columns_per_group(k)); }

 protected:
  // Throws InvalidArgument / TypeMismatch naming the field that is out of range.
  ScaledFormat(int64_t group_size, DType scale_dtype);
};

// Scalar codes of 1 to 8 bits.
struct GroupedFormat : ScaledFormat {
  int bits;  // 1 ... 8

 protected:
  // Throws InvalidArgument / TypeMismatch naming the field that is out of range.
  GroupedFormat(int bits, int64_t group_size, DType scale_dtype);
};

}  // namespace quantloom
