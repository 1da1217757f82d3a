// The CUDA part of the kernel table: rows of a build with CUDA, none in a CPU-only build.
#pragma once

#include <vector>

#include "quantloom/kernels/kernel_table.hpp"

namespace quantloom {

std::vector<KernelEntry> cuda_kernel_table();

}  // namespace quantloom
