// Stands in for the CUDA transforms in a CPU-only build.
#include "quantloom/transforms/hadamard_cuda.hpp"

namespace quantloom {

void hadamard_cuda(const CudaMatrix& /*x*/, void* /*out*/, int64_t /*out_stride*/,
                   const CudaHadamardOptions& /*options*/, void* /*stream*/) {
  throw Unsupported(
      "hadamard_cuda: this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

std::optional<std::string> why_not_hadamard_cuda(HadamardSize /*size*/, DType /*dtype*/) {
  return "this build of quantloom holds no CUDA kernels";
}

}  // namespace quantloom
