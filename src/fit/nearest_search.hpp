// The search for nearest centroids: what the loops of each instruction set work on.
#pragma once

#include <cstdint>
#include <vector>

#include "quantloom/fit/kmeans.hpp"

namespace quantloom::fit {

constexpr int64_t kBlockEntries = 16;  // centroids whose least score is taken at once
constexpr int64_t kTileRows = 64;      // rows that go through the codebook together

// The definition of the distance; every search agrees with it.
inline double squared_distance(const float* x, const float* centroid, int64_t d) {
  double sum = 0;
  for (int64_t j = 0; j < d; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(centroid[j]);
    sum += difference * difference;
  }
  return sum;
}

struct SearchJob {
  MatrixView<const float> x;
  MatrixView<const float> centroids;
  int32_t* codes = nullptr;
  int dims = 0;        // d, padded with zeros to 1, 2, 4, 8 or 16
  int64_t blocks = 0;  // of kBlockEntries centroids; the last is padded with entries that score high
  float factor = 1;    // power of two by which values are multiplied, so that squares stay in range
  const float* table = nullptr;  // [blocks][1 + dims][kBlockEntries]: |c|^2, then -2 c, times the factor
};

// Finds the codes of rows [first, last).
void search_rows(const SearchJob& job, int64_t first, int64_t last);

}  // namespace quantloom::fit
