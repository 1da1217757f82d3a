// The basis in which a trellis codes a matrix: blocks of 128 rows and columns, transformed on both sides.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/matrix_view.hpp"

namespace quantloom::trellis {

constexpr int64_t kRotation = 128;

// Each row's blocks of 128 columns by the orthonormal Hadamard matrix of natural order; its own inverse.
template <class T>
void rotate_columns(MatrixView<T> matrix);
// Each column's blocks of 128 rows.
template <class T>
void rotate_rows(MatrixView<T> matrix);
extern template void rotate_columns(MatrixView<float> matrix);
extern template void rotate_columns(MatrixView<double> matrix);
extern template void rotate_rows(MatrixView<float> matrix);
extern template void rotate_rows(MatrixView<double> matrix);

// Scales of a matrix as they are stored.
struct Scales {
  std::vector<uint16_t> input;   // float16 [k]
  std::vector<uint16_t> output;  // float16 [n]
};

// Scales of ones.
Scales unit_scales(int64_t n, int64_t k);
// Fits the output scales of rows [first_row, + columns.cols()), from all their columns [k, rows], to their
// root mean squares, so that values over scales have the RMS `target`. shrink: empty or a factor for each
// row. Throws NumericError for a scale that float16 does not hold.
void fit_rows(MatrixView<const float> columns, int64_t first_row, std::span<const float> shrink,
              double target, Scales& scales);
// Fits both sides from all columns [k, n]: output scales to the root mean squares of the rows over their
// mean, then input scales to what is left; both with random signs.
void fit_both(MatrixView<const float> columns, float shrink, double target, Scales& scales);
// Its two halves, from sums of squares. Of the rows [n], k values each; leaves 1 / |scale| there, 0 for 0:
void fit_outputs(std::span<double> squares, int64_t k, Scales& scales);
// Of the columns [k] over the scales of the n rows.
void fit_inputs(std::span<const double> squares, int64_t n, float shrink, double target, Scales& scales);

// Multiplies all output scales by 1 / factor, so that values over scales grow by it. Throws NumericError for
// a scale that float16 does not hold.
void widen(double factor, Scales& scales);

// The rows of tiles, of `count`, on which ratios are tried: at least one, at most 8, spread evenly.
std::vector<int64_t> trial_tile_rows(int64_t count);

// The factor with the least loss: the minimum, in hundredths and within the factors tried, of the parabola
// nearest to the logarithms of losses over those of factors, which takes the noise of a small sample out.
// That of the least loss where there is no such minimum or fewer than three factors.
double best_factor(std::span<const double> factors, std::span<const double> losses);

// The factors by which rows and columns of a Hessian are multiplied before it is rotated: scales of its side,
// or their signs alone if not `consistent`, in units of the largest: float16 scales of tiny weights, squared,
// would leave the range of a factorization.
std::vector<double> hessian_factors(std::span<const uint16_t> scales, bool consistent);

// The factors of trellis_best_ratio() that are tried unless told otherwise: below 3 bits, where the search
// gains, several, for more bits a single one.
std::vector<double> usual_ratio_factors(int half_bits);

// Added to the diagonal of the quadratic form of input scales, relative to each entry.
inline constexpr double kRefitDamping = 1e-3;

// An output scale after a walk: the multiple of the decoded row d that is nearest to the row w under H, given
// w H d^T and d H d^T. As it is where the factor is not between 1/2 and 2: far off, rounding decides.
uint16_t refitted_scale(uint16_t scale, double with_original, double with_decoded);
// A scale times `factor`, as it is stored, under the same conditions.
uint16_t multiplied_scale(uint16_t scale, double factor);
// By how much that multiplied a scale.
double factor_between(uint16_t before, uint16_t after);

}  // namespace quantloom::trellis
