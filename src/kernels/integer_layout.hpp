// Sizes and facts of a matrix in integer order; see integer_cuda.hpp.
#pragma once

#include "activations/integer_order.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom {

struct IntegerLayout {
  int bits = 8;  // of a code
  bool asymmetric = false;
  bool per_tensor = false;
  DType scale_dtype = DType::f16;
  int shift_bits = 0;         // of a stored shift: sdr only
  int64_t group_columns = 1;  // columns that share a shift
  int64_t n = 0;
  int64_t k = 0;
  int64_t row_tiles = 0;      // of 128 rows
  int64_t blocks = 0;         // of 128 columns
  int64_t outliers = 0;       // columns
  bool own_outliers = false;  // W has outliers

  bool has_shifts() const { return shift_bits > 0; }
  int center() const { return has_shifts() ? 0 : 1 << (bits - 1); }
  int64_t outlier_blocks() const { return ceil_div(outliers, int64_t{64}); }
  // Of integer - zero: the largest magnitude.
  int64_t largest() const { return asymmetric ? (int64_t{1} << bits) - 1 : has_shifts() ? 128 : center(); }
};

// Throws Unsupported if integers of the format cannot be multiplied.
IntegerLayout integer_layout(const Format& format, int64_t n, int64_t k, int64_t outlier_columns);

// Throws Unsupported unless the outliers of each row lie at `wanted`.
void require_outliers_at(const std::vector<int32_t>& wanted, const Tensor& offsets, const Tensor& columns,
                         int64_t n);

// The names of the planes that integer order adds.
bool is_integer_plane(std::string_view name);

}  // namespace quantloom
