#include "formats/trellis_basis.hpp"

#include <algorithm>
#include <cmath>

#include "quantloom/dtype.hpp"
#include "quantloom/random.hpp"

namespace quantloom::trellis {
namespace {

constexpr double kNorm = 0.08838834764831845;  // 1 / sqrt(128)
constexpr uint64_t kInputSigns = 1;            // seeds
constexpr uint64_t kOutputSigns = 2;

template <class T>
void add_subtract(T* __restrict a, T* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T sum = a[i] + b[i];
    b[i] = a[i] - b[i];
    a[i] = sum;
  }
}

uint16_t stored(double scale, std::string_view side, int64_t index) {
  const uint16_t bits = f16_from_float(static_cast<float>(scale));
  if ((bits & 0x7FFFU) >= 0x7C00U) {
    throw NumericError(
        text_of("scale of ", side, " ", index, ": got ", scale,
                ", expected at most 65504, as float16 holds: divide the weights by a constant"));
  }
  return bits;
}

double sign_of(uint64_t seed, int64_t index) {
  const auto i = static_cast<uint64_t>(index);
  return (CounterRandom(seed).bits(i / 64) >> i % 64 & 1U) != 0 ? -1 : 1;
}

}  // namespace

template <class T>
void rotate_columns(MatrixView<T> matrix) {
  for (int64_t r = 0; r < matrix.rows(); ++r) {
    for (int64_t block = 0; block < matrix.cols(); block += kRotation) {
      T* x = matrix.row(r) + block;
      for (int64_t half = 1; half < kRotation; half *= 2) {
        for (int64_t i = 0; i < kRotation; i += 2 * half) add_subtract(x + i, x + i + half, half);
      }
      for (int64_t i = 0; i < kRotation; ++i) x[i] *= static_cast<T>(kNorm);
    }
  }
}

template <class T>
void rotate_rows(MatrixView<T> matrix) {
  const int64_t cols = matrix.cols();
  for (int64_t block = 0; block < matrix.rows(); block += kRotation) {
    for (int64_t half = 1; half < kRotation; half *= 2) {
      for (int64_t i = 0; i < kRotation; ++i) {
        if ((i & half) == 0) add_subtract(matrix.row(block + i), matrix.row(block + i + half), cols);
      }
    }
    for (int64_t i = 0; i < kRotation; ++i) {
      T* row = matrix.row(block + i);
      for (int64_t c = 0; c < cols; ++c) row[c] *= static_cast<T>(kNorm);
    }
  }
}

template void rotate_columns(MatrixView<float> matrix);
template void rotate_columns(MatrixView<double> matrix);
template void rotate_rows(MatrixView<float> matrix);
template void rotate_rows(MatrixView<double> matrix);

Scales unit_scales(int64_t n, int64_t k) {
  const uint16_t one = f16_from_float(1);
  return {std::vector<uint16_t>(static_cast<size_t>(k), one),
          std::vector<uint16_t>(static_cast<size_t>(n), one)};
}

void fit_rows(MatrixView<const float> columns, int64_t first_row, std::span<const float> shrink,
              double target, Scales& scales) {
  const int64_t rows = columns.cols();
  std::vector<double> squares(static_cast<size_t>(rows), 0.0);
  for (int64_t c = 0; c < columns.rows(); ++c) {
    const float* value = columns.row(c);
    for (int64_t r = 0; r < rows; ++r) squares[static_cast<size_t>(r)] += double{value[r]} * double{value[r]};
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double rms = std::sqrt(squares[static_cast<size_t>(r)] / static_cast<double>(columns.rows()));
    const double factor = shrink.empty() ? 1.0 : double{shrink[static_cast<size_t>(r)]};
    scales.output[static_cast<size_t>(first_row + r)] = stored(factor * rms / target, "row", first_row + r);
  }
}

void fit_outputs(std::span<double> squares, int64_t k, Scales& scales) {
  double mean = 0;
  for (double& square : squares) {
    square = std::sqrt(square / static_cast<double>(k));
    mean += square / static_cast<double>(squares.size());
  }
  for (size_t j = 0; j < squares.size(); ++j) {
    const auto r = static_cast<int64_t>(j);
    const double scale = mean > 0 ? squares[j] / mean : 0;
    scales.output[j] = stored(sign_of(kOutputSigns, r) * scale, "row", r);
    const double kept = std::abs(double{float_from_f16(scales.output[j])});
    squares[j] = kept > 0 ? 1 / kept : 0;
  }
}

