// Tiles of dense algebra on one thread, compiled once per instruction set (dense_tiles.cpp). Only raw
// pointers cross this border: a template shared by two of the compilations would be merged by the linker,
// and then run with instructions that the processor may lack.
#pragma once

#include <cstdint>
#include <vector>

namespace quantloom::algebra {

// All matrices are row-major; ld* are strides between rows, in elements.
struct TileTable {
  const char* name;

  // c [m, n] += alpha * a [m, k] * b [n, k]^T
  void (*gemm_nt_f32)(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                      const float* b, int64_t ldb, float* c, int64_t ldc);
  // c [m, n] += alpha * a [k, m]^T * b [k, n]
  void (*gemm_tn_f32)(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                      const float* b, int64_t ldb, float* c, int64_t ldc);
  void (*gemm_tn_f64)(int64_t m, int64_t n, int64_t k, double alpha, const double* a, int64_t lda,
                      const double* b, int64_t ldb, double* c, int64_t ldc);
  // c [m, n] += alpha * a [m, k] * b [k, n]
  void (*gemm_nn_f64)(int64_t m, int64_t n, int64_t k, double alpha, const double* a, int64_t lda,
                      const double* b, int64_t ldb, double* c, int64_t ldc);
  // c [m, n] += alpha * a [m, k] * b [n, k]^T
  void (*gemm_nt_f64)(int64_t m, int64_t n, int64_t k, double alpha, const double* a, int64_t lda,
                      const double* b, int64_t ldb, double* c, int64_t ldc);
  // c [m, n] = l [m, m] * b [m, n] and b [m, n] = b * l [n, n], for a lower triangular l whose strict upper
  // triangle is not read.
  void (*multiply_lower_left_f64)(int64_t m, int64_t n, const double* l, int64_t ldl, const double* b,
                                  int64_t ldb, double* c, int64_t ldc);
  void (*multiply_lower_right_f64)(int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
                                   int64_t ldb);
  // b [m, n] = b * l [n, n]^-T; the strict upper triangle of l is not read.
  void (*solve_lower_transposed_right_f64)(int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
                                           int64_t ldb);
  // In place, on the lower triangle of a [n, n]. cholesky: -1 or the index of the first bad pivot.
  int64_t (*cholesky_f64)(int64_t n, double* a, int64_t lda);
  void (*invert_lower_f64)(int64_t n, double* a, int64_t lda);

  // sum [count] += part [count]
  void (*add_f32_to_f64)(int64_t count, const float* part, double* sum);
  // w [count, rows] -= u [count] * e [rows]^T: what one rounded column pushes onto `count` later ones.
  void (*push_column_f32)(int64_t count, int64_t rows, const float* u, const float* e, float* w, int64_t ldw);
};

// The tables that this processor can run, the best first; and the best one.
std::vector<const TileTable*> supported_tiles();
const TileTable& tiles();

}  // namespace quantloom::algebra
