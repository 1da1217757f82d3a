// The squared distance of a row from a centroid as kmeans.hpp defines it.
#pragma once

#include <cstdint>

#include "common/load_float.cuh"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// The row begins at element `offset`. No operation is fused with another: the CPU gives the same bits.
__device__ __forceinline__ double squared_distance(const CudaMatrix& x, int64_t offset,
                                                   const float* centroid) {
  double sum = 0;
  for (int64_t j = 0; j < x.cols; ++j) {
    const double difference = __dsub_rn(static_cast<double>(load_float(x.data, x.dtype, offset + j)),
                                        static_cast<double>(centroid[j]));
    sum = __dadd_rn(sum, __dmul_rn(difference, difference));
  }
  return sum;
}

}  // namespace quantloom::cuda
