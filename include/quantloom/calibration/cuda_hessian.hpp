// Hessian of a linear layer's squared output error, gathered on a CUDA device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom {

// The counterpart of Hessian on the device that is current when it is made: 8 k^2 bytes there, in float64.
// Products are taken by cuBLAS in float32 over chunks of 1024 tokens and summed in float64: on one GPU and
// with one version of cuBLAS the result depends on the sequence of tokens in add() calls only, and differs
// from the CPU's by the rounding of float32 sums, about 1e-6 relative to sqrt(H_ii H_jj).
//
// Every `stream` is a cudaStream_t of the same device. Calls on different streams are ordered on the device.
// Calls from several host threads have to be ordered by the caller. All functions throw Unsupported in a
// CPU-only build, and where cuBLAS is missing.
class CudaHessian {
 public:
  explicit CudaHessian(int64_t k);
  explicit CudaHessian(const Hessian& hessian);
  ~CudaHessian();
  CudaHessian(CudaHessian&& other) noexcept;
  CudaHessian& operator=(CudaHessian&& other) noexcept;
  CudaHessian(const CudaHessian&) = delete;
  CudaHessian& operator=(const CudaHessian&) = delete;

  // x [tokens, k]. Asynchronous: x must stay unchanged until the stream's work is done. A NaN or Inf in x is
  // found on the device, without waiting for it; from then on every use of the Hessian throws NumericError
  // that names the value's row (counted over all tokens added) and column.
  void add(const CudaMatrix& x, void* stream);

  int64_t k() const;
  int64_t tokens() const;
  int device() const;
  // diag(H) [k]. Waits for the stream.
  std::vector<double> diagonal(void* stream) const;
  // Waits for the stream.
  Hessian to_cpu(void* stream) const;
  // The running sum [k, k] on the device, both triangles, ready for work on `stream`. Waits for the stream.
  const double* sum(void* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quantloom
