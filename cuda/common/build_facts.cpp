// What this build knows of CUDA; the values come from cmake/cuda.cmake.
#include "kernels/cuda_kernels.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom {

bool built_with_cuda() {
  return true;
}

std::string cuda_toolkit_version() {
  return QUANTLOOM_CUDA_TOOLKIT;
}

std::string cuda_architectures() {
  return QUANTLOOM_CUDA_ARCHITECTURES;
}

std::vector<KernelEntry> cuda_kernel_table() {
  return {{.operation = "dequantize",
           .format = "uniform",
           .bits = "1-8",
           .device = "cuda",
           .activations = "",
           .tokens = "any",
           .kernel = "dequantize_uniform",
           .target = "sm " + cuda_architectures()}};
}

}  // namespace quantloom
