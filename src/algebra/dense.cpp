#include "algebra/dense.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "algebra/dense_tiles.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::algebra {

extern const TileTable tiles_baseline;
#if defined(__x86_64__)
extern const TileTable tiles_avx2;
extern const TileTable tiles_avx512;
#endif

std::vector<const TileTable*> supported_tiles() {
  std::vector<const TileTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&tiles_avx512);
  }
  if (avx2) tables.push_back(&tiles_avx2);
#endif
  tables.push_back(&tiles_baseline);
  return tables;
}

const TileTable& tiles() {
  static const TileTable* const table = supported_tiles().front();
  return *table;
}

std::string instruction_set() {
  return tiles().name;
}

namespace {

constexpr int64_t kTile = 256;         // rows and columns of a tile of the output
constexpr int64_t kFactorBlock = 128;  // columns that a step of the factorization takes

void require(bool condition, const char* argument, int64_t got, int64_t expected) {
  if (!condition) throw InvalidArgument(argument, text_of(got), text_of(expected));
}

// Calls body(i, j) for the tiles i <= j of a triangle of `count` tiles a side.
template <class Body>
void parallel_triangle(int64_t count, int threads, const Body& body) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  pairs.reserve(static_cast<size_t>(count * (count + 1) / 2));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = i; j < count; ++j) pairs.emplace_back(i, j);
  }
  parallel_for(static_cast<int64_t>(pairs.size()), threads, [&](int64_t p) {
    body(pairs[static_cast<size_t>(p)].first, pairs[static_cast<size_t>(p)].second);
  });
}

// Copies the tile at (i, j), on or above the diagonal, to its place below it.
void mirror(MatrixView<double> sum, int64_t i, int64_t j, int64_t rows, int64_t cols) {
  constexpr int64_t kPatch = 8;  // columns a power of two apart share few cache lines: take few at a time
  for (int64_t r0 = 0; r0 < rows; r0 += kPatch) {
    for (int64_t c0 = i == j ? r0 : 0; c0 < cols; c0 += kPatch) {
      for (int64_t c = c0; c < std::min(cols, c0 + kPatch); ++c) {
        const int64_t end = std::min({rows, r0 + kPatch, i == j ? c : rows});
        for (int64_t r = r0; r < end; ++r) sum(j + c, i + r) = sum(i + r, j + c);
      }
    }
  }
}

}  // namespace

int64_t gram_tile(int64_t k) {
  return k >= 2048 ? 512 : (k >= 512 ? 256 : 128);
}

void accumulate_gram(MatrixView<const float> x, MatrixView<double> sum, int threads) {
  const int64_t k = x.cols();
  require(sum.rows() == k, "sum rows", sum.rows(), k);
  require(sum.cols() == k, "sum columns", sum.cols(), k);
  if (x.rows() == 0) return;
  const TileTable& table = tiles();
  const int64_t tile = gram_tile(k);
  parallel_triangle(ceil_div(k, tile), threads, [&](int64_t ti, int64_t tj) {
    const int64_t i = ti * tile;
    const int64_t j = tj * tile;
    const int64_t rows = std::min(tile, k - i);
    const int64_t cols = std::min(tile, k - j);
    std::vector<float> part(static_cast<size_t>(rows * cols));
    for (int64_t token = 0; token < x.rows(); token += kGramChunk) {
      const int64_t tokens = std::min(kGramChunk, x.rows() - token);
      std::fill(part.begin(), part.end(), 0.0F);
      // On the diagonal, strips that begin there: little is computed twice.
      const int64_t strip = ti == tj ? 128 : rows;
      for (int64_t r = 0; r < rows; r += strip) {
        const int64_t c = ti == tj ? r : 0;
        table.gemm_tn_f32(std::min(strip, rows - r), cols - c, tokens, 1.0F, x.row(token) + i + r, x.stride(),
                          x.row(token) + j + c, x.stride(), part.data() + r * cols + c, cols);
      }
      for (int64_t r = 0; r < rows; ++r) {
        table.add_f32_to_f64(cols, part.data() + r * cols, sum.row(i + r) + j);
      }
    }
    mirror(sum, i, j, rows, cols);
  });
}

void gemm_nt(float alpha, MatrixView<const float> a, MatrixView<const float> b, float beta,
             MatrixView<float> c, int threads) {
  require(a.cols() == b.cols(), "b columns", b.cols(), a.cols());
  require(c.rows() == a.rows(), "c rows", c.rows(), a.rows());
  require(c.cols() == b.rows(), "c columns", c.cols(), b.rows());
  if (beta != 0.0F && beta != 1.0F) throw InvalidArgument("beta", text_of(beta), "0 or 1");
  const TileTable& table = tiles();
  const int64_t tiles_across = ceil_div(c.cols(), kTile);
  parallel_for(ceil_div(c.rows(), kTile) * tiles_across, threads, [&](int64_t t) {
    const int64_t i = t / tiles_across * kTile;
    const int64_t j = t % tiles_across * kTile;
    const int64_t rows = std::min(kTile, c.rows() - i);
    const int64_t cols = std::min(kTile, c.cols() - j);
    if (beta == 0.0F) {
      for (int64_t r = 0; r < rows; ++r) std::fill_n(c.row(i + r) + j, cols, 0.0F);
    }
    table.gemm_nt_f32(rows, cols, a.cols(), alpha, a.row(i), a.stride(), b.row(j), b.stride(), c.row(i) + j,
                      c.stride());
  });
}

