// The steps that rounding to a rotated trellis is made of on the device. Each enqueues work on a stream and
// returns. The basis is that of trellis_basis.hpp, with the same sequence of operations for each value.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// Rotations take blocks of 128; sizes of rotated matrices are multiples of it.
inline constexpr int kRotationBlock = 128;

// dead: by column, not 0 where weights count as 0; null for none.

// squares [rows]: of each row.
void sum_row_squares(const CudaMatrix& w, const uint8_t* dead, double* squares, cudaStream_t stream);
// squares [cols]: of each column, row r times row_factors[r] before it is squared.
void sum_column_squares(const CudaMatrix& w, const uint8_t* dead, const double* row_factors, double* squares,
                        cudaStream_t stream);
// out [rows, cols]: w over the scales of its columns and rows, 0 where they are and beyond w.
void divide_by_scales(const CudaMatrix& w, const uint8_t* dead, const float* input, const float* output,
                      float* out, int64_t rows, int64_t cols, cudaStream_t stream);
// out [n, k]: of rotated [.., stride], row r and column c times output[r] and input[c].
void multiply_by_scales(const float* rotated, int64_t stride, const float* input, const float* output,
                        float* out, int64_t n, int64_t k, cudaStream_t stream);

// out [rows, k]: row r is row chosen[r] of `from` [.., k] times factors[r].
void take_rows(const float* from, int64_t k, const int32_t* chosen, const float* factors, float* out,
               int64_t rows, cudaStream_t stream);

// Each row's blocks of 128 columns, and each column's blocks of 128 rows, in place.
void rotate_columns(float* matrix, int64_t rows, int64_t cols, cudaStream_t stream);
void rotate_columns(double* matrix, int64_t rows, int64_t cols, cudaStream_t stream);
void rotate_rows(float* matrix, int64_t rows, int64_t cols, cudaStream_t stream);
void rotate_rows(double* matrix, int64_t rows, int64_t cols, cudaStream_t stream);

// out [size, size]: sum [k, k] with row and column i times factors[i], 0 beyond k.
void scale_both_sides(const double* sum, int64_t k, const double* factors, double* out, int64_t size,
                      cudaStream_t stream);
// Each pair of entries across the diagonal becomes its mean.
void make_symmetric(double* matrix, int64_t size, cudaStream_t stream);

// errors [n, errors_stride], 16 columns from `errors` on: e with e U = values - decoded, for the triangle U
// of the 16 positions; values [n, stride] and upper [.., upper_stride] point to the first of them, decoded is
// [n, 16].
void solve_step(const float* values, int64_t stride, const float* decoded, const float* upper,
                int64_t upper_stride, float* errors, int64_t errors_stride, int64_t n, cudaStream_t stream);

// with_original, with_decoded [n]: of row r of product [n, k], the sums of its products with w and with
// decoded [n, k].
void dot_rows(const float* product, const CudaMatrix& w, const float* decoded, double* with_original,
              double* with_decoded, cudaStream_t stream);

// errors [rows, k]: w - decoded from row first_row on; partial_squares [kErrorBlocks] takes sums of squares.
void subtract_rows(const CudaMatrix& w, const float* decoded, int64_t first_row, int64_t rows, double* errors,
                   double* partial_squares, cudaStream_t stream);

// sums [k]: of columns of a and b [n, k], the sums of a's entries times b's.
void dot_columns(const float* a, const float* b, int64_t n, int64_t k, double* sums, cudaStream_t stream);

// form [k, k]: gram o sum / largest, of `gram` the lower triangle of columns, as cuBLAS leaves its upper one.
// diagonal_factor: what the diagonal is multiplied by; zeros there become 1 unless that is 1.
void weigh_gram(const float* gram, const double* sum, double largest, double diagonal_factor, double* form,
                int64_t k, cudaStream_t stream);

// products [k]: of row r of form [k, k] with `values`, times values[r].
void quadratic_terms(const double* form, const double* values, int64_t k, double* products,
                     cudaStream_t stream);

// out [n, k]: w - decoded.
void subtract_narrow(const CudaMatrix& w, const float* decoded, float* out, cudaStream_t stream);

// to [count]: float(from * factor).
void narrow(const double* from, double factor, float* to, int64_t count, cudaStream_t stream);

}  // namespace quantloom::cuda
