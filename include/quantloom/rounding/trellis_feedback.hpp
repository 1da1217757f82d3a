// Error feedback for a trellis in its rotated basis, as EXL3 does it: scales are fitted to root mean squares,
// the matrix is divided by them and rotated, and the walk takes 16 columns of that basis at a time.
//
// With a Hessian of the outputs (options.output_hessian) it takes one tile of 16 x 16 after the other, and
// the error of each is pushed onto tiles to come in its rows by the inverse of H, and in its columns by that
// of H_out (Tseng, Sun and De Sa 2025): those on a diagonal at a time, which do not depend on each other.
// Both Hessians are damped alike, and refitted scales minimise tr(H_out E H E^T) as well. A Hessian of equal
// entries on a diagonal changes nothing where rows are alike in size; where they are not, it makes the walk
// weigh the rows of the basis.
#pragma once

#include "quantloom/formats/trellis.hpp"
#include "quantloom/rounding/error_feedback.hpp"

namespace quantloom {

struct TrellisFeedbackOptions {
  // true: the Hessian is brought into the basis with the scales, P diag(s) H diag(s) P, so that the walk
  // minimises the error of the output. false: with the signs of the scales alone, as EXL3's own quantizer
  // does; to compare with.
  bool consistent_hessian = true;
  // After the walk, multiplies each output scale by the factor that minimises the row's error under H.
  bool refit_output_scales = true;
  // Then multiplies the input scales by the factors that together minimise the error under H, which takes a
  // factorization of a matrix [k, k], and refits the output scales again if those are refitted.
  bool refit_input_scales = true;
  // How large the weights are to the codebook: factors of trellis_best_ratio(), which is best for weights
  // that are coded as they come. Feedback adds errors to them, which take room at the codebook's ends.
  // Several factors, each in [0.25, 4], are tried with feedback on half of the rows of tiles, at most 8, and
  // a parabola through their losses under H says which factor between them is best. A single one is taken as
  // it is. Empty: 0.65, 0.75, 0.85, 0.95 below 2 bits, 0.75, 0.85, 0.95, 1.05 below 3, and 0.96 from 3 bits
  // on, where a search gains nothing.
  std::vector<double> ratio_factors = {};
};

// w [n, k] of any size; `format` must have the rotation. What round_error_feedback() does for such a format,
// with these options' defaults. Columns that H says are always zero become zero. Of `options`, static_groups
// does not count; scale_search must be empty: InvalidArgument otherwise, and for ratio_factors
// out of range. NumericError for a scale that float16 does not hold. Memory beyond that of
// round_error_feedback(): 8 n k + 24 k^2 bytes.
Rounded round_trellis_feedback(const FloatMatrix& w, std::shared_ptr<const Trellis> format,
                               const Hessian& hessian, const ErrorFeedbackOptions& options = {},
                               const TrellisFeedbackOptions& trellis = {});

}  // namespace quantloom
