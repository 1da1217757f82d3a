// Products of weights of 5 to 8 bits with scales for groups of columns.
#include "kernels/integer_register_kernels.cuh"

namespace quantloom::cuda {

std::span<const RegisterKernel> register_kernels_of_bytes() {
  return register_kernels_of_groups<false, false>();
}

}  // namespace quantloom::cuda
