// Compiled once per instruction set; see dense_tiles.hpp. Eigen is a macro here (Eigen_avx2, ...).
#include "algebra/dense_tiles.hpp"

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <cmath>

#define QUANTLOOM_PASTE_(a, b) a##b
#define QUANTLOOM_PASTE(a, b) QUANTLOOM_PASTE_(a, b)
#define QUANTLOOM_STRING_(a) #a
#define QUANTLOOM_STRING(a) QUANTLOOM_STRING_(a)

namespace quantloom::algebra {
namespace {

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using In = Eigen::Map<const Matrix<T>, 0, Eigen::OuterStride<>>;
template <class T>
using Out = Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>>;

// Eigen picks the depth of its blocks, and with it the order of additions, by the processor's cache
// sizes. Fixed ones make results the same on all processors with the same instructions.
void fix_cache_sizes() {
  static const bool done = [] {
    Eigen::setCpuCacheSizes(std::ptrdiff_t{64} << 10, std::ptrdiff_t{1} << 20, std::ptrdiff_t{8} << 20);
    return true;
  }();
  static_cast<void>(done);
}

template <class T>
void gemm_nt(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
             int64_t ldc) {
  fix_cache_sizes();
  Out<T>(c, m, n, Eigen::OuterStride<>(ldc)).noalias() +=
      alpha *
      (In<T>(a, m, k, Eigen::OuterStride<>(lda)) * In<T>(b, n, k, Eigen::OuterStride<>(ldb)).transpose());
}

template <class T>
void gemm_tn(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
             int64_t ldc) {
  fix_cache_sizes();
  Out<T>(c, m, n, Eigen::OuterStride<>(ldc)).noalias() +=
      alpha *
      (In<T>(a, k, m, Eigen::OuterStride<>(lda)).transpose() * In<T>(b, k, n, Eigen::OuterStride<>(ldb)));
}

void gemm_nn_f64(int64_t m, int64_t n, int64_t k, double alpha, const double* a, int64_t lda, const double* b,
                 int64_t ldb, double* c, int64_t ldc) {
  fix_cache_sizes();
  Out<double>(c, m, n, Eigen::OuterStride<>(ldc)).noalias() +=
      alpha *
      (In<double>(a, m, k, Eigen::OuterStride<>(lda)) * In<double>(b, k, n, Eigen::OuterStride<>(ldb)));
}

void multiply_lower_left(int64_t m, int64_t n, const double* l, int64_t ldl, const double* b, int64_t ldb,
                         double* c, int64_t ldc) {
  fix_cache_sizes();
  Out<double>(c, m, n, Eigen::OuterStride<>(ldc)).noalias() =
      In<double>(l, m, m, Eigen::OuterStride<>(ldl)).triangularView<Eigen::Lower>() *
      In<double>(b, m, n, Eigen::OuterStride<>(ldb));
}

void multiply_lower_right(int64_t m, int64_t n, const double* l, int64_t ldl, double* b, int64_t ldb) {
  fix_cache_sizes();
  Out<double> out(b, m, n, Eigen::OuterStride<>(ldb));
  const Matrix<double> copy = out;
  out.noalias() = copy * In<double>(l, n, n, Eigen::OuterStride<>(ldl)).triangularView<Eigen::Lower>();
}

void solve_lower_transposed_right(int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
                                  int64_t ldb) {
  fix_cache_sizes();
  Out<double> out(b, m, n, Eigen::OuterStride<>(ldb));
  In<double>(l, n, n, Eigen::OuterStride<>(ldl))
      .transpose()
      .triangularView<Eigen::Upper>()
      .solveInPlace<Eigen::OnTheRight>(out);
}

// The first pivot that is not positive and finite, by the plain recursion; only run where Eigen failed.
int64_t first_bad_pivot(Matrix<double>& a) {
  const int64_t n = a.rows();
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double value = a(i, j);
      for (int64_t t = 0; t < j; ++t) value -= a(i, t) * a(j, t);
      if (i == j) {
        if (!(value > 0) || !std::isfinite(value)) return j;
        a(j, j) = std::sqrt(value);
      } else {
        a(i, j) = value / a(j, j);
      }
    }
  }
  return n - 1;  // rounding decided otherwise this time: blame the last pivot
}

int64_t cholesky(int64_t n, double* a, int64_t lda) {
  fix_cache_sizes();
  Out<double> out(a, n, n, Eigen::OuterStride<>(lda));
  Matrix<double> copy = Matrix<double>::Zero(n, n);
  copy.triangularView<Eigen::Lower>() = out;
  const Eigen::LLT<Matrix<double>, Eigen::Lower> factor(copy);
  bool good = factor.info() == Eigen::Success;
  // Eigen compares with <= 0, which NaN passes.
  for (int64_t i = 0; good && i < n; ++i) {
    const double pivot = factor.matrixLLT()(i, i);
    good = pivot > 0 && std::isfinite(pivot);
  }
  if (!good) return first_bad_pivot(copy);
  out.triangularView<Eigen::Lower>() = factor.matrixLLT();
  return -1;
}

void invert_lower(int64_t n, double* a, int64_t lda) {
  fix_cache_sizes();
  Out<double> out(a, n, n, Eigen::OuterStride<>(lda));
  Matrix<double> inverse = Matrix<double>::Identity(n, n);
  out.triangularView<Eigen::Lower>().solveInPlace(inverse);
  out.triangularView<Eigen::Lower>() = inverse;
}

void add_f32_to_f64(int64_t count, const float* part, double* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<double>(part[i]);
}

void push_column(int64_t count, int64_t rows, const float* __restrict u, const float* __restrict e,
                 float* __restrict w, int64_t ldw) {
  for (int64_t j = 0; j < count; ++j) {
    const float factor = u[j];
    float* __restrict row = w + j * ldw;
    for (int64_t r = 0; r < rows; ++r) row[r] -= factor * e[r];
  }
}

}  // namespace

extern const TileTable QUANTLOOM_PASTE(tiles_, QUANTLOOM_ALGEBRA_VARIANT);
const TileTable QUANTLOOM_PASTE(tiles_, QUANTLOOM_ALGEBRA_VARIANT) = {
    QUANTLOOM_STRING(QUANTLOOM_ALGEBRA_VARIANT),
    &gemm_nt<float>,
    &gemm_tn<float>,
    &gemm_tn<double>,
    &gemm_nn_f64,
    &gemm_nt<double>,
    &multiply_lower_left,
    &multiply_lower_right,
    &solve_lower_transposed_right,
    &cholesky,
    &invert_lower,
    &add_f32_to_f64,
    &push_column,
};

}  // namespace quantloom::algebra
