// The obvious versions of fits on scalars: every value against every entry of a table.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace quantloom::testing {

// The code of x / scale: the number of midpoints below it.
inline size_t reference_code(std::span<const float> table, float x, float scale = 1) {
  size_t code = 0;
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    const auto midpoint =
        static_cast<float>((static_cast<double>(table[i]) + static_cast<double>(table[i + 1])) / 2);
    if (x / scale > midpoint) code = i + 1;
  }
  return code;
}

inline double weight_of(std::span<const float> weights, size_t i) {
  return weights.empty() ? 1.0 : static_cast<double>(weights[i]);
}

inline double reference_error(std::span<const float> values, std::span<const float> weights,
                              std::span<const float> table, float scale = 1) {
  double error = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double decoded = static_cast<double>(table[reference_code(table, values[i], scale)]) * scale;
    error += weight_of(weights, i) * (decoded - values[i]) * (decoded - values[i]);
  }
  return error;
}

// One update of all centroids.
inline std::vector<float> reference_sweep(std::span<const float> values, std::span<const float> weights,
                                          const std::vector<float>& centroids) {
  std::vector<double> weight(centroids.size());
  std::vector<double> sum(centroids.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t code = reference_code(centroids, values[i]);
    weight[code] += weight_of(weights, i);
    sum[code] += weight_of(weights, i) * values[i];
  }
  std::vector<float> result = centroids;
  for (size_t k = 0; k < result.size(); ++k) {
    if (weight[k] > 0) result[k] = static_cast<float>(sum[k] / weight[k]);
    if (k > 0 && result[k] < result[k - 1]) result[k] = result[k - 1];
  }
  return result;
}

}  // namespace quantloom::testing
