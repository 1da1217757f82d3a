// For examining an installation: which CUDA libraries this process finds, and products on the device from
// memory of the CPU. These functions allocate, copy and synchronize; matmul_cuda() is for everything else.
#pragma once

#include <string>
#include <vector>

#include "quantloom/activations/activation_format.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

struct CudaLibraryFacts {
  std::string name;     // "cuBLAS"
  std::string path;     // of the file that was opened, links resolved; "" if none was found
  std::string problem;  // why none was; else ""
};

// Opens each of the CUDA math libraries as the kernels would. Empty in a CPU-only build.
std::vector<CudaLibraryFacts> examine_cuda_libraries();

// y [m, n] = x [m, k] W^T on the current device with float16 activations, by the kernel that the table picks;
// all arguments on the CPU. Throws Unsupported where no kernel runs, InvalidArgument for wrong shapes.
void multiply_on_cuda(const PackedTensor& packed, MatrixView<const float> x, MatrixView<float> y);
// The same as a product of integers: x in float16, rounded to `activations` on the device. Throws Unsupported
// for activations with outliers, too.
void multiply_integers_on_cuda(const PackedTensor& packed, MatrixView<const float> x,
                               const ActivationFormat& activations, MatrixView<float> y);

}  // namespace quantloom
