// Products of integers on devices without warpgroup products, see integer_mma.cu.
#pragma once

#include "kernels/integer_registers.hpp"

namespace quantloom::cuda {

// What such a tile is called.
inline constexpr const char* kMmaTile = "mma";

// Multiplies what `arguments` describes, without outliers, for weights in either order; `sums` as of
// multiply_in_registers().
void multiply_by_mma(const IntegerLayout& layout, const IntegerArguments& arguments, float* sums,
                     const DeviceFacts& device, cudaStream_t stream);

}  // namespace quantloom::cuda