void gemm_tn(float alpha, MatrixView<const float> a, MatrixView<const float> b, MatrixView<float> c,
             int threads) {
  require(a.rows() == b.rows(), "b rows", b.rows(), a.rows());
  require(c.rows() == a.cols(), "c rows", c.rows(), a.cols());
  require(c.cols() == b.cols(), "c columns", c.cols(), b.cols());
  const TileTable& table = tiles();
  const int64_t tiles_across = ceil_div(c.cols(), kTile);
  parallel_for(ceil_div(c.rows(), kTile) * tiles_across, threads, [&](int64_t t) {
    const int64_t i = t / tiles_across * kTile;
    const int64_t j = t % tiles_across * kTile;
    table.gemm_tn_f32(std::min(kTile, c.rows() - i), std::min(kTile, c.cols() - j), a.rows(), alpha,
                      a.data() + i, a.stride(), b.data() + j, b.stride(), c.row(i) + j, c.stride());
  });
}

int64_t cholesky_lower(MatrixView<double> a, int threads) {
  const int64_t k = a.rows();
  require(a.cols() == k, "a columns", a.cols(), k);
  const TileTable& table = tiles();
  const int64_t lda = a.stride();
  // Right-looking: factor a diagonal block, solve for the panel below it, subtract the panel's products
  // from the rest.
  for (int64_t p = 0; p < k; p += kFactorBlock) {
    const int64_t width = std::min(kFactorBlock, k - p);
    const int64_t bad = table.cholesky_f64(width, a.row(p) + p, lda);
    if (bad >= 0) return p + bad;
    const int64_t below = p + width;
    const int64_t count = ceil_div(k - below, kTile);
    parallel_for(count, threads, [&](int64_t t) {
      const int64_t i = below + t * kTile;
      table.solve_lower_transposed_right_f64(std::min(kTile, k - i), width, a.row(p) + p, lda, a.row(i) + p,
                                             lda);
    });
    parallel_triangle(count, threads, [&](int64_t tj, int64_t ti) {
      const int64_t i = below + ti * kTile;
      const int64_t j = below + tj * kTile;
      const int64_t rows = std::min(kTile, k - i);
      const int64_t cols = std::min(kTile, k - j);
      if (ti != tj) {
        table.gemm_nt_f64(rows, cols, width, -1.0, a.row(i) + p, lda, a.row(j) + p, lda, a.row(i) + j, lda);
        return;
      }
      std::vector<double> product(static_cast<size_t>(rows * rows), 0.0);
      table.gemm_nt_f64(rows, rows, width, -1.0, a.row(i) + p, lda, a.row(i) + p, lda, product.data(), rows);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c <= r; ++c) a(i + r, i + c) += product[static_cast<size_t>(r * rows + c)];
      }
    });
  }
  return -1;
}

void invert_lower(MatrixView<double> a, int threads) {
  const int64_t k = a.rows();
  require(a.cols() == k, "a columns", a.cols(), k);
  if (k == 0) return;
  const TileTable& table = tiles();
  const int64_t lda = a.stride();
  std::vector<double> panel(static_cast<size_t>(checked_mul(k, kFactorBlock)));
  // From the last block column to the first: with X the inverse of the trailing block, already in
  // place, the column's inverse is [D^-1; -X * B * D^-1] for its diagonal block D and the part B below.
  for (int64_t p = (ceil_div(k, kFactorBlock) - 1) * kFactorBlock; p >= 0; p -= kFactorBlock) {
    const int64_t width = std::min(kFactorBlock, k - p);
    const int64_t below = p + width;
    const int64_t count = ceil_div(k - below, kFactorBlock);
    table.invert_lower_f64(width, a.row(p) + p, lda);
    parallel_for(count, threads, [&](int64_t t) {
      const int64_t i = below + t * kFactorBlock;
      const int64_t rows = std::min(kFactorBlock, k - i);
      double* out = panel.data() + (i - below) * width;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) out[r * width + c] = -a(i + r, p + c);
      }
      table.multiply_lower_right_f64(rows, width, a.row(p) + p, lda, out, width);
    });
    parallel_for(count, threads, [&](int64_t t) {
      const int64_t i = below + (count - 1 - t) * kFactorBlock;  // the longest first
      const int64_t rows = std::min(kFactorBlock, k - i);
      table.multiply_lower_left_f64(rows, width, a.row(i) + i, lda, panel.data() + (i - below) * width, width,
                                    a.row(i) + p, lda);
      if (i > below) {
        table.gemm_nn_f64(rows, width, i - below, 1.0, a.row(i) + below, lda, panel.data(), width,
                          a.row(i) + p, lda);
      }
    });
  }
}

}  // namespace quantloom::algebra
