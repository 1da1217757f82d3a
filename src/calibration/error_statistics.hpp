// How far a rounded matrix is from its original, under one or more Hessians at once.
#pragma once

#include <span>
#include <vector>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

struct ErrorStatistics {
  double mean_squared_error = 0;     // of the weights; 0 for an empty matrix
  std::vector<double> proxy_losses;  // tr(E H E^T) for each Hessian
};

// Throws InvalidArgument naming `argument` unless the Hessian is of k inputs and has tokens.
void require_hessian(const Hessian& hessian, int64_t k, std::string_view argument);

// For E = w - decoded [n, k]. The products E^T E, most of the work, are shared by all Hessians.
// Losses are accurate to about 1e-6 relative; if float32 products cannot give that, float64 ones are taken.
ErrorStatistics error_statistics(const FloatMatrix& w, MatrixView<const float> decoded,
                                 std::span<const Hessian* const> hessians, int threads);
// The same for a packed matrix, decoded band by band.
ErrorStatistics error_statistics(const FloatMatrix& w, const PackedTensor& packed,
                                 std::span<const Hessian* const> hessians, int threads);

// diag(H) scaled to a largest entry of 1: how much an error in each column counts.
std::vector<float> column_weights(const Hessian& hessian);

}  // namespace quantloom
