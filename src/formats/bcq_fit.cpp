#include "formats/bcq_fit.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace quantloom::bcq {
namespace {

constexpr int kMostUnknowns = kMostBits + 1;
constexpr int64_t kMostCodes = int64_t{1} << kMostBits;
// A pivot below this share of the diagonal is noise: the signs of two planes agree everywhere.
constexpr double kPivot = 1e-9;

double weight_at(std::span<const float> weights, size_t i) {
  return weights.empty() ? 1.0 : weights[i];
}

// How much of the weight, and of the weighted values, each code has.
struct CodeSums {
  std::array<double, kMostCodes> weight{};
  std::array<double, kMostCodes> value{};
  double error = 0;  // of the values that the codes stand for
};

CodeSums assign(const Grid& grid, std::span<const float> x, std::span<const float> weights) {
  std::array<float, kMostCodes> values;
  std::array<uint8_t, kMostCodes> codes;
  const auto count = static_cast<size_t>(grid.size());
  sorted_values(grid, {values.data(), count}, {codes.data(), count});
  CodeSums sums;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t position = nearest_position({values.data(), count}, grid.bits, x[i]);
    const double weight = weight_at(weights, i);
    const double error = static_cast<double>(values[position]) - x[i];
    sums.weight[codes[position]] += weight;
    sums.value[codes[position]] += weight * x[i];
    sums.error += weight * error * error;
  }
  return sums;
}

// The least-squares scales and offset for given codes; false if the signs do not determine them.
bool solve(const CodeSums& sums, Grid& grid) {
  const int unknowns = grid.bits + (grid.has_offset ? 1 : 0);
  std::array<std::array<double, kMostUnknowns>, kMostUnknowns> a{};
  std::array<double, kMostUnknowns> b{};
  const auto sign = [&](int64_t code, int i) {
    return i == grid.bits ? 1.0 : ((code >> i & 1) != 0 ? 1.0 : -1.0);
  };
  for (int64_t code = 0; code < grid.size(); ++code) {
    if (sums.weight[code] == 0) continue;
    for (int i = 0; i < unknowns; ++i) {
      b[i] += sign(code, i) * sums.value[code];
      for (int j = 0; j <= i; ++j) a[i][j] += sign(code, i) * sign(code, j) * sums.weight[code];
    }
  }
  for (int j = 0; j < unknowns; ++j) {  // Cholesky in place
    double pivot = a[j][j];
    for (int p = 0; p < j; ++p) pivot -= a[j][p] * a[j][p];
    if (!(pivot > kPivot * a[j][j])) return false;
    const double root = std::sqrt(pivot);
    a[j][j] = root;
    for (int i = j + 1; i < unknowns; ++i) {
      for (int p = 0; p < j; ++p) a[i][j] -= a[i][p] * a[j][p];
      a[i][j] /= root;
    }
  }
  for (int i = 0; i < unknowns; ++i) {
    for (int p = 0; p < i; ++p) b[i] -= a[i][p] * b[p];
    b[i] /= a[i][i];
  }
  for (int i = unknowns - 1; i >= 0; --i) {
    for (int p = i + 1; p < unknowns; ++p) b[i] -= a[p][i] * b[p];
    b[i] /= a[i][i];
  }
  for (int i = 0; i < unknowns; ++i) {
    if (!std::isfinite(static_cast<float>(b[i]))) return false;
  }
  // Turning all signs of a plane around leaves the set of values as it is.
  for (int i = 0; i < grid.bits; ++i) grid.scale[i] = static_cast<float>(std::abs(b[i]));
  if (grid.has_offset) grid.offset = static_cast<float>(b[grid.bits]);
  return true;
}

// Returns the error.
double alternate(Grid& grid, std::span<const float> x, std::span<const float> weights, int rounds) {
  CodeSums sums = assign(grid, x, weights);
  for (int round = 0; round < rounds; ++round) {
    Grid next = grid;
    if (!solve(sums, next)) break;
    CodeSums found = assign(next, x, weights);
    if (!(found.error < sums.error)) break;  // converged, up to the rounding of sums
    grid = next;
    sums = found;
  }
  return sums.error;
}

// The scale of one more plane: the mean magnitude of what the others leave.
void add_plane(Grid& grid, std::span<const float> left, std::span<const float> weights) {
  double sum = 0;
  double total = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    sum += weight_at(weights, i) * std::abs(left[i]);
    total += weight_at(weights, i);
  }
  grid.scale[grid.bits] = total > 0 ? static_cast<float>(sum / total) : 0.0F;
  ++grid.bits;
}

float mean_of(std::span<const float> x, std::span<const float> weights) {
  double sum = 0;
  double total = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += weight_at(weights, i) * x[i];
    total += weight_at(weights, i);
  }
  return total > 0 ? static_cast<float>(sum / total) : 0.0F;
}

