// Brings packed planes on the device into register order (src/kernels/register_order.hpp), and back.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/integer_layout.hpp"

namespace quantloom::cuda {

// Fills the planes "integers" and "rows".
void order_records(const IntegerLayout& layout, const PackedTensor& packed, IntegerPlanes& prepared,
                   cudaStream_t stream);
// Fills "codes", zeroed before.
void unorder_records(const IntegerLayout& layout, const IntegerPlanes& prepared, PackedTensor& packed,
                     cudaStream_t stream);

}  // namespace quantloom::cuda