void fit_inputs(std::span<const double> squares, int64_t n, float shrink, double target, Scales& scales) {
  for (size_t j = 0; j < squares.size(); ++j) {
    const auto c = static_cast<int64_t>(j);
    const double rms = std::sqrt(squares[j] / static_cast<double>(n));
    scales.input[j] = stored(sign_of(kInputSigns, c) * double{shrink} * rms / target, "column", c);
  }
}

void fit_both(MatrixView<const float> columns, float shrink, double target, Scales& scales) {
  const int64_t k = columns.rows();
  const int64_t n = columns.cols();
  std::vector<double> output(static_cast<size_t>(n), 0.0);
  for (int64_t c = 0; c < k; ++c) {
    const float* value = columns.row(c);
    for (int64_t r = 0; r < n; ++r) output[static_cast<size_t>(r)] += double{value[r]} * double{value[r]};
  }
  fit_outputs(output, k, scales);
  std::vector<double> input(static_cast<size_t>(k), 0.0);
  for (int64_t c = 0; c < k; ++c) {
    const float* value = columns.row(c);
    for (int64_t r = 0; r < n; ++r) {
      const double left = double{value[r]} * output[static_cast<size_t>(r)];
      input[static_cast<size_t>(c)] += left * left;
    }
  }
  fit_inputs(input, n, shrink, target, scales);
}

void widen(double factor, Scales& scales) {
  if (factor == 1) return;
  for (size_t j = 0; j < scales.output.size(); ++j) {
    scales.output[j] =
        stored(double{float_from_f16(scales.output[j])} / factor, "row", static_cast<int64_t>(j));
  }
}

std::vector<int64_t> trial_tile_rows(int64_t count) {
  const int64_t taken = std::clamp<int64_t>(count / 2, 1, 8);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < taken; ++i) rows.push_back((2 * i + 1) * count / (2 * taken));
  return rows;
}

double best_factor(std::span<const double> factors, std::span<const double> losses) {
  const auto least = static_cast<size_t>(std::ranges::min_element(losses) - losses.begin());
  if (factors.size() < 3 || !(losses[least] > 0)) return factors[least];
  // Least squares for y = a + b x + c x^2 around the mean of x, of logarithms.
  const auto count = static_cast<double>(factors.size());
  double center = 0;
  for (const double factor : factors) center += std::log(factor) / count;
  double x2 = 0, x3 = 0, x4 = 0, y0 = 0, y1 = 0, y2 = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    const double x = std::log(factors[i]) - center;
    const double y = std::log(losses[i]);
    x2 += x * x;
    x3 += x * x * x;
    x4 += x * x * x * x;
    y0 += y;
    y1 += x * y;
    y2 += x * x * y;
  }
  // From the normal equations, with the sum of x zero.
  const double left = x4 - x2 * x2 / count - (x2 > 0 ? x3 * x3 / x2 : 0);
  const double c = (y2 - x2 * y0 / count - x3 * y1 / x2) / left;
  const double b = (y1 - c * x3) / x2;
  const auto [low, high] = std::ranges::minmax(factors);
  if (!(left > 1e-12) || !(c > 0) || !std::isfinite(b / c)) return factors[least];
  const double found = std::clamp(std::exp(center - b / (2 * c)), low, high);
  return std::round(found * 100) / 100;
}

std::vector<double> usual_ratio_factors(int half_bits) {
  if (half_bits < 4) return {0.65, 0.75, 0.85, 0.95};
  if (half_bits < 6) return {0.75, 0.85, 0.95, 1.05};
  return {0.96};
}

std::vector<double> hessian_factors(std::span<const uint16_t> scales, bool consistent) {
  std::vector<double> factors;
  double largest = 0;
  for (const uint16_t bits : scales) {
    const double scale = double{float_from_f16(bits)};
    factors.push_back(consistent ? scale : scale == 0 ? 0.0 : std::copysign(1.0, scale));
    largest = std::max(largest, std::abs(factors.back()));
  }
  for (double& factor : factors) factor = largest > 0 ? factor / largest : 1;
  return factors;
}

uint16_t refitted_scale(uint16_t scale, double with_original, double with_decoded) {
  return multiplied_scale(scale, with_decoded > 0 ? with_original / with_decoded : 1);
}

double factor_between(uint16_t before, uint16_t after) {
  return before == after ? 1 : double{float_from_f16(after)} / double{float_from_f16(before)};
}

uint16_t multiplied_scale(uint16_t scale, double factor) {
  if (!(factor > 0.5 && factor < 2)) return scale;
  const uint16_t changed = f16_from_float(static_cast<float>(factor * double{float_from_f16(scale)}));
  return (changed & 0x7FFFU) < 0x7C00U ? changed : scale;
}

}  // namespace quantloom::trellis
