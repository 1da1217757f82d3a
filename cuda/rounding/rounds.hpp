// What the roundings on the device share on the host's side.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "quantloom/rounding/cuda.hpp"
#include "rounding/device_encoder.hpp"
#include "rounding/output_search.hpp"
#include "rounding/steps.hpp"

namespace quantloom::cuda {

// Throws Unsupported naming the format unless a kernel rounds its columns.
void require_columns_format(const Format& format, std::string_view function);
void require_same_shape(const CudaMatrix& w, const PackedTensor& packed);
void require_hessian(const CudaHessian& hessian, int64_t k, std::string_view argument);
// Throws Unsupported for a search by output error without a Hessian or over a whole matrix.
void require_search(const std::optional<ScaleSearch>& search, const Format& format, bool with_hessian);

// diag(H) scaled to a largest entry of 1.
std::vector<float> column_weights(const std::vector<double>& diagonal);

// A plane in new memory of the device, not initialized.
Tensor new_plane(const PlaneSpec& spec);

// Fills the planes of `to` from those of the same names; waits for the stream.
void copy_planes(const PackedTensor& from, PackedTensor& to, cudaStream_t stream);

// What fits measure errors with, by column: from a Hessian, or nothing.
struct FitMetric {
  std::vector<float> weights;  // [k]; empty: 1
  OutputMetric output;         // of the columns in their order

  FitMetric() = default;
  FitMetric(const CudaHessian& hessian, const std::vector<double>& diagonal, cudaStream_t stream);
};

// Fits the groups of a task as a search says.
void fit_groups(DeviceEncoder& encoder, const FitTask& task, const SearchFactors& search,
                const OutputMetric& metric, cudaStream_t stream);

struct Losses {
  double mean_squared_error = 0;
  std::vector<double> proxy_losses;  // tr(E H E^T) for each Hessian
};

// Nearest rounding of a matrix that is not empty and has been checked. Throws before `packed` is written.
class NearestRounding {
 public:
  // packed: null if nothing is to be written; its format becomes that of the result. input_scales [k] on the
  // device: what errors in a column are multiplied by for a loss; null for 1, as it must be after writing.
  NearestRounding(const CudaMatrix& w, const std::shared_ptr<const Format>& format, PackedTensor* packed,
                  const std::optional<ScaleSearch>& search, const FitMetric& metric, cudaStream_t stream);
  double mean_squared_error() const { return mean_squared_error_; }
  Losses losses(std::span<const CudaHessian* const> hessians, const float* input_scales = nullptr) const;

 private:
  CodeMatrix code_matrix() const;

  CudaMatrix w_;
  PackedTensor* packed_;  // null if codes_ say all
  std::unique_ptr<DeviceEncoder> encoder_;
  DeviceBuffer<uint8_t> codes_;
  DeviceBuffer<uint16_t> missing_;  // of outliers
  double mean_squared_error_ = 0;
  cudaStream_t stream_;
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
