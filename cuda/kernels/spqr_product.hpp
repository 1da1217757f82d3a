// Products and decoding of the format "spqr", alone or with outliers: what matmul_cuda() and its companions
// hand over.
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <string>

#include "common/device.hpp"
#include "kernels/cuda_products.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// Most tokens that the streaming loop takes at once, and by repeating it.
constexpr int kSpqrStreamTokens = 8;
constexpr int kSpqrRepeatedTokens = 32;

// Whether the streaming loop runs with blocks of 8 warps: codes so wide take more registers.
constexpr bool spqr_few_warps(int bits) {
  return bits > 4;
}

// Steps of 16 columns in a stretch of 128, which warps of the streaming loop take at a time.
constexpr int kStretchSteps = 8;
// Bytes of shared memory of a warp: constants [unit][step], and decoded parameters [step][unit][lane / 4]:
// scales of two rows, then zero points, with steps a little apart, in other banks.
constexpr int kSpqrConstantBytes = fragments::kUnits * kStretchSteps * 16;
constexpr int kSpqrStepBytes = fragments::kUnits * 8 * 16 + 16;
QUANTLOOM_HOST_DEVICE constexpr int spqr_warp_bytes(int tokens) {
  return kSpqrConstantBytes + (tokens > 1 ? kStretchSteps * kSpqrStepBytes : 0);
}
QUANTLOOM_HOST_DEVICE constexpr int spqr_shared_bytes(int tokens, bool few_warps) {
  return stream_warps(tokens, few_warps) * spqr_warp_bytes(tokens);
}

// The kernels of the format, in the order of preference.
std::span<const CudaProduct> spqr_products();

struct SpqrPlan {
  const CudaProduct* product = nullptr;
  std::string reason;  // why none
  StreamDeal deal;
  int64_t workspace = 0;
};

// `w`: the sizes, and whether there is a plane "source".
SpqrPlan spqr_plan(const FragmentLayout& layout, const FragmentMatrix& w, int64_t m, DType dtype,
                   const DeviceFacts& device, const CudaMatmulOptions& options);
// launch.arguments: of the product, n and m at least 1; all checked.
void run_spqr(const FragmentLayout& layout, const SpqrPlan& plan, const ProductLaunch& launch,
              void* workspace);

// Rows [first_row, first_row + rows) of the matrix, `first_row` a multiple of 64, to `out`; columns in
// fragment order. Outliers are left out.
void decode_spqr(const FragmentLayout& layout, const FragmentMatrix& w, int64_t first_row, int64_t rows,
                 void* out, DType dtype, int64_t stride, bool overlap, cudaStream_t stream);

// Codes and grids of scales and zero points into the order of the kernels, and back.
void prepare_spqr_parameters(const FragmentLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream);
void unprepare_spqr_parameters(const FragmentLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream);

// The streaming loop, and decode_spqr(), for codes of kBits bits; units of their own define them
// (cmake/cuda.cmake). wide: parameters of 16 bytes. The product's columns are counted in stretches of 128.
template <int kBits>
void launch_spqr_stream(const ProductLaunch& launch, bool wide);
template <int kBits>
void launch_spqr_decode(const FragmentMatrix& w, bool wide, int64_t first_row, int64_t rows, void* out,
                        DType dtype, int64_t stride, bool overlap, cudaStream_t stream);

}  // namespace quantloom::cuda
