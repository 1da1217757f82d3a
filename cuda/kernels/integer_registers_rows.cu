// Products of weights of at most 4 bits with one scale for each output.
#include "kernels/integer_register_kernels.cuh"

namespace quantloom::cuda {

std::span<const RegisterKernel> register_kernels_of_rows() {
  static constexpr std::array kKernels = {
      register_kernel_of<256, 2, 2, true, 0, false>(), register_kernel_of<128, 2, 2, true, 0, false>(),
      register_kernel_of<128, 1, 1, true, 0, false>(), register_kernel_of<64, 1, 1, true, 0, false>(),
      team_kernel_of<64, 2, true, 0, false>(),         team_kernel_of<16, 2, true, 0, false>(),
      team_kernel_of<16, 4, true, 0, false>(),
  };
  return kKernels;
}

}  // namespace quantloom::cuda
