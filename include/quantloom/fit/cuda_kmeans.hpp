// k-means on CUDA devices: the same definition of the nearest centroid and the same sums as kmeans.hpp, so
// that both give the same codes and centroids, bit for bit, from the same values and options.
//
// Arrays lie in memory of the current CUDA device; work is enqueued on `stream` (a cudaStream_t), which the
// functions wait for. In a build without CUDA each throws Unsupported.
#pragma once

#include <cstdint>

#include "quantloom/cuda_matrix.hpp"
#include "quantloom/fit/kmeans.hpp"

namespace quantloom {

// codes[i] = the index of the centroid nearest to row i of x.
//   x          [n, d], finite, n below 2^31, d in 1..16
//   centroids  [K, d], finite, K in 1..65536
//   codes      n of them
// Throws InvalidArgument for other shapes, TypeMismatch for memory elsewhere, NumericError for NaN or
// infinity.
void nearest_neighbour_cuda(const CudaMatrix& x, const CudaMatrix& centroids, int32_t* codes, void* stream);

struct CudaKMeansReport {
  int64_t sweeps = 0;
  double changed = 1;
  bool converged = false;
  double squared_error = 0;  // summed in another order than on the CPU
};

// Fits `count` centroids to the rows of x and leaves them in `centroids` [count, d] and the codes of the rows
// in `codes` [n]. weights: null, or n numbers, finite and >= 0. `options` are as in kmeans(); its centroids
// lie on the host. A k-means++ start runs on the CPU, on rows copied there. Errors as in kmeans().
CudaKMeansReport kmeans_cuda(const CudaMatrix& x, int64_t count, const KMeansOptions& options,
                             const float* weights, float* centroids, int32_t* codes, void* stream);

}  // namespace quantloom
