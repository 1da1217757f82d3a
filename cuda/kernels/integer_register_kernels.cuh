// The kernels that are built for each kind of weights in register order.
#pragma once

#include "kernels/integer_team.cuh"

namespace quantloom::cuda {

// Of groups whose scales serve 128, 64 or 32 columns. Teams are for 128.
template <bool kNibbles, bool kPairs>
std::span<const RegisterKernel> register_kernels_of_groups() {
  static constexpr std::array kKernels = {
      register_kernel_of<256, 2, 2, kNibbles, 1, kPairs>(),
      register_kernel_of<128, 1, 1, kNibbles, 1, kPairs>(),
      register_kernel_of<64, 1, 1, kNibbles, 1, kPairs>(),
      team_kernel_of<16, 2, kNibbles, 1, kPairs>(),
      team_kernel_of<16, 4, kNibbles, 1, kPairs>(),
      team_kernel_of<32, 2, kNibbles, 1, kPairs>(),

      register_kernel_of<256, 2, 2, kNibbles, 2, kPairs>(),
      register_kernel_of<128, 1, 1, kNibbles, 2, kPairs>(),
      register_kernel_of<64, 1, 1, kNibbles, 2, kPairs>(),
      register_kernel_of<16, 1, 1, kNibbles, 2, kPairs>(),

      register_kernel_of<128, 1, 1, kNibbles, 4, kPairs>(),
      register_kernel_of<64, 1, 1, kNibbles, 4, kPairs>(),
      register_kernel_of<16, 1, 1, kNibbles, 4, kPairs>(),
  };
  return kKernels;
}

}  // namespace quantloom::cuda
