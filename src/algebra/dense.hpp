// Dense algebra on unquantized data, by Eigen, in tiles of a fixed size: a tile is computed by one thread,
// so that results do not depend on the number of threads. Compiled once per instruction set; the best one
// that the processor has is picked at run time.
#pragma once

#include <cstdint>
#include <string>

#include "quantloom/matrix_view.hpp"

namespace quantloom::algebra {

// sum [k, k] += x^T x for x [tokens, k]; products in float32 over chunks of kGramChunk tokens, sums in
// float64. Both triangles are written.
inline constexpr int64_t kGramChunk = 256;
void accumulate_gram(MatrixView<const float> x, MatrixView<double> sum, int threads);
// Rows and columns of a tile of a Gram matrix [k, k]. Larger tiles pack their operands less often, smaller
// ones give more threads work; depends on k alone.
int64_t gram_tile(int64_t k);

// c [m, n] = alpha * a [m, k] * b [n, k]^T + beta * c (beta 0 or 1)
void gemm_nt(float alpha, MatrixView<const float> a, MatrixView<const float> b, float beta,
             MatrixView<float> c, int threads);
// c [m, n] += alpha * a [k, m]^T * b [k, n]
void gemm_tn(float alpha, MatrixView<const float> a, MatrixView<const float> b, MatrixView<float> c,
             int threads);

// In-place Cholesky factorization of the lower triangle of a [k, k] = L L^T; the strict upper triangle is
// neither read nor written. Returns -1, or the index of the first pivot that is not positive and finite
// (the lower triangle then holds garbage).
int64_t cholesky_lower(MatrixView<double> a, int threads);
// In-place inverse of a lower triangular matrix; the strict upper triangle is neither read nor written.
void invert_lower(MatrixView<double> a, int threads);

// The instruction set that the dispatch picked: "avx512", "avx2", "baseline".
std::string instruction_set();

}  // namespace quantloom::algebra
