// Error feedback for a trellis in its rotated basis, as EXL3 does it: scales are fitted to root mean squares,
// the matrix is divided by them and rotated, and the walk takes 16 columns of that basis at a time.
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
};

// w [n, k] of any size; `format` must have the rotation. What round_error_feedback() does for such a format,
// with these options' defaults. Columns that H says are always zero become zero. Of `options`, static_groups
// does not count; scale_search must be empty: InvalidArgument otherwise. NumericError for a scale that
// float16 does not hold. Memory beyond that of round_error_feedback(): 8 n k + 24 k^2 bytes.
Rounded round_trellis_feedback(const FloatMatrix& w, std::shared_ptr<const Trellis> format,
                               const Hessian& hessian, const ErrorFeedbackOptions& options = {},
                               const TrellisFeedbackOptions& trellis = {});

}  // namespace quantloom
