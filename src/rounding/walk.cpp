#include "rounding/walk.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "formats/trellis_basis.hpp"
#include "quantloom/error.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/outlier_search.hpp"
#include "rounding/scale_search.hpp"

namespace quantloom {

std::vector<int64_t> walk_order(const std::vector<double>& diagonal, int64_t step, bool act_order) {
  const auto k = static_cast<int64_t>(diagonal.size());
  std::vector<int64_t> steps(static_cast<size_t>(k / step));
  std::iota(steps.begin(), steps.end(), int64_t{0});
  if (act_order) {
    std::vector<double> energy(steps.size(), 0.0);
    for (int64_t j = 0; j < k; ++j) energy[static_cast<size_t>(j / step)] += diagonal[static_cast<size_t>(j)];
    std::stable_sort(steps.begin(), steps.end(), [&](int64_t a, int64_t b) {
      return energy[static_cast<size_t>(a)] > energy[static_cast<size_t>(b)];
    });
  }
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(k));
  for (const int64_t s : steps) {
    for (int64_t c = 0; c < step; ++c) order.push_back(s * step + c);
  }
  return order;
}

void require_valid(const ErrorFeedbackOptions& options) {
  static_cast<void>(resolve_threads(options.threads));
  if (!(options.damping >= 0) || !std::isfinite(options.damping)) {
    throw InvalidArgument("damping", text_of(options.damping), "a finite number of 0 or more");
  }
  for (const double value : options.damping_ladder) {
    if (!(value >= 0) || !std::isfinite(value)) {
      throw InvalidArgument("damping_ladder", text_of(value), "finite numbers of 0 or more");
    }
  }
  if (options.block < 1) throw InvalidArgument("block", text_of(options.block), "1 or more");
  if (options.scale_search) require_valid(*options.scale_search);
  if (options.outliers) require_valid(*options.outliers);
}

void require_valid(const TrellisFeedbackOptions& options) {
  for (const double factor : options.ratio_factors) {
    if (!(factor >= 0.25 && factor <= 4)) {
      throw InvalidArgument("ratio_factors", text_of(factor), "numbers from 0.25 to 4");
    }
  }
}

std::vector<double> ratio_factors(const TrellisFeedbackOptions& options, const Trellis& format) {
  return options.ratio_factors.empty() ? trellis::usual_ratio_factors(format.half_bits)
                                       : options.ratio_factors;
}

}  // namespace quantloom
