// Weights that are kept beside a dense format, on the device: those that a search on the walk of error
// feedback leaves out, and the largest ones of a matrix. Each function enqueues work on a stream and returns,
// unless it says otherwise.
#pragma once

#include <cstdint>
#include <vector>

#include "rounding/device_encoder.hpp"

namespace quantloom::cuda {

// energies [k]: the sum of squares of each column, in float64 in the order of the rows.
void column_energies(const CudaMatrix& w, double* energies, cudaStream_t stream);

// out [n, columns of the task]: the values of each row and group, outliers replaced by the mean of the
// others, as without_outliers() does it on the CPU, operation by operation. weights: by column of the task's
// matrix.
void leave_outliers_out(const FitTask& task, const float* weights, int bits, double threshold, float* out,
                        cudaStream_t stream);

// The `count` weights of the largest magnitude, of equals the first: missing [n, k] becomes 0 there and
// kNoOutlier elsewhere, masked [n, k] the weights with 0 there. Waits for the stream.
void mask_largest(const CudaMatrix& w, int64_t count, float* masked, uint16_t* missing, cudaStream_t stream);

// Where missing [n, k] is not kNoOutlier, it becomes what w is beyond what its code decodes to, in float16;
// overflow [1] takes the least row * k + column that float16 does not hold.
void measure_missing(const CudaMatrix& w, const CodeMatrix& matrix, uint16_t* missing,
                     unsigned long long* overflow, cudaStream_t stream);

// Waits for the stream. Throws the NumericError of an outlier that float16 does not hold, if there is one;
// column_at [k] says which column lies at a place of a row of `missing`, empty for its own.
void require_no_overflow(const unsigned long long* overflow, int64_t k, const std::vector<int32_t>& column_at,
                         cudaStream_t stream);

// How many outliers each row has. Waits for the stream.
std::vector<int32_t> count_outliers(const uint16_t* missing, int64_t n, int64_t k, cudaStream_t stream);
// Writes the planes outlier_offsets, outlier_columns and outlier_values, of these counts. position [k]: where
// a column lies in a row of `missing`; null: at the column. Waits for the stream.
void store_outliers(const uint16_t* missing, const int32_t* position, const std::vector<int32_t>& counts,
                    PackedTensor& packed, cudaStream_t stream);

}  // namespace quantloom::cuda
