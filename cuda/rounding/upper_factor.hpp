// The factor of the inverse Hessian that error feedback walks along, on the device.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "quantloom/calibration/cuda_hessian.hpp"
#include "rounding/steps.hpp"

namespace quantloom::cuda {

// Throws what the CPU's require_usable() throws. `diagonal` is diag(H). Waits for the stream.
void require_usable(const CudaHessian& hessian, const std::vector<double>& diagonal, cudaStream_t stream,
                    std::string_view argument = "hessian");

// In-place factor of the lower triangle of a [k, k], row-major, as L L^T; what is above it may be
// overwritten. False if the matrix is not positive definite. Waits for the stream.
bool cholesky(double* a, int64_t k, cudaStream_t stream);
// values [k] := (L L^T)^-1 values.
void solve_cholesky(const double* factor, int64_t k, double* values, cudaStream_t stream);

// Upper triangular U with H^-1 = U^T U, as the CPU's InverseFactor defines it: H damped, with rows and
// columns in a given order, divided by the mean of its live diagonal. cuSOLVER factors the matrix in float64
// with rows and columns reversed, cuBLAS inverts the factor a panel at a time, and a kernel flips and narrows
// the panel.
class UpperFactor {
 public:
  // order [k] on the host and on the device. Tries `damping`, then each larger value of `ladder`; throws
  // NumericError listing them if no factorization succeeds. Waits for the stream.
  UpperFactor(const CudaHessian& hessian, const std::vector<double>& diagonal, const int32_t* order,
              double damping, std::span<const double> ladder, cudaStream_t stream);
  // Of a sum [k, k] on the device with this diagonal [k]; errors name `argument`.
  UpperFactor(const double* sum, std::span<const double> diagonal, const int32_t* order, double damping,
              std::span<const double> ladder, cudaStream_t stream, std::string_view argument = "hessian");

  // [k, stride], zero below the diagonal and beyond column k.
  const float* upper() const { return upper_.data(); }
  int64_t stride() const { return stride_; }
  const std::vector<double>& damping_tried() const { return damping_tried_; }

 private:
  bool factorize(const double* sum, const int32_t* order, double mean, double damping, double* factor,
                 cudaStream_t stream);

  int64_t k_;
  int64_t stride_;
  DeviceBuffer<float> upper_;
  std::vector<double> damping_tried_;
};

}  // namespace quantloom::cuda
