// Sizes and facts of a matrix in integer order; see integer_cuda.hpp.
#pragma once

#include "activations/integer_order.hpp"
#include "kernels/register_order.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom {

struct IntegerLayout {
  int bits = 8;  // of a code
  bool asymmetric = false;
  bool per_tensor = false;
  DType scale_dtype = DType::f16;
  int shift_bits = 0;         // of a stored shift: sdr only
  int64_t group_columns = 1;  // columns that share a shift, or with step_columns a scale
  int64_t n = 0;
  int64_t k = 0;
  int64_t row_tiles = 0;      // of 128 rows
  int64_t blocks = 0;         // of 128 columns
  int64_t outliers = 0;       // columns
  bool own_outliers = false;  // W has outliers
  // Register order (register_order.hpp) instead of integer order.
  bool in_registers = false;
  int64_t step_columns = 0;  // groups: 128, 64 or 32 columns that share a scale

  bool has_shifts() const { return shift_bits > 0; }
  int center() const { return has_shifts() ? 0 : 1 << (bits - 1); }
  bool nibbles() const { return in_registers && bits <= 4; }
  bool grouped() const { return step_columns > 0; }
  int steps() const { return grouped() ? static_cast<int>(128 / step_columns) : 0; }
  // Groups have zero points beside the codes. Of 5 to 7 bits, code - zero fits a byte.
  bool pairs() const { return grouped() && asymmetric && (bits <= 4 || bits == 8); }
  bool zeros_in_codes() const { return grouped() && asymmetric && !pairs(); }
  // What a stored code of groups is less than the code; with zeros_in_codes() the zero point.
  int stored_center() const { return pairs() && bits <= 4 ? 0 : center(); }
  int64_t record_bytes() const { return registers::record_bytes(nibbles(), steps(), pairs()); }
  int64_t outlier_blocks() const { return ceil_div(outliers, int64_t{64}); }
  // Of integer - zero: the largest magnitude.
  int64_t largest() const { return asymmetric ? (int64_t{1} << bits) - 1 : has_shifts() ? 128 : center(); }
};

// Throws Unsupported if integers of the format cannot be multiplied.
IntegerLayout integer_layout(const Format& format, int64_t n, int64_t k, int64_t outlier_columns);

// Throws Unsupported unless the outliers of each row lie at `wanted`.
void require_outliers_at(const std::vector<int32_t>& wanted, const Tensor& offsets, const Tensor& columns,
                         int64_t n);

// The planes "integers" and "rows" of a matrix in register order, and back to "codes": on the CPU.
void fill_records(const IntegerLayout& layout, const PackedTensor& packed, IntegerPlanes& prepared);
void codes_of_records(const IntegerLayout& layout, const IntegerPlanes& prepared, PackedTensor& packed);
// Throws Unsupported if columns of a group of scales are not consecutive.
void require_consecutive(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes);

// The names of the planes that integer order adds.
bool is_integer_plane(std::string_view name);

}  // namespace quantloom
