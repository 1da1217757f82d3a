#include "quantloom/calibration/hessian.hpp"

#include <algorithm>
#include <cmath>

#include "algebra/dense.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

namespace {

// Tokens converted to float32 at a time; a multiple of the Gram chunk, so that bands change nothing.
constexpr int64_t kBand = 8 * algebra::kGramChunk;
constexpr int64_t kRowsPerPiece = 64;
constexpr double kSymmetryTolerance = 1e-6;

void require_symmetric(MatrixView<const double> sum) {
  const int64_t k = sum.rows();
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      if (!std::isfinite(sum(i, j))) {
        throw NumericError(
            text_of("hessian: got ", sum(i, j), " at row ", i, ", column ", j, ", expected finite values"));
      }
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      // Entries are compared on the scale of their rows: small ones are differences of large products.
      const double scale = std::max({std::sqrt(std::abs(sum(i, i))) * std::sqrt(std::abs(sum(j, j))),
                                     std::abs(sum(i, j)), std::abs(sum(j, i))});
      if (std::abs(sum(i, j) - sum(j, i)) > kSymmetryTolerance * scale) {
        throw NumericError(text_of("hessian: got ", sum(i, j), " at row ", i, ", column ", j, " but ",
                                   sum(j, i), " at row ", j, ", column ", i,
                                   ", expected a symmetric matrix"));
      }
    }
  }
}

}  // namespace

Hessian::Hessian(int64_t k) : k_(k) {
  if (k < 0) throw InvalidArgument("k", text_of(k), "0 or more");
  sum_.assign(static_cast<size_t>(checked_mul(checked_mul(k, k), sizeof(double)) / sizeof(double)), 0.0);
}

Hessian::Hessian(MatrixView<const double> sum, int64_t tokens) : k_(sum.rows()), tokens_(tokens) {
  if (sum.rows() != sum.cols()) {
    throw InvalidArgument("hessian", text_of("shape [", sum.rows(), ", ", sum.cols(), "]"),
                          "a square matrix");
  }
  if (tokens <= 0) throw InvalidArgument("tokens", text_of(tokens), "1 or more");
  require_symmetric(sum);
  sum_.resize(static_cast<size_t>(checked_mul(checked_mul(k_, k_), sizeof(double)) / sizeof(double)));
  for (int64_t i = 0; i < k_; ++i) std::copy_n(sum.row(i), k_, sum_.data() + i * k_);
}

void Hessian::add(const FloatMatrix& x, int threads) {
  if (x.cols() != k_) {
    throw InvalidArgument("x", text_of("shape [", x.rows(), ", ", x.cols(), "]"),
                          text_of("shape [tokens, ", k_, "]"));
  }
  resolve_threads(threads);
  require_finite(x, "x", threads);
  const MatrixView<double> sum(sum_.data(), k_, k_);
  if (x.dtype() == DType::f32) {
    algebra::accumulate_gram({static_cast<const float*>(x.data()), x.rows(), k_, x.stride()}, sum, threads);
  } else {
    std::vector<float> band(static_cast<size_t>(checked_mul(std::min(x.rows(), kBand), k_)));
    for (int64_t token = 0; token < x.rows(); token += kBand) {
      const int64_t tokens = std::min(kBand, x.rows() - token);
      parallel_for(ceil_div(tokens, kRowsPerPiece), threads, [&](int64_t piece) {
        const int64_t end = std::min(tokens, (piece + 1) * kRowsPerPiece);
        for (int64_t r = piece * kRowsPerPiece; r < end; ++r) {
          x.read(token + r, 0, k_, band.data() + r * k_);
        }
      });
      algebra::accumulate_gram({band.data(), tokens, k_}, sum, threads);
    }
  }
  tokens_ = checked_add(tokens_, x.rows());
}

std::vector<double> Hessian::diagonal() const {
  if (tokens_ == 0) throw InvalidArgument("hessian", "no tokens", "at least one token");
  std::vector<double> result(static_cast<size_t>(k_));
  for (int64_t j = 0; j < k_; ++j) {
    result[static_cast<size_t>(j)] = sum_[static_cast<size_t>(j * k_ + j)] / static_cast<double>(tokens_);
  }
  return result;
}

}  // namespace quantloom
