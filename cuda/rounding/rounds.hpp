// What the roundings on the device share on the host's side.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "quantloom/rounding/cuda.hpp"
#include "rounding/steps.hpp"

namespace quantloom::cuda {

// Throws Unsupported naming the format unless it is uniform or a codebook.
const GroupedFormat& require_scalar(const PackedTensor& packed, std::string_view function);
void require_same_shape(const CudaMatrix& w, const PackedTensor& packed);
void require_hessian(const CudaHessian& hessian, int64_t k, std::string_view argument);

// diag(H) scaled to a largest entry of 1.
std::vector<float> column_weights(const std::vector<double>& diagonal);

// Fills the planes of `to` from those of the same names; waits for the stream.
void copy_planes(const PackedTensor& from, PackedTensor& to, cudaStream_t stream);

// The parameters of all groups of a matrix [n, k], and whether a fit has failed.
class FittedParameters {
 public:
  // rows_next_to_each_other: [groups, n], else [n, groups].
  FittedParameters(const GroupedFormat& format, int64_t n, int64_t k, bool rows_next_to_each_other,
                   cudaStream_t stream);
  const GroupParameters& view() const { return view_; }
  bool per_tensor() const { return per_tensor_; }
  int64_t groups() const { return groups_; }
  uint64_t* failure() const { return failure_.data(); }
  // Waits for the stream. Throws the CPU's NumericError if a grid of `task` is not finite.
  void require_fitted(const FitTask& task, const SearchFactors& search,
                      const std::shared_ptr<const Format>& format, cudaStream_t stream) const;

 private:
  bool per_tensor_;
  int64_t groups_;
  GroupParameters view_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<float> zeros_;
  DeviceBuffer<uint64_t> failure_;
};

// Nearest rounding of a matrix that is not empty and has been checked; returns the mean squared error.
// weights: by column, for the scale search; null for 1.
double round_to_nearest(const CudaMatrix& w, const std::shared_ptr<const Format>& format,
                        PackedTensor& packed, const std::optional<ScaleSearch>& scale_search,
                        const float* weights, cudaStream_t stream);

struct Losses {
  double mean_squared_error = 0;
  std::vector<double> proxy_losses;  // tr(E H E^T) for each Hessian
};

// For E = w - decoded, in float64. Waits for the stream.
Losses measure_losses(const CudaMatrix& w, const PackedTensor& packed,
                      std::span<const CudaHessian* const> hessians, cudaStream_t stream);
// For E [n, k] by bands: errors_of(first_row, rows, errors, partial_squares) as measure_errors() leaves them.
using ErrorBands = std::function<void(int64_t, int64_t, double*, double*)>;
Losses measure_losses(int64_t n, int64_t k, const ErrorBands& errors_of,
                      std::span<const CudaHessian* const> hessians, cudaStream_t stream);

// Planes in scratch memory of the stream, to be dropped before it is destroyed.
PackedTensor scratch_planes(std::shared_ptr<const Format> format, int64_t n, int64_t k, cudaStream_t stream);

}  // namespace quantloom::cuda
