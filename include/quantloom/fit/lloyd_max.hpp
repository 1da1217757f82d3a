// Scalar Lloyd-Max: the table of values with the least (weighted) squared error on a sample, up to the local
// optimum that the start leads to (Lloyd, 1982; Max, 1960). Exact on sorted values: a sweep costs O(K log n).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "quantloom/fit/sorted_values.hpp"

namespace quantloom {

enum class TableStart : uint8_t {
  given,             // LloydMaxOptions::centroids
  quantile,          // the middles of K ranges of equal weight
  kmeans_plus_plus,  // each centroid drawn with probability proportional to its weighted squared error
                     // (Arthur and Vassilvitskii, 2007)
  cube_root,         // density proportional to the cube root of the sample's (Panter and Dite, 1951)
  uniform_minmax,    // evenly spaced from the least to the largest value
  uniform_rms,       // evenly spaced within mean -+ width * standard deviation
  random             // values at places drawn without repetition
};

// "given", "quantile", "kmeans++", "cuberoot", "uniform_minmax", "uniform_rms", "random".
std::string_view name_of(TableStart start);
TableStart table_start_from_name(std::string_view name);  // throws InvalidArgument for an unknown name

struct LloydMaxOptions {
  TableStart start = TableStart::kmeans_plus_plus;
  std::vector<float> centroids;  // of the start `given`: K finite, ascending values
  double width = 3;              // of the start `uniform_rms`, > 0
  double threshold = 1e-4;       // in [0, 1]: ends once at most this fraction of the values changes its cell
  int64_t max_sweeps = 10000;    // >= 0
  uint64_t seed = 0;             // of the starts kmeans_plus_plus and random
};

struct LloydMaxResult {
  std::vector<float> centroids;  // ascending; equal ones where the sample has fewer than K distinct values
  int64_t sweeps = 0;            // updates of all centroids
  double changed = 1;            // fraction of values that changed their cell in the last sweep
  bool converged = false;        // changed <= threshold
  double squared_error = 0;      // sum of weight * (value - nearest centroid)^2
};

// The start alone: K = count ascending centroids.
std::vector<float> start_table(const SortedValues& sample, int64_t count, const LloydMaxOptions& options);

// Fits `count` centroids, 1 to 65536. A value exactly between two centroids belongs to the lower one;
// boundaries are midpoints in float32. A cell without weight keeps its centroid. Throws InvalidArgument,
// naming the option, for anything out of range and for an empty sample (unless the start is `given`, which it
// then returns).
LloydMaxResult lloyd_max(const SortedValues& sample, int64_t count, const LloydMaxOptions& options);

}  // namespace quantloom
