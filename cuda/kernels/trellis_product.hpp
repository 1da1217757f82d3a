// Products and decoding of trellis codes: what matmul_cuda() and its companions hand over.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "common/device.hpp"
#include "kernels/cuda_products.hpp"
#include "kernels/trellis_deal.hpp"
#include "kernels/trellis_layout.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom::cuda {

// Clusters of `size` blocks of threads that run at the same time, one block on a processor.
int resident_clusters(const DeviceFacts& device, int size);

// The kernels of trellis codes, in the order of preference.
std::span<const CudaProduct> trellis_products();

struct TrellisPlan {
  const CudaProduct* product = nullptr;
  std::string reason;  // why none
  TrellisDeal deal;
  int64_t workspace = 0;
};

TrellisPlan trellis_plan(const TrellisLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                         const CudaMatmulOptions& options);
// m, n at least 1; all checked.
void run_trellis(const TrellisLayout& layout, const TrellisPlan& plan, const PreparedPlanes& w,
                 const CudaMatmulArguments& arguments, const CudaMatmulOptions& options,
                 const DeviceFacts& device);

// Rows [first_row, first_row + rows) of the matrix, `first_row` a multiple of 128, to `out` of `dtype`:
// columns up to padded_k are written, those past k as zero.
void decode_trellis(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                    void* out, DType dtype, int64_t stride, cudaStream_t stream);

// The same for products, where has_exact_words(), to float16 or bfloat16: rounded once more, to float16
// between the rotations. All rows of bands of 128 are written.
void decode_trellis_rounded(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row,
                            int64_t rows, void* out, DType dtype, int64_t stride, cudaStream_t stream);

// Ring words of the packed tensor into the order of the kernels, and back.
void prepare_trellis_words(const TrellisLayout& layout, const uint32_t* packed, uint32_t* prepared,
                           cudaStream_t stream);
void unprepare_trellis_words(const TrellisLayout& layout, const uint32_t* prepared, uint32_t* packed,
                             cudaStream_t stream);

}  // namespace quantloom::cuda