// One plane after the other by signs of what is left.
void greedy_start(Grid& grid, std::span<const float> x, std::span<const float> weights) {
  const int bits = grid.bits;
  grid.offset = grid.has_offset ? mean_of(x, weights) : 0.0F;
  std::vector<float> left(x.begin(), x.end());
  for (float& value : left) value -= grid.offset;
  for (grid.bits = 0; grid.bits < bits;) {
    add_plane(grid, left, weights);
    const float scale = grid.scale[grid.bits - 1];
    for (float& value : left) value -= value >= 0 ? scale : -scale;
  }
}

// One plane more, by signs of what the nearest values leave.
void next_start(Grid& grid, std::span<const float> x, std::span<const float> weights) {
  std::array<float, kMostCodes> values;
  std::array<uint8_t, kMostCodes> codes;
  const auto count = static_cast<size_t>(grid.size());
  sorted_values(grid, {values.data(), count}, {codes.data(), count});
  std::vector<float> left(x.begin(), x.end());
  for (float& value : left) value -= values[nearest_position({values.data(), count}, grid.bits, value)];
  add_plane(grid, left, weights);
}

void grid_start(Grid& grid, std::span<const float> x, float shrink) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  double span = static_cast<double>(*high) - *low;
  grid.offset = static_cast<float>((static_cast<double>(*high) + *low) / 2);
  if (!grid.has_offset) {
    span = 2.0 * std::max(std::abs(*low), std::abs(*high));
    grid.offset = 0;
  }
  const double step = shrink * span / static_cast<double>(grid.size() - 1);
  for (int i = 0; i < grid.bits; ++i) grid.scale[i] = static_cast<float>(std::ldexp(step, i - 1));
}

// The best of all starts for 1, 2, ... planes, each number beginning with what the one before ended with.
Grid fit_best(const Grid& wanted, std::span<const float> x, std::span<const float> weights, int rounds) {
  Grid best;
  for (int bits = 1; bits <= wanted.bits; ++bits) {
    Grid start = wanted;
    start.bits = bits;
    std::array<Grid, 4> starts = {best, start, start, start};
    size_t first = 0;
    if (bits == 1) {
      first = 1;
    } else {
      next_start(starts[0], x, weights);
    }
    greedy_start(starts[1], x, weights);
    grid_start(starts[2], x, 1.0F);
    grid_start(starts[3], x, 0.75F);
    double least = std::numeric_limits<double>::infinity();
    for (size_t i = first; i < starts.size(); ++i) {
      const double error = alternate(starts[i], x, weights, rounds);
      if (i == first || error < least) {
        least = error;
        best = starts[i];
      }
    }
  }
  return best;
}

}  // namespace

float value_of(const Grid& grid, int64_t code) {
  float value = grid.offset;
  for (int i = 0; i < grid.bits; ++i) value += (code >> i & 1) != 0 ? grid.scale[i] : -grid.scale[i];
  return value;
}

void sorted_values(const Grid& grid, std::span<float> values, std::span<uint8_t> codes) {
  const auto count = static_cast<size_t>(grid.size());
  std::array<float, kMostCodes> own;
  std::array<uint8_t, kMostCodes> order;
  for (size_t code = 0; code < count; ++code) {
    own[code] = value_of(grid, static_cast<int64_t>(code));
    order[code] = static_cast<uint8_t>(code);
  }
  std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count),
            [&](uint8_t a, uint8_t b) { return own[a] < own[b] || (own[a] == own[b] && a < b); });
  for (size_t i = 0; i < count; ++i) {
    values[i] = own[order[i]];
    codes[i] = order[i];
  }
}

int64_t nearest_position(std::span<const float> values, int bits, float x) {
  int64_t position = 0;
  for (int64_t half = (int64_t{1} << bits) / 2; half > 0; half /= 2) {
    // Halves first, so that the sum cannot leave float32.
    const float middle = values[position + half - 1] / 2 + values[position + half] / 2;
    position += x > middle ? half : 0;
  }
  return position;
}

double error_of(const Grid& grid, std::span<const float> x, std::span<const float> weights) {
  return assign(grid, x, weights).error;
}

void fit(Grid& grid, std::span<const float> x, std::span<const float> weights, const FitOptions& options) {
  if (std::all_of(weights.begin(), weights.end(), [](float weight) { return weight == 0; })) weights = {};
  Grid best = grid;
  if (x.empty()) {
    best.scale.fill(0);
    best.offset = 0;
  } else if (options.greedy) {
    greedy_start(best, x, weights);
    alternate(best, x, weights, options.rounds);
  } else {
    best = fit_best(grid, x, weights, options.rounds);
  }
  std::sort(best.scale.begin(), best.scale.begin() + best.bits, std::greater<>());
  grid = best;
}

}  // namespace quantloom::bcq
