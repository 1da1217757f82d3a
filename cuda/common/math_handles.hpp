// Handles of cuBLAS and cuSOLVER for the length of a scope. Making one takes milliseconds, so they are kept
// for the process, for each device as many as were ever in use at once.
#pragma once

#include "common/device_buffer.hpp"
#include "common/libraries.hpp"

namespace quantloom::cuda {

// cuBLAS on `stream` of the current device, in plain float32 and float64 (no TF32), with a workspace of its
// own: cuBLAS's default one would be shared by streams.
class BlasScope {
 public:
  explicit BlasScope(cudaStream_t stream);
  ~BlasScope();
  BlasScope(const BlasScope&) = delete;
  BlasScope& operator=(const BlasScope&) = delete;

  CublasHandle handle() const { return handle_; }

 private:
  int device_ = 0;
  CublasHandle handle_ = nullptr;
  DeviceBuffer<std::byte> workspace_;
};

class SolverScope {
 public:
  explicit SolverScope(cudaStream_t stream);
  ~SolverScope();
  SolverScope(const SolverScope&) = delete;
  SolverScope& operator=(const SolverScope&) = delete;

  CusolverHandle handle() const { return handle_; }

 private:
  int device_ = 0;
  CusolverHandle handle_ = nullptr;
};

}  // namespace quantloom::cuda
