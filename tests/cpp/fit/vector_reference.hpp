// The obvious versions of fits on vectors: every row against every centroid, in float64.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "quantloom/matrix_view.hpp"
#include "test_matrices.hpp"

namespace quantloom::testing {

struct VectorCase {
  std::vector<float> values;
  std::vector<float> entries;
  MatrixView<const float> x;          // [n, d]
  MatrixView<const float> centroids;  // [K, d]

  VectorCase(std::vector<float> values_in, std::vector<float> entries_in, int64_t d)
      : values(std::move(values_in)), entries(std::move(entries_in)) {
    x = {values.data(), static_cast<int64_t>(values.size()) / d, d};
    centroids = {entries.data(), static_cast<int64_t>(entries.size()) / d, d};
  }
  VectorCase(VectorCase&&) = default;  // keeps the addresses
  VectorCase& operator=(VectorCase&&) = default;
};

inline VectorCase make_vectors(int64_t n, int64_t entries, int64_t d, uint64_t seed) {
  return {normal_values(n * d, seed), normal_values(entries * d, seed + 1000000), d};
}

inline std::vector<int32_t> reference_codes(MatrixView<const float> x, MatrixView<const float> centroids) {
  std::vector<int32_t> codes;
  for (int64_t r = 0; r < x.rows(); ++r) {
    int32_t best = 0;
    double least = -1;
    for (int64_t k = 0; k < centroids.rows(); ++k) {
      double distance = 0;
      for (int64_t j = 0; j < x.cols(); ++j) {
        const double difference = static_cast<double>(x(r, j)) - static_cast<double>(centroids(k, j));
        distance += difference * difference;
      }
      if (k == 0 || distance < least) {
        least = distance;
        best = static_cast<int32_t>(k);
      }
    }
    codes.push_back(best);
  }
  return codes;
}

// One update of all centroids.
inline std::vector<float> reference_update(MatrixView<const float> x, std::span<const float> weights,
                                           const std::vector<float>& centroids,
                                           std::span<const int32_t> codes) {
  const auto d = static_cast<size_t>(x.cols());
  std::vector<double> sums(centroids.size());
  std::vector<double> mass(centroids.size() / d);
  for (size_t r = 0; r < codes.size(); ++r) {
    const double weight = weights.empty() ? 1.0 : static_cast<double>(weights[r]);
    const auto code = static_cast<size_t>(codes[r]);
    mass[code] += weight;
    for (size_t j = 0; j < d; ++j) {
      sums[code * d + j] += weight * static_cast<double>(x(static_cast<int64_t>(r), static_cast<int64_t>(j)));
    }
  }
  std::vector<float> result = centroids;
  for (size_t i = 0; i < result.size(); ++i) {
    if (mass[i / d] > 0) result[i] = static_cast<float>(sums[i] / mass[i / d]);
  }
  return result;
}

}  // namespace quantloom::testing
