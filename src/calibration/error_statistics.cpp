#include "calibration/error_statistics.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "algebra/dense.hpp"
#include "algebra/dense_tiles.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

namespace {

constexpr int64_t kBandRows = 1024;  // rows of E held at a time
constexpr int64_t kColumnsPerPiece = 256;
constexpr int64_t kChunk = algebra::kGramChunk;  // rows summed in float32
constexpr int64_t kRowsPerPiece = 16;
constexpr double kTolerance = 1e-6;

// Fills rows [first_row, first_row + out.rows()) of E.
using FillErrors = std::function<void(int64_t first_row, MatrixView<float> out)>;

void add_tile_products(MatrixView<const float> errors, int64_t i, int64_t j, bool in_double,
                       MatrixView<double> gram) {
  const algebra::TileTable& table = algebra::tiles();
  const int64_t rows = gram.rows();
  const int64_t cols = gram.cols();
  std::vector<float> part;
  std::vector<double> left;
  std::vector<double> right;
  for (int64_t first = 0; first < errors.rows(); first += kChunk) {
    const int64_t depth = std::min(kChunk, errors.rows() - first);
    if (in_double) {
      left.resize(static_cast<size_t>(depth * rows));
      right.resize(static_cast<size_t>(depth * cols));
      for (int64_t r = 0; r < depth; ++r) {
        std::copy_n(errors.row(first + r) + i, rows, left.begin() + r * rows);
        std::copy_n(errors.row(first + r) + j, cols, right.begin() + r * cols);
      }
      table.gemm_tn_f64(rows, cols, depth, 1.0, left.data(), rows, right.data(), cols, gram.data(),
                        gram.stride());
      continue;
    }
    part.assign(static_cast<size_t>(rows * cols), 0.0F);
    table.gemm_tn_f32(rows, cols, depth, 1.0F, errors.row(first) + i, errors.stride(), errors.row(first) + j,
                      errors.stride(), part.data(), cols);
    table.add_f32_to_f64(rows * cols, part.data(), gram.data());
  }
}

// Sum of the element-wise product with the Hessian's tile at (i, j).
double dot_tile(MatrixView<const double> hessian, int64_t i, int64_t j, MatrixView<const double> gram) {
  double sum = 0;
  for (int64_t r = 0; r < gram.rows(); ++r) {
    const double* h = hessian.row(i + r) + j;
    const double* g = gram.row(r);
    double lanes[4] = {0, 0, 0, 0};
    int64_t c = 0;
    for (; c + 4 <= gram.cols(); c += 4) {
      for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += h[c + lane] * g[c + lane];
    }
    for (; c < gram.cols(); ++c) lanes[0] += h[c] * g[c];
    sum += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
  return sum;
}

struct Traces {
  std::vector<double> column_energy;  // diag(E^T E)
  std::vector<double> losses;         // tr(E H E^T), not yet divided by tokens
};

Traces traces(int64_t n, int64_t k, const FillErrors& fill, std::span<const Hessian* const> hessians,
              bool in_double, int threads) {
  Traces result;
  result.column_energy.assign(static_cast<size_t>(k), 0.0);
  result.losses.assign(hessians.size(), 0.0);
  const int64_t size = algebra::gram_tile(k);
  const int64_t side = ceil_div(k, size);
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t j = hessians.empty() ? side : i; j < side; ++j) tiles.emplace_back(i * size, j * size);
  }
  std::vector<double> parts(tiles.size() * hessians.size());
  std::vector<float> band(static_cast<size_t>(checked_mul(std::min(n, kBandRows), k)));
  for (int64_t first = 0; first < n; first += kBandRows) {
    const MatrixView<float> errors(band.data(), std::min(kBandRows, n - first), k);
    parallel_for(ceil_div(errors.rows(), kRowsPerPiece), threads, [&](int64_t piece) {
      const int64_t row = piece * kRowsPerPiece;
      fill(first + row, errors.block(row, 0, std::min(kRowsPerPiece, errors.rows() - row), k));
    });
    parallel_for(ceil_div(k, kColumnsPerPiece), threads, [&](int64_t piece) {
      const int64_t end = std::min(k, (piece + 1) * kColumnsPerPiece);
      for (int64_t r = 0; r < errors.rows(); ++r) {
        const float* e = errors.row(r);
        for (int64_t c = piece * kColumnsPerPiece; c < end; ++c) {
          result.column_energy[static_cast<size_t>(c)] +=
              static_cast<double>(e[c]) * static_cast<double>(e[c]);
        }
      }
    });
    parallel_for(static_cast<int64_t>(tiles.size()), threads, [&](int64_t t) {
      const auto [i, j] = tiles[static_cast<size_t>(t)];
      const int64_t rows = std::min(size, k - i);
      const int64_t cols = std::min(size, k - j);
      std::vector<double> gram(static_cast<size_t>(rows * cols), 0.0);
      add_tile_products(errors, i, j, in_double, {gram.data(), rows, cols});
      for (size_t h = 0; h < hessians.size(); ++h) {
        const double sum = dot_tile(hessians[h]->sum(), i, j, {gram.data(), rows, cols});
        parts[static_cast<size_t>(t) * hessians.size() + h] = i == j ? sum : 2 * sum;
      }
    });
    for (size_t t = 0; t < tiles.size(); ++t) {
      for (size_t h = 0; h < hessians.size(); ++h) result.losses[h] += parts[t * hessians.size() + h];
    }
  }
  return result;
}

