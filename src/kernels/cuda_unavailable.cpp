// Stands in for the CUDA kernels in a CPU-only build.
#include "kernels/cuda_kernels.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kernels/cuda_check.hpp"
#include "quantloom/kernels/cuda_libraries.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

bool built_with_cuda() {
  return false;
}

std::string cuda_toolkit_version() {
  return "";
}

std::string cuda_architectures() {
  return "";
}

std::vector<KernelEntry> cuda_kernel_table() {
  return {};
}

void set_cuda_library_folders(std::vector<std::string> /*folders*/) {}

namespace {

[[noreturn]] void refuse(const char* function) {
  throw Unsupported(
      text_of(function, ": this build of quantloom holds no CUDA kernels; build it where nvcc is found"));
}

}  // namespace

std::vector<CudaLibraryFacts> examine_cuda_libraries() {
  return {};
}

void multiply_on_cuda(const PackedTensor& /*packed*/, MatrixView<const float> /*x*/,
                      MatrixView<float> /*y*/) {
  refuse("multiply_on_cuda");
}

void multiply_integers_on_cuda(const PackedTensor& /*packed*/, MatrixView<const float> /*x*/,
                               const ActivationFormat& /*activations*/, MatrixView<float> /*y*/) {
  refuse("multiply_integers_on_cuda");
}

void dequantize_cuda(const PackedTensor& /*packed*/, void* /*out*/, DType /*out_dtype*/, int64_t /*stride*/,
                     void* /*stream*/) {
  refuse("dequantize_cuda");
}

void prepare_cuda(const PackedTensor& /*packed*/, PreparedPlanes& /*prepared*/, void* /*stream*/) {
  refuse("prepare_cuda");
}

void unprepare_cuda(const PreparedPlanes& /*prepared*/, PackedTensor& /*packed*/, void* /*stream*/) {
  refuse("unprepare_cuda");
}

std::optional<std::string> why_not_matmul_cuda(const Format& /*format*/, int64_t /*m*/, DType /*dtype*/,
                                               const CudaMatmulOptions& /*options*/) {
  return "this build of quantloom holds no CUDA kernels";
}

std::string matmul_cuda_kernel(const PreparedPlanes& /*w*/, int64_t /*m*/, DType /*dtype*/,
                               const CudaMatmulOptions& /*options*/) {
  refuse("matmul_cuda_kernel");
}

int64_t matmul_cuda_workspace(const PreparedPlanes& /*w*/, int64_t /*m*/, DType /*dtype*/,
                              const CudaMatmulOptions& /*options*/) {
  refuse("matmul_cuda_workspace");
}

void matmul_cuda(const PreparedPlanes& /*w*/, const CudaMatmulArguments& /*arguments*/,
                 const CudaMatmulOptions& /*options*/) {
  refuse("matmul_cuda");
}

void decode_fragments_cuda(const PreparedPlanes& /*w*/, void* /*out*/, DType /*dtype*/, int64_t /*stride*/,
                           void* /*stream*/) {
  refuse("decode_fragments_cuda");
}

}  // namespace quantloom
