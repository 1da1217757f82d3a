// What rounding needs of a whole batch before it begins: the range of its values, and its outlier columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// The words of a range: bits of the largest float32 below and above 0, and 1 if any value is not finite or
// 2^127 and more in magnitude.
inline constexpr int kRangeWords = 3;

// range [kRangeWords] of all values but outliers; outlier_index: an outlier_index(), or null.
void find_range(const CudaMatrix& x, const void* outlier_index, uint32_t* range, cudaStream_t stream);

// index [outlier_index_words(k, k)]: that of the columns that reach `threshold` in any token; count [1].
void find_outliers(const CudaMatrix& x, float threshold, int32_t* index, int32_t* count, cudaStream_t stream);

}  // namespace quantloom::cuda
