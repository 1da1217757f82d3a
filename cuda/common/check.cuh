// Turns errors of the CUDA runtime into exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <string_view>

#include "quantloom/error.hpp"

namespace quantloom {

// Throws Error "<what>: <text of the runtime> (<name of the code>)" unless `status` is cudaSuccess.
inline void check_cuda(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  // The runtime remembers the error too; the next caller that asks must not find this one.
  static_cast<void>(cudaGetLastError());
  throw Error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace quantloom
