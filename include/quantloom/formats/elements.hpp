// Sets of values that a number is rounded to one by one: tables, small floats, integers, powers of two; each
// alone or in blocks that share a scale. A code is the place of a value in the ascending set, so that every
// set of up to 2^32 values has codes, values and bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

// The nearest of `values`: code = number of midpoints (in float32) below x, so a midpoint takes the lower.
struct TableElements {
  // 1 to 2^24 finite values, ascending. Throws InvalidArgument.
  explicit TableElements(std::vector<float> table);
  std::vector<float> values;
  std::vector<float> boundaries;  // values.size() - 1 midpoints
};

enum class FloatRounding : uint8_t { nearest, to_zero, to_inf };
FloatRounding float_rounding_from_name(std::string_view name);  // "nearest", "to_zero", "to_inf"

// Floats without codes for infinity or NaN. With B = 2^(exponent_bits - 1): the value of exponent e >= 1 and
// fraction m is 2^(e - B) * (1 + m / 2^mantissa_bits), and of e = 0 it is 2^(1 - B) * m / 2^mantissa_bits.
// Larger values are clipped first, so no rounding leaves the set. `nearest` takes ties toward zero, `to_inf`
// rounds away from zero. Zero is always positive: a set with signs has 2^bits - 1 values.
struct FloatElements {
  // exponent_bits 2 to 8, mantissa_bits 0 to 23. Throws InvalidArgument.
  FloatElements(int exponent_bits, int mantissa_bits, FloatRounding rounding, bool has_sign);
  int exponent_bits;
  int mantissa_bits;
  FloatRounding rounding;
  bool has_sign;
};

// `count` neighbouring numbers at distance 1: integers from -(count - 1) / 2 (up to 2^32 of them; one more
// below zero if count is even), or, symmetric, centred on zero. Ties to even codes of round(x + offset).
struct IntElements {
  IntElements(int64_t count, bool symmetric);  // count 1 to 2^32. Throws InvalidArgument.
  int64_t count;
  bool symmetric;
};

// `count` powers of two from 2^-(count / 2 - 1) up; always rounded up. Powers above 2^127, which float32
// does not hold, are never used. Zero and negative numbers take the smallest.
struct PowerElements {
  explicit PowerElements(int64_t count);  // 2 to 256. Throws InvalidArgument.
  int64_t count;
};

using Elements = std::variant<TableElements, FloatElements, IntElements, PowerElements>;

uint64_t code_count(const Elements& elements);

// One scale for each block of row_block x col_block elements of a matrix; the last blocks may be smaller.
struct BlockGrid {
  int64_t row_block = 1;
  int64_t col_block = 1;
  // Throws InvalidArgument unless both are positive.
  int64_t rows(const FloatMatrix& x) const;
  int64_t cols(const FloatMatrix& x) const;
};

// What is written for each element; null is not written. Rows without gaps, in the shape of x.
struct RoundedElements {
  void* values = nullptr;  // of x's dtype
  uint32_t* codes = nullptr;
};

// The scales of a matrix.
struct BlockScales {
  std::span<const float> scales = {};  // one for each block, row-major; empty: none
  BlockGrid grid = {};
  float factor = 1;  // finite and > 0: every value of the set is multiplied by it
};

// code = round(x / scale / factor), value = value_of(code) * factor * scale, each step in float32, the value
// rounded once to x's dtype. Where a scale is 0, x is taken as it is. NaN gives NaN and code 0. values may be
// x's memory. The result does not depend on `threads`.
void round_elements(const Elements& elements, const FloatMatrix& x, const BlockScales& scaling,
                    RoundedElements out, int threads = 0);

// The values of round_elements from its codes: the same bits. `out` has no gaps between rows. Throws
// InvalidArgument for a code that the set does not have; `out` is then unspecified.
void decode_elements(const Elements& elements, std::span<const uint32_t> codes, const BlockScales& scaling,
                     void* out, DType dtype, int64_t rows, int64_t cols, int threads = 0);

// The same without codes of 32 bits in between: the bytes of pack_codes, packed_code_bytes of them, from
// values, and values from such bytes.
void encode_elements(const Elements& elements, const FloatMatrix& x, const BlockScales& scaling,
                     std::span<uint8_t> bytes, int threads = 0);
void decode_packed_elements(const Elements& elements, std::span<const uint8_t> bytes,
                            const BlockScales& scaling, void* out, DType dtype, int64_t rows, int64_t cols,
                            int threads = 0);

enum class BlockStatistic : uint8_t { absmax, mean_square, signed_extreme };
BlockStatistic block_statistic_from_name(std::string_view name);

// One number for each block: the largest magnitude; the mean of squares (summed in float64); the element of
// largest magnitude with its sign (the positive one of two). NaN anywhere in a block gives NaN. An element
// that does not exist (a matrix without rows) gives no block.
std::vector<float> block_statistics(const FloatMatrix& x, BlockGrid grid, BlockStatistic statistic,
                                    int threads = 0);

// Whether an element is NaN.
bool has_nan(const FloatMatrix& x, int threads = 0);

// Codes below `count` as bytes: a dense stream of ceil(log2 count) bits each, or, where that takes fewer
// bits, numbers in base `count`, as many as fit a word of 64 bits. Both little-endian, lowest code first,
// padded to whole words of 64 bits.
int64_t packed_code_bytes(int64_t codes, uint64_t count);  // count 1 to 2^32
void pack_codes(std::span<const uint32_t> codes, uint64_t count, std::span<uint8_t> out, int threads = 0);
// Throws InvalidArgument if the bytes do not number packed_code_bytes, or hold a code that is not below
// count.
void unpack_codes(std::span<const uint8_t> bytes, uint64_t count, std::span<uint32_t> codes, int threads = 0);

}  // namespace quantloom
