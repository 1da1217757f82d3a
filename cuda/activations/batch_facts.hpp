// What rounding needs of a whole batch before it begins: the range of its values, and its outlier columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// The words of a range: bits of the largest float32 below and above 0, and 1 if any value is not finite or
// 2^127 and more in magnitude.
inline constexpr int kRangeWords = 3;

// range [kRangeWords] of all values but outliers (places as in IntegerTokens, or null).
void find_range(const CudaMatrix& x, const int32_t* places, uint32_t* range, cudaStream_t stream);

// places [k]: the number of each column among those that reach `threshold` in any token, or -1; count [1].
void find_outliers(const CudaMatrix& x, float threshold, int32_t* places, int32_t* count,
                   cudaStream_t stream);

}  // namespace quantloom::cuda
