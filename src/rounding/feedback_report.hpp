// What the two walks of error feedback report alike.
#pragma once

#include "quantloom/rounding/error_feedback.hpp"

namespace quantloom {

// Fills the errors of `rounded`, and those of nearest rounding beside them if options.measure_losses.
void measure_feedback(const FloatMatrix& w, const std::shared_ptr<const Format>& format,
                      const Hessian& hessian, const ErrorFeedbackOptions& options, Rounded& rounded);

}  // namespace quantloom
