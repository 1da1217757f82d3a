// Products and decoding of planes of bits: what matmul_cuda() and its companions hand over.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <span>

#include "common/device.hpp"
#include "kernels/bit_plane_layout.hpp"
#include "kernels/cuda_products.hpp"
#include "kernels/stream_deal.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom::cuda {

// The kernels of planes of bits, in the order of preference.
std::span<const CudaProduct> bit_plane_products();

struct BitPlanePlan {
  const CudaProduct* product = nullptr;
  std::string reason;  // why none
  StreamDeal deal;
  int64_t workspace = 0;
};

BitPlanePlan bit_plane_plan(const BitPlaneLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                            const CudaMatmulOptions& options);
// m, n at least 1; all checked.
void run_bit_planes(const BitPlaneLayout& layout, const BitPlanePlan& plan, const PreparedPlanes& w,
                    const CudaMatmulArguments& arguments, const CudaMatmulOptions& options,
                    const DeviceFacts& device);

// Rows [first_row, first_row + rows) of the matrix, `first_row` a multiple of 64, to `out` of `dtype`, in the
// order of the kernels' columns.
void decode_bit_planes(const BitPlaneLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                       void* out, DType dtype, int64_t stride, cudaStream_t stream);

// Signs and scales of the packed tensor into the order of the kernels, and back.
void prepare_bit_plane_words(const BitPlaneLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream);
void unprepare_bit_plane_words(const BitPlaneLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream);

}  // namespace quantloom::cuda
