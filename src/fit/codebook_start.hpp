// Starts of k-means, shared by the CPU and CUDA.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/fit/kmeans.hpp"

namespace quantloom::fit {

// The rows, of n, that a start looks at: in rising order, evenly spread. Empty: all of them.
std::vector<int64_t> start_rows(int64_t n, int64_t count, const KMeansOptions& options);

// The start made from those rows of x alone and their weights (empty: 1 each). Arguments were checked; x has
// at least one row. Not for CodebookStart::given.
std::vector<float> start_from(MatrixView<const float> x, std::span<const float> weights, int64_t count,
                              const KMeansOptions& options);

}  // namespace quantloom::fit
