#include "formats/bcq_fit.hpp"

#include <algorithm>

namespace quantloom::bcq {
namespace {

// Calls visit(fitter) with scratch memory for the planes of a grid.
template <class Visit>
void with_fitter(const Grid& grid, std::span<const float> x, std::span<const float> weights, int rounds,
                 const Visit& visit) {
  const auto value_at = [x](int64_t i) { return x[static_cast<size_t>(i)]; };
  const auto weight_at = [weights](int64_t i) {
    return weights.empty() ? 1.0 : static_cast<double>(weights[static_cast<size_t>(i)]);
  };
  if (grid.bits <= 4) {
    visit(Fitter<4, decltype(value_at), decltype(weight_at)>(value_at, weight_at, std::ssize(x), rounds));
  } else {
    visit(Fitter<kMostBits, decltype(value_at), decltype(weight_at)>(value_at, weight_at, std::ssize(x),
                                                                     rounds));
  }
}

}  // namespace

void sorted_values(const Grid& grid, std::span<float> values, std::span<uint8_t> codes) {
  sort_values(grid, values.data(), codes.data());
}

int64_t nearest_position(std::span<const float> values, int bits, float x) {
  return position_of(values.data(), bits, x);
}

double error_of(const Grid& grid, std::span<const float> x, std::span<const float> weights) {
  double error = 0;
  with_fitter(grid, x, weights, 0, [&](auto fitter) { error = fitter.assign(grid); });
  return error;
}

void fit(Grid& grid, std::span<const float> x, std::span<const float> weights, const FitOptions& options) {
  if (std::all_of(weights.begin(), weights.end(), [](float weight) { return weight == 0; })) weights = {};
  if (x.empty()) {
    std::fill_n(grid.scale, kMostBits, 0.0F);
    grid.offset = 0;
    return;
  }
  with_fitter(grid, x, weights, options.rounds, [&](auto fitter) { fitter.fit(grid, options.greedy); });
}

}  // namespace quantloom::bcq
