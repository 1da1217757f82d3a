// The fit of binary coding to one group of one row, for the CPU and for CUDA devices: the same operations in
// the same order, so that both find the same grids to the bit. Files that include this are compiled without
// contraction to fused multiply-adds.
//
// X(i) is value i of `count`, Weight(i) how much its squared error counts.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define QUANTLOOM_BCQ_FUNCTION __host__ __device__ inline
#else
#define QUANTLOOM_BCQ_FUNCTION inline
#endif

namespace quantloom::bcq {

inline constexpr int kMostBits = 8;

// offset + sum of +-scale[i].
struct Grid {
  int bits = 1;
  bool has_offset = false;
  float scale[kMostBits] = {};
  float offset = 0;

  QUANTLOOM_BCQ_FUNCTION int size() const { return 1 << bits; }
};

struct FitOptions {
  int rounds = 15;
  bool greedy = false;  // the greedy start only
};

inline constexpr float kLargest = 0x1.fffffep127F;
// A pivot below this share of the diagonal is noise: the signs of two planes agree everywhere.
inline constexpr double kPivot = 1e-9;

QUANTLOOM_BCQ_FUNCTION float value_of(const Grid& grid, int code) {
  float value = grid.offset;
  for (int i = 0; i < grid.bits; ++i) value += (code >> i & 1) != 0 ? grid.scale[i] : -grid.scale[i];
  return value;
}

// All values of a grid in rising order, and the code of each; of equal values the smaller code first.
// Binary insertion is no worse than other sorts for the few values of grids up to 4 planes.
QUANTLOOM_BCQ_FUNCTION void sort_values(const Grid& grid, float* values, uint8_t* codes) {
  const int count = grid.size();
  for (int code = 0; code < count; ++code) {
    const float value = value_of(grid, code);
    int at = code;
    // Codes rise, so that equal ones stay where they are.
    for (; at > 0 && values[at - 1] > value; --at) {
      values[at] = values[at - 1];
      codes[at] = codes[at - 1];
    }
    values[at] = value;
    codes[at] = static_cast<uint8_t>(code);
  }
}

// The position in rising `values` (2^bits of them) that is nearest to x, the lower one on a tie.
QUANTLOOM_BCQ_FUNCTION int position_of(const float* values, int bits, float x) {
  int position = 0;
  for (int half = (1 << bits) / 2; half > 0; half /= 2) {
    // Halves first, so that the sum cannot leave float32.
    const float middle = values[position + half - 1] / 2 + values[position + half] / 2;
    position += x > middle ? half : 0;
  }
  return position;
}

// The fit with scratch memory for kBits planes at most.
template <int kBits, class X, class Weight>
class Fitter {
 public:
  QUANTLOOM_BCQ_FUNCTION Fitter(X x, Weight weight, int64_t count, int rounds)
      : x_(x), weight_(weight), count_(count), rounds_(rounds) {}

  // Scales are >= 0, in falling order. count > 0.
  QUANTLOOM_BCQ_FUNCTION void fit(Grid& grid, bool greedy) {
    Grid best = grid;
    if (greedy) {
      greedy_start(best);
      alternate(best);
    } else {
      best = fit_best(grid);
    }
    for (int i = 1; i < best.bits; ++i) {
      const float scale = best.scale[i];
      int at = i;
      for (; at > 0 && best.scale[at - 1] < scale; --at) best.scale[at] = best.scale[at - 1];
      best.scale[at] = scale;
    }
    grid = best;
  }

  // Sum of weight * (nearest value - x)^2. Leaves what solve() needs.
  QUANTLOOM_BCQ_FUNCTION double assign(const Grid& grid) {
    sort_values(grid, values_, codes_);
    for (int code = 0; code < grid.size(); ++code) weight_sums_[code] = value_sums_[code] = 0;
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const float x = x_(i);
      const int position = position_of(values_, grid.bits, x);
      const double weight = weight_(i);
      const double error = static_cast<double>(values_[position]) - x;
      weight_sums_[codes_[position]] += weight;
      value_sums_[codes_[position]] += weight * x;
      sum += weight * error * error;
    }
    return sum;
  }

 private:
  static constexpr int kUnknowns = kBits + 1;

