// Rounding tokens for products of integers: their codes in integer order (src/activations/integer_order.hpp)
// with the terms that such a product needs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "activations/integer_order.hpp"
#include "quantloom/activations/activation_format.hpp"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// Rows of codes and outliers that are written: those of the last slab beyond the tokens are zeros.
inline constexpr int kTokenRows = 16;

// Memory on the current device.
struct IntegerTokens {
  int8_t* codes = nullptr;                // integers::order_bytes(m, k), at a multiple of 16 bytes
  integers::TokenTerms* terms = nullptr;  // [m]
  // Inputs that are outliers, as float16: a matrix of two-byte elements [m, outliers],
  // integers::order_bytes(m, 2 * outliers).
  const void* outlier_index = nullptr;  // an outlier_index() on the device, or null: none
  void* outlier_values = nullptr;
  int64_t outliers = 0;
  // Where only the device knows how many there are: that number, at most `outliers`.
  const int32_t* outlier_count = nullptr;
  bool sums = true;  // of codes, in terms
};

// What round_tokens() expects of a format that it does not take; nothing if it takes it.
std::optional<std::string> why_not_integer_order(const ActivationFormat& format);

// Rounds x [m, k], float16, bfloat16 or float32, to the grid of each token, or to the fixed grid of a static
// format: the codes of quantize_activations(). Codes of outliers stand for 0 and count for no scale; codes of
// padding, up to a whole block of columns and kTokenRows of rows, are 0. A token with a value that is not
// finite, or 2^127 and more in magnitude, has scale NaN and codes 0.
//
// Significant digits come as code * 2^shift.
//
// The format is of scope token, or of scope tensor with its grid; for scope tensor without a grid, `range` is
// what find_range() found. Significant digits are of integers of 8 bits at most, with shifts for 8, 16, 32,
// 64, 128 or 256 inputs. Throws InvalidArgument else (why_not_integer_order()); pointers and sizes are the
// caller's to check. overlap: the kernel may begin before the previous one of the stream ends, and waits for
// it before it reads or writes.
void round_tokens(const CudaMatrix& x, const ActivationFormat& format, const IntegerTokens& out,
                  cudaStream_t stream, bool overlap = false, const uint32_t* range = nullptr);

}  // namespace quantloom::cuda
