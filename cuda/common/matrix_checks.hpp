// Whole-array work that rounding and calibration share: finding values that are not finite, and sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// No element found: the key of finds that take the least one.
inline constexpr uint64_t kNoneFound = ~uint64_t{0};

// Takes the least key, (r * cols + c) * 4 + kind, of values that are not finite; kind: 0 Inf, 1 -Inf, 2 NaN.
// Keys begin at first_row.
void find_non_finite(const CudaMatrix& matrix, int64_t first_row, uint64_t* key, cudaStream_t stream);
// Waits for the stream. Throws NumericError naming `argument`, row and column if a key was found.
void require_none_found(const uint64_t* key, int64_t cols, const std::string& argument,
                        const std::string& rows, cudaStream_t stream);
// Both: throws NumericError unless all values are finite.
void require_finite_cuda(const CudaMatrix& matrix, const std::string& argument, cudaStream_t stream);

// out [1] = the sum of values [count], always in the same order.
void sum_values(const double* values, int64_t count, double* out, cudaStream_t stream);

}  // namespace quantloom::cuda
