#include "rounding/inverse_factor.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <new>
#include <sstream>

#include "algebra/dense.hpp"
#include "calibration/error_statistics.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int64_t kRowsPerPiece = 16;

void for_rows(int64_t k, int threads, const std::function<void(int64_t)>& body) {
  parallel_for(ceil_div(k, kRowsPerPiece), threads, [&](int64_t piece) {
    const int64_t end = std::min(k, (piece + 1) * kRowsPerPiece);
    for (int64_t r = piece * kRowsPerPiece; r < end; ++r) body(r);
  });
}

}  // namespace

void require_usable(const Hessian& hessian, int64_t k, std::string_view argument) {
  require_hessian(hessian, k, argument);
  const MatrixView<const double> sum = hessian.sum();
  bool any_live = k == 0;
  for (int64_t i = 0; i < k; ++i) {
    const double* row = sum.row(i);
    for (int64_t j = 0; j < k; ++j) {
      if (!std::isfinite(row[j])) {
        throw NumericError(
            text_of(argument, ": got ", row[j], " at row ", i, ", column ", j, ", expected finite values"));
      }
    }
    if (row[i] < 0) {
      throw NumericError(text_of(argument, ": got ", row[i], " at row ", i, ", column ", i,
                                 ", expected a diagonal of zero or more"));
    }
    any_live = any_live || row[i] > 0;
    if (row[i] == 0) {
      for (int64_t j = 0; j < k; ++j) {
        if (row[j] != 0 || sum(j, i) != 0) {
          throw NumericError(text_of(argument, ": got ", row[j], " at row ", i, ", column ", j,
                                     ", expected 0 because the diagonal entry of row ", i, " is 0"));
        }
      }
    }
  }
  if (!any_live) {
    throw NumericError(text_of(argument, ": got a diagonal of zeros, expected at least one ",
                               argument == "hessian" ? "input" : "entry", " that is not always 0"));
  }
}

void InverseFactor::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, kAlignment);
}

InverseFactor::InverseFactor(const Hessian& hessian, std::span<const int64_t> order, double damping,
                             std::span<const double> ladder, int threads, std::string_view argument)
    : k_(hessian.k()) {
  const int64_t bytes = checked_mul(checked_mul(k_, k_), sizeof(double));
  buffer_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
  int64_t live = 0;
  double total = 0;
  for (int64_t j = 0; j < k_; ++j) {
    const double entry = hessian.sum()(j, j);
    total += entry;
    live += static_cast<int64_t>(entry > 0);
  }
  mean_ = live > 0 ? total / static_cast<double>(live) : 1.0;

  damping_tried_.push_back(damping);
  if (factorize(hessian, order, damping, threads)) return;
  for (const double value : ladder) {
    if (value <= damping) continue;
    damping_tried_.push_back(value);
    if (factorize(hessian, order, value, threads)) return;
  }
  std::ostringstream list;
  for (const double value : damping_tried_) list << (list.tellp() > 0 ? ", " : "") << value;
  throw NumericError(text_of(argument, ": got a matrix that is not positive definite with damping ",
                             list.str(),
                             ", expected one that is; more calibration tokens or more damping help"));
}

bool InverseFactor::factorize(const Hessian& hessian, std::span<const int64_t> order, double damping,
                              int threads) {
  const MatrixView<double> a(doubles(), k_, k_);
  const MatrixView<const double> sum = hessian.sum();
  // With rows and columns reversed, H = L L^T gives H^-1 = (L^-1)^T L^-1; reversed back, L^-1 is the upper
  // factor: one factorization and one inversion of a triangle, with no inverse of H in between.
  for_rows(k_, threads, [&](int64_t r) {
    const double* source = sum.row(order[static_cast<size_t>(k_ - 1 - r)]);
    double* out = a.row(r);
    for (int64_t c = 0; c < r; ++c) out[c] = source[order[static_cast<size_t>(k_ - 1 - c)]] / mean_;
    const double diagonal = source[order[static_cast<size_t>(k_ - 1 - r)]];
    out[r] = (diagonal > 0 ? diagonal / mean_ : 1.0) + damping;
  });
  if (algebra::cholesky_lower(a, threads) >= 0) return false;
  algebra::invert_lower(a, threads);

  // Narrow to float32 and flip, a pair of rows at a time: row i of U takes the memory of row i.
  std::atomic<bool> finite{true};
  const auto flipped = [&](int64_t position, float* out) {
    const double* row = a.row(k_ - 1 - position);
    std::fill_n(out, position, 0.0F);
    bool good = true;
    for (int64_t j = position; j < k_; ++j) {
      out[j] = static_cast<float>(row[k_ - 1 - j]);
      good = good && std::isfinite(out[j]);
    }
    if (!good || !(out[position] > 0)) finite = false;
  };
  const size_t row_bytes = static_cast<size_t>(k_) * sizeof(float);
  for_rows((k_ + 1) / 2, threads, [&](int64_t i) {
    const int64_t j = k_ - 1 - i;
    std::vector<float> first(static_cast<size_t>(k_));
    std::vector<float> second(static_cast<size_t>(k_));
    flipped(i, first.data());
    flipped(j, second.data());
    std::memcpy(a.row(i), first.data(), row_bytes);
    std::memcpy(a.row(j), second.data(), row_bytes);
  });
  return finite;
}

}  // namespace quantloom
