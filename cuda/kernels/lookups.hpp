// "lookups": products of one token with vectors of 8-bit codes in fragment order, by tables of the products
// of inputs and table entries.
#pragma once

#include <string_view>

#include "common/device.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

constexpr std::string_view kLookups = "lookups";

// Whether the kernel takes the matrix: vectors of 8 weights with 1, 2 or 4 tables, or of 4 with 1 or 2, codes
// of 8 bits for each, one scale for a row.
bool is_looked_up(const FragmentLayout& layout);
// Bytes of shared memory that it takes.
int lookup_bytes(const FragmentLayout& layout);
// `splits`: of CudaMatmulOptions; ranges of rows.
int64_t lookup_workspace(const FragmentLayout& layout, const DeviceFacts& device, int splits);
// launch.arguments.partial: lookup_workspace() bytes, for launch.splits.
void launch_lookups(const FragmentLayout& layout, const ProductLaunch& launch, const DeviceFacts& device);

// Decoding of those with vectors of 8 weights: rows [n, stride] of `dtype`, as launch_decode_fragments()
// makes them.
bool decodes_vectors(const FragmentLayout& layout, const DeviceFacts& device);
void decode_vectors_to(const FragmentLayout& layout, const FragmentMatrix& w, void* out, int64_t stride,
                       DType dtype, const DeviceFacts& device, cudaStream_t stream);

}  // namespace quantloom::cuda
