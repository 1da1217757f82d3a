// Products of matrices of additive codes that do not lie in fragment order: which kernel, and its launch.
#pragma once

#include <optional>
#include <string>

#include "common/device.hpp"
#include "kernels/additive_layout.hpp"
#include "kernels/cuda_products.hpp"

namespace quantloom::cuda {

std::span<const CudaProduct> additive_products();

struct AdditivePlan {
  const CudaProduct* product = nullptr;
  std::string reason;  // why none
  int64_t workspace = 0;
};

AdditivePlan additive_plan(const AdditiveLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                           const CudaMatmulOptions& options);
void run_additive(const AdditiveLayout& layout, const AdditivePlan& plan, const PreparedPlanes& w,
                  const CudaMatmulArguments& arguments, const DeviceFacts& device);

// Rows [first_row, first_row + rows) as values [rows, stride].
void decode_additive(const AdditiveLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                     void* out, DType dtype, int64_t stride, cudaStream_t stream);

void prepare_additive_planes(const AdditiveLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream);
void unprepare_additive_planes(const AdditiveLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream);

// "additive_parts": a few tokens, a table in parts.
int parts_bytes(const AdditiveLayout& layout);  // of shared memory, for one token
int64_t parts_workspace(const AdditiveLayout& layout, int64_t m, const DeviceFacts& device);
void launch_parts(const AdditiveLayout& layout, const PreparedPlanes& w, const CudaMatmulArguments& arguments,
                  const DeviceFacts& device);

}  // namespace quantloom::cuda
