// Products of weights of 8 bits with scales and zero points for groups of columns.
#include "kernels/integer_register_kernels.cuh"

namespace quantloom::cuda {

std::span<const RegisterKernel> register_kernels_of_byte_zeros() {
  return register_kernels_of_groups<false, true>();
}

}  // namespace quantloom::cuda