// What float32 products may have cost a loss: their rounding errors, taken as independent, each weighted
// by its entry of the Hessian, with a margin for rows of E that resemble each other.
double float_error_bound(int64_t n, std::span<const double> column_energy, const Hessian& hessian,
                         int threads) {
  constexpr double kMargin = 16;
  const int64_t k = hessian.k();
  std::vector<double> rows(static_cast<size_t>(k));
  parallel_for(ceil_div(k, kColumnsPerPiece), threads, [&](int64_t tile) {
    for (int64_t i = tile * kColumnsPerPiece; i < std::min(k, (tile + 1) * kColumnsPerPiece); ++i) {
      const double* h = hessian.sum().row(i);
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += h[j] * h[j] * column_energy[static_cast<size_t>(j)];
      rows[static_cast<size_t>(i)] = sum * column_energy[static_cast<size_t>(i)];
    }
  });
  const double variance = std::accumulate(rows.begin(), rows.end(), 0.0);
  const double depth = static_cast<double>(std::min(n, kChunk)) / static_cast<double>(n);
  return kMargin * 0x1p-24 * std::sqrt(variance * depth);
}

ErrorStatistics statistics(int64_t n, int64_t k, const FillErrors& fill,
                           std::span<const Hessian* const> hessians, int threads) {
  for (const Hessian* hessian : hessians) require_hessian(*hessian, k, "hessian");
  ErrorStatistics result;
  result.proxy_losses.assign(hessians.size(), 0.0);
  if (n == 0 || k == 0) return result;
  Traces found = traces(n, k, fill, hessians, false, threads);
  result.mean_squared_error = std::accumulate(found.column_energy.begin(), found.column_energy.end(), 0.0) /
                              (static_cast<double>(n) * static_cast<double>(k));
  bool accurate = true;
  for (size_t h = 0; h < hessians.size(); ++h) {
    const double bound = float_error_bound(n, found.column_energy, *hessians[h], threads);
    accurate = accurate && bound <= kTolerance * std::abs(found.losses[h]);  // false for NaN too
  }
  if (!accurate) found = traces(n, k, fill, hessians, true, threads);
  for (size_t h = 0; h < hessians.size(); ++h) {
    result.proxy_losses[h] = found.losses[h] / static_cast<double>(hessians[h]->tokens());
  }
  return result;
}

// out = row r of w, minus out
void subtract_from_row(const FloatMatrix& w, int64_t r, std::span<float> scratch, float* out) {
  w.read(r, 0, w.cols(), scratch.data());
  for (size_t c = 0; c < scratch.size(); ++c) out[c] = scratch[c] - out[c];
}

}  // namespace

void require_hessian(const Hessian& hessian, int64_t k, std::string_view argument) {
  if (hessian.k() != k) {
    throw InvalidArgument(argument, text_of(hessian.k(), " inputs"), text_of(k, " inputs, as in w"));
  }
  if (hessian.tokens() <= 0) throw InvalidArgument(argument, "0 tokens", "a Hessian of at least one token");
}

