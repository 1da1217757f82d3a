// The products that matmul_cuda() chooses from, by the names they have in the kernel table.
#pragma once

#include "kernels/product_arguments.cuh"
#include "kernels/tile_products.cuh"

namespace quantloom::cuda {

// Tokens that the streaming loop takes.
constexpr int kMaxStreamTokens = 16;

// "stream", "stream_partials": weights pass from memory to the tensor cores once; few tokens. Parts of k are
// added in a cluster, or in memory where launch.arguments.partial is given.
template <class Decoder>
void launch_stream(const ProductLaunch& launch);

}  // namespace quantloom::cuda
