// Products of weights of at most 4 bits with scales and zero points for groups of columns.
#include "kernels/integer_register_kernels.cuh"

namespace quantloom::cuda {

std::span<const RegisterKernel> register_kernels_of_nibble_zeros() {
  return register_kernels_of_groups<true, true>();
}

}  // namespace quantloom::cuda
