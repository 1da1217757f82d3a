// Rounding "nearest" (RTN): each weight takes the code nearest to it; groups are fitted on their own.
#pragma once

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom {

struct NearestOptions {
  std::optional<ScaleSearch> scale_search = std::nullopt;
  // Optional: weights the scale search, and the fits of formats by least squares, by diag(H) and fills the
  // report's proxy losses.
  const Hessian* hessian = nullptr;
  const Hessian* held_out = nullptr;  // a Hessian of other tokens, for the report
  int threads = 0;
};

// w [n, k]: finite float32, float16 or bfloat16.
Rounded round_nearest(const FloatMatrix& w, std::shared_ptr<const Format> format,
                      const NearestOptions& options = {});

}  // namespace quantloom
