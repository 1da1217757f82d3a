// Orthonormal Hadamard transforms of rows: y = scale * H (signs * x), in blocks along the last axis.
//
// H = (M (x) W) / sqrt(n) for a block of n = order * 2^power elements: W is the Walsh matrix of 2^power in
// Hadamard's order, done by butterflies, and M a dense Hadamard matrix of small order (1 for powers of two).
// Element a * 2^power + b of a block meets row a of M and row b of W. Known orders: Paley's two constructions
// (J. Math. Phys. 12, 1933) over prime fields and their extensions, Williamson's (Duke Math. J. 11, 1944) of
// orders 92 and 172, and Kronecker products of these, up to kMaxHadamardOrder. M need not be symmetric, so
// the inverse is its own direction: x = signs * H^T y.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

constexpr int64_t kMaxHadamardOrder = 1024;
// The largest block; it bounds the memory that a thread takes for a row.
constexpr int64_t kMaxHadamardBlock = int64_t{1} << 26;

// n = order << power.
struct HadamardSize {
  int64_t order = 1;
  int power = 0;
};

// How a block of n elements is transformed, with the smallest dense order; nothing if no matrix is known.
std::optional<HadamardSize> hadamard_size(int64_t n);

// The largest divisor of `cols` that is a known size; at least 1 for cols > 0.
int64_t largest_hadamard_block(int64_t cols);

// The size of a block; throws InvalidArgument, naming the argument "block" and the largest block that would
// work, unless `block` (0: whole rows) divides `cols` and is a known size. `cols` is at least 1.
HadamardSize require_hadamard_block(int64_t cols, int64_t block);

// A Hadamard matrix [m, m] of entries +1 and -1, row-major, by the constructions above: the M of
// hadamard_size(). Throws InvalidArgument unless m is 1 or an order that hadamard_size() can give.
std::vector<int8_t> hadamard_base(int64_t m);

// The whole matrix [n, n], H * sqrt(n), for checks: n^2 bytes. Throws as hadamard_base(), and for n > 2^14.
std::vector<int8_t> hadamard_matrix(int64_t n);

// Signs are bits: bit i % 8 of byte i / 8 is set where element i of a row is negated.
inline int64_t sign_bytes(int64_t cols) {
  return cols / 8 + static_cast<int64_t>(cols % 8 != 0);
}
// Independent even signs for `cols` elements; a pure function of (seed, index). Bits past `cols` are 0.
std::vector<uint8_t> random_signs(int64_t cols, uint64_t seed);

struct HadamardOptions {
  int64_t block = 0;     // elements of a block; 0: whole rows
  bool inverse = false;  // signs * H^T x instead of H (signs * x), both before the scales
  // sign_bytes(cols) bytes, or none. Signs belong to the columns of a row, not of a block.
  std::span<const uint8_t> signs = {};
  float scale = 1;                            // multiplies the result, in both directions; finite
  std::span<const float> channel_scale = {};  // [cols] or none: multiplies each column of the result
  int threads = 0;
};

// Transforms the rows of x [rows, cols] to `out`, of the same dtype and shape, row r at element r *
// out_stride. `out` may be x itself (same address and stride); otherwise the two must not overlap. Computed
// in float32 and rounded once to the dtype; a result beyond the range of float16 becomes infinite. The same
// bits on every instruction set. Throws InvalidArgument naming x, block, signs, scale, channel_scale, out or
// out_stride.
void hadamard(const FloatMatrix& x, void* out, int64_t out_stride, const HadamardOptions& options = {});

}  // namespace quantloom
