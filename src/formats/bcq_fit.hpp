// The least-squares fit of binary coding to one group of one row, on the CPU.
#pragma once

#include <cstdint>
#include <span>

#include "formats/bcq_arithmetic.hpp"

namespace quantloom::bcq {

// All values in rising order, and the code of each; of equal values the smaller code first.
void sorted_values(const Grid& grid, std::span<float> values, std::span<uint8_t> codes);
// The position in rising `values` (2^bits of them) that is nearest to x, the lower one on a tie.
int64_t nearest_position(std::span<const float> values, int bits, float x);

// Sum of weight * (nearest value - x)^2; no weights: 1 everywhere.
double error_of(const Grid& grid, std::span<const float> x, std::span<const float> weights);

// Fits the grid's scales, and its offset if it has one; weights that are all 0 count as none. Scales are
// >= 0, in falling order.
void fit(Grid& grid, std::span<const float> x, std::span<const float> weights, const FitOptions& options);

}  // namespace quantloom::bcq