  // The least-squares scales and offset for the codes of assign(); false if the signs do not determine them.
  QUANTLOOM_BCQ_FUNCTION bool solve(Grid& grid) const {
    const int unknowns = grid.bits + (grid.has_offset ? 1 : 0);
    double a[kUnknowns][kUnknowns] = {};
    double b[kUnknowns] = {};
    for (int code = 0; code < grid.size(); ++code) {
      if (weight_sums_[code] == 0) continue;
      for (int i = 0; i < unknowns; ++i) {
        const double own = sign(grid, code, i);
        b[i] += own * value_sums_[code];
        for (int j = 0; j <= i; ++j) a[i][j] += own * sign(grid, code, j) * weight_sums_[code];
      }
    }
    for (int j = 0; j < unknowns; ++j) {  // Cholesky in place
      double pivot = a[j][j];
      for (int p = 0; p < j; ++p) pivot -= a[j][p] * a[j][p];
      if (!(pivot > kPivot * a[j][j])) return false;
      const double root = sqrt(pivot);
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
      if (!(fabsf(static_cast<float>(b[i])) <= kLargest)) return false;
    }
    // Turning all signs of a plane around leaves the set of values as it is.
    for (int i = 0; i < grid.bits; ++i) grid.scale[i] = static_cast<float>(fabs(b[i]));
    if (grid.has_offset) grid.offset = static_cast<float>(b[grid.bits]);
    return true;
  }

  static QUANTLOOM_BCQ_FUNCTION double sign(const Grid& grid, int code, int i) {
    return i == grid.bits || (code >> i & 1) != 0 ? 1.0 : -1.0;
  }

  // Returns the error.
  QUANTLOOM_BCQ_FUNCTION double alternate(Grid& grid) {
    double error = assign(grid);
    for (int round = 0; round < rounds_; ++round) {
      Grid next = grid;
      if (!solve(next)) break;
      const double found = assign(next);
      if (!(found < error)) break;  // converged, up to the rounding of sums
      grid = next;
      error = found;
    }
    return error;
  }

  // The scale of one more plane: the mean magnitude of what the others leave of each value.
  template <class Left>
  QUANTLOOM_BCQ_FUNCTION void add_plane(Grid& grid, const Left& left) const {
    double sum = 0;
    double total = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double weight = weight_(i);
      sum += weight * fabsf(left(i));
      total += weight;
    }
    grid.scale[grid.bits] = total > 0 ? static_cast<float>(sum / total) : 0.0F;
    ++grid.bits;
  }

  QUANTLOOM_BCQ_FUNCTION float mean() const {
    double sum = 0;
    double total = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double weight = weight_(i);
      sum += weight * x_(i);
      total += weight;
    }
    return total > 0 ? static_cast<float>(sum / total) : 0.0F;
  }

  // One plane after the other by signs of what is left.
  QUANTLOOM_BCQ_FUNCTION void greedy_start(Grid& grid) const {
    const int bits = grid.bits;
    grid.offset = grid.has_offset ? mean() : 0.0F;
    for (grid.bits = 0; grid.bits < bits;) {
      add_plane(grid, [&](int64_t i) {
        float left = x_(i) - grid.offset;
        for (int p = 0; p < grid.bits; ++p) left -= left >= 0 ? grid.scale[p] : -grid.scale[p];
        return left;
      });
    }
  }

  // One plane more, by signs of what the nearest values leave.
  QUANTLOOM_BCQ_FUNCTION void next_start(Grid& grid) {
    sort_values(grid, values_, codes_);
    add_plane(grid, [&](int64_t i) {
      const float x = x_(i);
      return x - values_[position_of(values_, grid.bits, x)];
    });
  }

  QUANTLOOM_BCQ_FUNCTION void grid_start(Grid& grid, float shrink) const {
    float low = x_(0);
    float high = low;
    for (int64_t i = 1; i < count_; ++i) {
      const float x = x_(i);
      low = x < low ? x : low;
      high = x < high ? high : x;
    }
    double span = static_cast<double>(high) - low;
    grid.offset = static_cast<float>((static_cast<double>(high) + low) / 2);
    if (!grid.has_offset) {
      span = 2.0 * (fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high));
      grid.offset = 0;
    }
    const double step = shrink * span / static_cast<double>(grid.size() - 1);
    for (int i = 0; i < grid.bits; ++i) grid.scale[i] = static_cast<float>(ldexp(step, i - 1));
  }

  // The best of all starts for 1, 2, ... planes, each number beginning with what the one before ended with.
  QUANTLOOM_BCQ_FUNCTION Grid fit_best(const Grid& wanted) {
    Grid best;
    for (int bits = 1; bits <= wanted.bits; ++bits) {
      const Grid before = best;
      double least = 0;
      for (int i = bits == 1 ? 1 : 0, first = i; i < 4; ++i) {
        Grid start = i == 0 ? before : wanted;
        if (i > 0) start.bits = bits;
        if (i == 0) next_start(start);
        if (i == 1) greedy_start(start);
        if (i > 1) grid_start(start, i == 2 ? 1.0F : 0.75F);
        const double error = alternate(start);
        if (i == first || error < least) {
          least = error;
          best = start;
        }
      }
    }
    return best;
  }

  X x_;
  Weight weight_;
  int64_t count_;
  int rounds_;
  float values_[1 << kBits];
  uint8_t codes_[1 << kBits];
  double weight_sums_[1 << kBits];
  double value_sums_[1 << kBits];
};

}  // namespace quantloom::bcq
