// Stands in for integer products in a CPU-only build.
#include "quantloom/error.hpp"
#include "quantloom/kernels/integer_cuda.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(const char* function) {
  throw Unsupported(
      text_of(function, ": this build of quantloom holds no CUDA kernels; build it where nvcc is found"));
}

}  // namespace

void prepare_integers_cuda(const PackedTensor& /*packed*/, IntegerPlanes& /*prepared*/, void* /*stream*/) {
  refuse("prepare_integers_cuda");
}

void unprepare_integers_cuda(const IntegerPlanes& /*prepared*/, PackedTensor& /*packed*/, void* /*stream*/) {
  refuse("unprepare_integers_cuda");
}

std::optional<std::string> why_not_matmul_integers_cuda(const Format& /*format*/,
                                                        const ActivationFormat& /*activations*/,
                                                        int64_t /*k*/, DType /*dtype*/) {
  return "this build of quantloom holds no CUDA kernels";
}

std::string integer_tile(int64_t /*m*/, int64_t /*n*/, int64_t /*k*/) {
  refuse("integer_tile");
}

std::vector<std::string> integer_tiles(int64_t /*k*/) {
  return {};
}

std::string integer_tile(const IntegerPlanes& /*w*/, int64_t /*m*/) {
  refuse("integer_tile");
}

std::vector<std::string> integer_tiles(const IntegerPlanes& /*w*/) {
  return {};
}

int64_t matmul_integers_cuda_workspace(const IntegerPlanes& /*w*/, int64_t /*m*/, DType /*dtype*/,
                                       const ActivationFormat& /*activations*/) {
  refuse("matmul_integers_cuda_workspace");
}

void matmul_integers_cuda(const IntegerPlanes& /*w*/, const CudaMatmulArguments& /*arguments*/,
                          const ActivationFormat& /*activations*/, const CudaIntegerOptions& /*options*/) {
  refuse("matmul_integers_cuda");
}

}  // namespace quantloom
