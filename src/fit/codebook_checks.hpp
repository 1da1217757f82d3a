// Checks of vectors and codebooks, shared by the CPU and CUDA.
#pragma once

#include <span>
#include <string>

#include "quantloom/fit/kmeans.hpp"

namespace quantloom::fit {

// Throws InvalidArgument unless d is in 1..16.
void require_dims(int64_t d, const std::string& argument);
// Throws InvalidArgument unless the matrix has shape [1..65536, d].
void require_codebook(MatrixView<const float> centroids, int64_t d, const std::string& argument);
// Throws InvalidArgument naming what is out of range; reads no values.
void require_options(int64_t count, const KMeansOptions& options);

// The largest |value|; 0 for none. Throws NumericError naming the first value that is not finite.
float largest_magnitude(MatrixView<const float> values, const std::string& argument, int threads);
// The largest weight, after the checks of `weights` for a sample of `rows`; 1 if empty.
float largest_weight(std::span<const float> weights, int64_t rows, int threads);

}  // namespace quantloom::fit
