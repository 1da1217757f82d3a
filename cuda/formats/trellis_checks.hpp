// Checks of the arguments of trellis coding on the device.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.cuh"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom::cuda {

inline void require_ring_bits(int bits) {
  if (bits < 1 || bits > 8) throw InvalidArgument("bits", text_of(bits), "1 to 8");
}

inline void require_ring_count(int64_t count) {
  if (count < 0 || count >= int64_t{1} << 31) {
    throw InvalidArgument("count", text_of(count, " rings"), "0 to 2^31 - 1");
  }
}

inline void require_same_device(const CudaTrellisCodebook& codebook) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "current CUDA device");
  if (current != codebook.device()) {
    throw InvalidArgument("codebook", text_of("the current CUDA device ", current),
                          text_of("device ", codebook.device(), ", which holds the codebook"));
  }
}

}  // namespace quantloom::cuda
