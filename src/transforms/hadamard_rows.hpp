// The loops of the CPU's Hadamard transform, over float32 buffers that hold whole blocks.
#pragma once

#include <cstdint>

#include "quantloom/dtype.hpp"

namespace quantloom::transforms {

// Elements by which buffers are longer than their contents, for whole vectors past the end.
constexpr int64_t kBufferPadding = 64;

struct RowSpan {
  const void* x = nullptr;  // of `dtype`
  void* out = nullptr;      // of `dtype`; may be x
  DType dtype = DType::f32;
  int64_t count = 0;                // elements: a multiple of the block
  const uint32_t* signs = nullptr;  // [count]: 0 or 0x80000000; or null
  const float* scales = nullptr;    // [count] or null
};

struct BlockPlan {
  int64_t order = 1;
  int power = 0;
  // Entries of M as +-1, or of its transpose for the inverse, in groups of 4 rows: [order / 4][order][4];
  // null for order 1.
  const float* base = nullptr;
  float factor = 1;      // scale / sqrt(block)
  bool inverse = false;  // signs after instead of before
};

// `buffer` and `second` hold count + kBufferPadding floats; `second` is used if order > 1.
void transform_span(const RowSpan& span, const BlockPlan& plan, float* buffer, float* second);

}  // namespace quantloom::transforms
