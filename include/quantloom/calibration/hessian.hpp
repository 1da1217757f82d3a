// The Hessian of a linear layer's squared output error, H = X^T X / tokens, gathered in a stream: no
// activation is kept.
#pragma once

#include <cstdint>
#include <vector>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

// Accumulates sum over tokens of x x^T for inputs x of k features. Products are taken in float32 over
// chunks of a fixed number of tokens and summed in float64, so that the result depends on the sequence of
// tokens in add() calls only, not on threads.
class Hessian {
 public:
  explicit Hessian(int64_t k);
  // A Hessian given as a whole: `sum` [k, k], symmetric to 1e-6 relative; divided by `tokens` on use.
  Hessian(MatrixView<const double> sum, int64_t tokens);

  // x [tokens, k]. Throws InvalidArgument on a wrong width, NumericError naming row and column for NaN
  // or Inf; nothing is added then.
  void add(const FloatMatrix& x, int threads = 0);

  int64_t k() const { return k_; }
  int64_t tokens() const { return tokens_; }
  // The running sum [k, k], both triangles valid; divide by tokens() for H.
  MatrixView<const double> sum() const { return {sum_.data(), k_, k_}; }
  // diag(H) [k].
  std::vector<double> diagonal() const;

 private:
  int64_t k_ = 0;
  int64_t tokens_ = 0;
  std::vector<double> sum_;
};

// tr(E H E^T) for E = W - W' [n, k]: the mean squared output error per token, summed over out_features.
double proxy_loss(const FloatMatrix& w, MatrixView<const float> decoded, const Hessian& hessian,
                  int threads = 0);
// tr(H_out E H E^T), with a Hessian of the outputs [n]: what an error costs when errors of outputs count
// together. From float32 products: to about 1e-5 relative.
double proxy_loss(const FloatMatrix& w, MatrixView<const float> decoded, const Hessian& hessian,
                  const Hessian& output_hessian, int threads = 0);

}  // namespace quantloom
