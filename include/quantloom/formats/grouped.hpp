// What the formats with scalar codes share: codes of 1 to 8 bits, one scale for each group of columns.
#pragma once

#include "quantloom/formats/format.hpp"

namespace quantloom {

struct GroupedFormat : Format {
  static constexpr int64_t kPerChannel = -1;  // one group per row
  static constexpr int64_t kPerTensor = -2;   // one group for the whole matrix

  int bits;            // 1 ... 8
  int64_t group_size;  // > 0, kPerChannel or kPerTensor
  DType scale_dtype;   // float16, bfloat16 or float32

  int64_t columns_per_group(int64_t k) const { return group_size > 0 ? group_size : (k > 0 ? k : 1); }
  int64_t group_count(int64_t k) const { return ceil_div(k, columns_per_group(k)); }

 protected:
  // Throws InvalidArgument / TypeMismatch naming the field that is out of range.
  GroupedFormat(int bits, int64_t group_size, DType scale_dtype);
};

}  // namespace quantloom