ErrorStatistics error_statistics(const FloatMatrix& w, MatrixView<const float> decoded,
                                 std::span<const Hessian* const> hessians, int threads) {
  if (decoded.rows() != w.rows() || decoded.cols() != w.cols()) {
    throw InvalidArgument("decoded", text_of("shape [", decoded.rows(), ", ", decoded.cols(), "]"),
                          text_of("the shape of w, [", w.rows(), ", ", w.cols(), "]"));
  }
  const FillErrors fill = [&](int64_t first_row, MatrixView<float> out) {
    std::vector<float> scratch(static_cast<size_t>(w.cols()));
    for (int64_t r = 0; r < out.rows(); ++r) {
      std::copy_n(decoded.row(first_row + r), w.cols(), out.row(r));
      subtract_from_row(w, first_row + r, scratch, out.row(r));
    }
  };
  return statistics(w.rows(), w.cols(), fill, hessians, threads);
}

ErrorStatistics error_statistics(const FloatMatrix& w, const PackedTensor& packed,
                                 std::span<const Hessian* const> hessians, int threads) {
  if (packed.n != w.rows() || packed.k != w.cols()) {
    throw InvalidArgument("packed", text_of("shape [", packed.n, ", ", packed.k, "]"),
                          text_of("the shape of w, [", w.rows(), ", ", w.cols(), "]"));
  }
  const FillErrors fill = [&](int64_t first_row, MatrixView<float> out) {
    packed.format->decode(packed, first_row, out);
    std::vector<float> scratch(static_cast<size_t>(w.cols()));
    for (int64_t r = 0; r < out.rows(); ++r) subtract_from_row(w, first_row + r, scratch, out.row(r));
  };
  return statistics(w.rows(), w.cols(), fill, hessians, threads);
}

std::vector<float> column_weights(const Hessian& hessian) {
  const std::vector<double> diagonal = hessian.diagonal();
  const double largest = diagonal.empty() ? 0.0 : *std::max_element(diagonal.begin(), diagonal.end());
  std::vector<float> weights(diagonal.size());
  for (size_t j = 0; j < diagonal.size(); ++j) {
    weights[j] = largest > 0 ? static_cast<float>(std::max(diagonal[j], 0.0) / largest) : 1.0F;
  }
  return weights;
}

double proxy_loss(const FloatMatrix& w, MatrixView<const float> decoded, const Hessian& hessian,
                  int threads) {
  const Hessian* const one[] = {&hessian};
  require_finite(w, "w", threads);
  require_finite(decoded, "decoded", threads);
  return error_statistics(w, decoded, one, threads).proxy_losses[0];
}

double proxy_loss(const FloatMatrix& w, MatrixView<const float> decoded, const Hessian& hessian,
                  const Hessian& output_hessian, int threads) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  require_hessian(hessian, k, "hessian");
  require_hessian(output_hessian, n, "output_hessian");
  if (decoded.rows() != n || decoded.cols() != k) {
    throw InvalidArgument("decoded", text_of("[", decoded.rows(), ", ", decoded.cols(), "]"),
                          text_of("[", n, ", ", k, "], as w"));
  }
  require_finite(w, "w", threads);
  require_finite(decoded, "decoded", threads);
  if (n == 0 || k == 0) return 0;
  // In units of the largest entry of the diagonal: float32 holds those of tiny gradients too.
  double unit = 1;
  const auto narrowed = [&](const Hessian& h) {
    const std::vector<double> diagonal = h.diagonal();
    const double largest = *std::ranges::max_element(diagonal) * static_cast<double>(h.tokens());
    unit *= largest / static_cast<double>(h.tokens());
    std::vector<float> narrow;
    for (int64_t r = 0; r < h.k(); ++r) {
      for (int64_t c = 0; c < h.k(); ++c) {
        narrow.push_back(largest > 0 ? static_cast<float>(h.sum()(r, c) / largest) : 0.0F);
      }
    }
    return narrow;
  };
  std::vector<float> errors(static_cast<size_t>(checked_mul(n, k)));
  for (int64_t r = 0; r < n; ++r) {
    float* const error = errors.data() + r * k;
    w.read(r, 0, k, error);
    for (int64_t c = 0; c < k; ++c) error[c] -= decoded(r, c);
  }
  std::vector<float> with_inputs(errors.size(), 0.0F);
  std::vector<float> with_outputs(errors.size(), 0.0F);
  algebra::gemm_nt(1, {errors.data(), n, k}, {narrowed(hessian).data(), k, k}, 0, {with_inputs.data(), n, k},
                   threads);
  algebra::gemm_tn(1, {narrowed(output_hessian).data(), n, n}, {errors.data(), n, k},
                   {with_outputs.data(), n, k}, threads);
  double loss = 0;
  for (size_t i = 0; i < errors.size(); ++i) loss += double{with_inputs[i]} * double{with_outputs[i]};
  return loss * unit;
}

}  // namespace quantloom
