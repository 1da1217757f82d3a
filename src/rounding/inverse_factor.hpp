// The factor of the inverse Hessian that error feedback walks along.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "quantloom/calibration/hessian.hpp"

namespace quantloom {

// Upper triangular U with H^-1 = U^T U for the damped Hessian with rows and columns in a given order.
// H is first divided by the mean of its diagonal over live columns: error feedback does not depend on the
// scale of U. Dead columns have 1 on the diagonal.
//
// Memory: one float64 [k, k] buffer (8 k^2 bytes), in which H is factored, inverted and at last narrowed to
// float32 in place; plus 128 columns of float64 while inverting.
class InverseFactor {
 public:
  // order [k]: the column at each position. Tries `damping`, then each larger value of `ladder`; throws
  // NumericError listing them if no factorization succeeds, and naming `argument`.
  InverseFactor(const Hessian& hessian, std::span<const int64_t> order, double damping,
                std::span<const double> ladder, int threads, std::string_view argument = "hessian");

  // [k, k], zero below the diagonal.
  MatrixView<const float> upper() const {
    return {reinterpret_cast<const float*>(buffer_.get()), k_, k_, 2 * k_};
  }
  const std::vector<double>& damping_tried() const { return damping_tried_; }

 private:
  bool factorize(const Hessian& hessian, std::span<const int64_t> order, double damping, int threads);
  double* doubles() const { return reinterpret_cast<double*>(buffer_.get()); }

  struct Free {
    void operator()(std::byte* memory) const;
  };
  int64_t k_;
  double mean_ = 0;  // of the live columns' diagonal entries, times tokens
  std::unique_ptr<std::byte, Free> buffer_;
  std::vector<double> damping_tried_;
};

// Throws InvalidArgument or NumericError, naming `argument`, unless `hessian` can be one: k inputs, tokens,
// finite entries, a diagonal >= 0 that is not all zero, and nothing but zeros in the rows of zero diagonal
// entries.
void require_usable(const Hessian& hessian, int64_t k, std::string_view argument = "hessian");

}  // namespace quantloom
