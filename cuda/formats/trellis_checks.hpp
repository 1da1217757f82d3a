// Checks of the arguments of trellis coding on the device.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.cuh"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom::cuda {

inline void require_ring_shape(const TrellisShape& shape) {
  if (shape.window != 16) throw InvalidArgument("shape", text_of("a window of ", shape.window), "16");
  if (shape.length != 256) throw InvalidArgument("shape", text_of("rings of ", shape.length), "256");
  if (shape.weights_per_step != 1 && shape.weights_per_step != 2) {
    throw InvalidArgument("shape", text_of(shape.weights_per_step, " weights a step"), "1 or 2");
  }
  const int most = 16 / shape.weights_per_step;
  if (shape.half_bits < 2 || shape.half_bits > most) {
    throw InvalidArgument("shape", text_of(shape.half_bits, "/2 bits"), text_of("1 to ", most / 2));
  }
}

inline void require_ring_count(int64_t count) {
  if (count < 0 || count >= int64_t{1} << 31) {
    throw InvalidArgument("count", text_of(count, " rings"), "0 to 2^31 - 1");
  }
}

// The codebook lies on the current device, and is for rings of the shape.
inline void require_codebook(const CudaTrellisCodebook& codebook, const TrellisShape& shape) {
  if (codebook.weights_per_step() != shape.weights_per_step) {
    throw InvalidArgument("shape", text_of(shape.weights_per_step, " weights a step"),
                          text_of(codebook.weights_per_step(), ", as the codebook has"));
  }
  int current = 0;
  check_cuda(cudaGetDevice(&current), "current CUDA device");
  if (current != codebook.device()) {
    throw InvalidArgument("codebook", text_of("the current CUDA device ", current),
                          text_of("device ", codebook.device(), ", which holds the codebook"));
  }
}

}  // namespace quantloom::cuda
