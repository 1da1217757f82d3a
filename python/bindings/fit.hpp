// What fits on every device read from Python.
#pragma once

#include <string>

#include "arrays.hpp"
#include "quantloom/fit/kmeans.hpp"

namespace quantloom::python {

// `centroids`: null, or float32 [K, d] on the CPU, which must outlive the options.
KMeansOptions to_kmeans_options(const std::string& start, const ArrayRef* centroids, double threshold,
                                int64_t max_sweeps, bool reseed_empty, uint64_t seed, int64_t threads);

}  // namespace quantloom::python
