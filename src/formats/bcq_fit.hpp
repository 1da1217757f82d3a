// The least-squares fit of binary coding to one group of one row.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace quantloom::bcq {

inline constexpr int kMostBits = 8;

// offset + sum of +-scale[i].
struct Grid {
  int bits = 1;
  bool has_offset = false;
  std::array<float, kMostBits> scale{};
  float offset = 0;

  int64_t size() const { return int64_t{1} << bits; }
};

// The value of a code, whose bit i is the sign of plane i: summed in float32, as decoding does.
float value_of(const Grid& grid, int64_t code);
// All values in rising order, and the code of each; of equal values the smaller code first.
void sorted_values(const Grid& grid, std::span<float> values, std::span<uint8_t> codes);
// The position in rising `values` (2^bits of them) that is nearest to x, the lower one on a tie.
int64_t nearest_position(std::span<const float> values, int bits, float x);

// Sum of weight * (nearest value - x)^2; no weights: 1 everywhere.
double error_of(const Grid& grid, std::span<const float> x, std::span<const float> weights);

struct FitOptions {
  int rounds = 15;
  bool greedy = false;  // the greedy start only
};
// Fits the grid's scales, and its offset if it has one. Scales are >= 0, in falling order.
void fit(Grid& grid, std::span<const float> x, std::span<const float> weights, const FitOptions& options);

}  // namespace quantloom::bcq
