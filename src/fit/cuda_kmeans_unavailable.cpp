// Stands in for k-means on CUDA devices in a CPU-only build.
#include "quantloom/fit/cuda_kmeans.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(std::string_view function) {
  throw Unsupported(std::string(function) +
                    ": this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

void nearest_neighbour_cuda(const CudaMatrix& /*x*/, const CudaMatrix& /*centroids*/, int32_t* /*codes*/,
                            void* /*stream*/) {
  refuse("nearest_neighbour_cuda");
}

CudaKMeansReport kmeans_cuda(const CudaMatrix& /*x*/, int64_t /*count*/, const KMeansOptions& /*options*/,
                             const float* /*weights*/, float* /*centroids*/, int32_t* /*codes*/,
                             void* /*stream*/) {
  refuse("kmeans_cuda");
}

}  // namespace quantloom
