// Stands in for the CUDA kernels in a CPU-only build.
#include "kernels/cuda_kernels.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kernels/cuda_libraries.hpp"
#include "quantloom/kernels/dequantize.hpp"

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

void dequantize_cuda(const PackedTensor& /*packed*/, void* /*out*/, DType /*out_dtype*/, int64_t /*stride*/,
                     void* /*stream*/) {
  throw Unsupported(
      "dequantize_cuda: this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace quantloom
