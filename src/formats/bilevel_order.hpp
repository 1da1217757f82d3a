// How the codes of scales and zero points (format "spqr") lie in fragment order; shared by the scalar
// reference on the CPU and the kernels.
//
// A lane's eight rows in a block of 64, lane / 4 + 8 * i, have their codes side by side, in fields of 4 bits
// where both widths fit, else of 8: those of the scales, then those of the zero points.
#pragma once

#include "formats/fragment_order.hpp"

namespace quantloom::fragments {

// Bytes of the codes of a lane's rows in a group.
QUANTLOOM_HOST_DEVICE constexpr int bilevel_bytes(int scale_bits, int zero_bits) {
  return scale_bits <= 4 && zero_bits <= 4 ? 8 : 16;
}

// The field of row `i` of a lane's eight: a byte among `bytes` of them, and a bit of it.
struct BilevelField {
  int byte;
  int bit;
};
QUANTLOOM_HOST_DEVICE constexpr BilevelField bilevel_field(int bytes, bool zero, int i) {
  const int first = zero ? bytes / 2 : 0;
  if (bytes == 8) return {first + i / 2, i % 2 * 4};
  return {first + i, 0};
}

}  // namespace quantloom::fragments
