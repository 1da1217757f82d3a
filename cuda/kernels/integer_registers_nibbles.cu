// Products of weights of at most 4 bits with scales for groups of columns.
#include "kernels/integer_register_kernels.cuh"

namespace quantloom::cuda {

std::span<const RegisterKernel> register_kernels_of_nibbles() {
  return register_kernels_of_groups<true, false>();
}

}  // namespace quantloom::cuda
