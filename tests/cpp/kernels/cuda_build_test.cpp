// What holds in any build on any machine, with or without CUDA or a GPU.
#include <gtest/gtest.h>

#include "kernels/cuda_kernels.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

TEST(CudaBuild, SaysWhatItHolds) {
  EXPECT_EQ(built_with_cuda(), !cuda_toolkit_version().empty());
  EXPECT_EQ(built_with_cuda(), !cuda_architectures().empty());
  EXPECT_EQ(built_with_cuda(), !cuda_kernel_table().empty());
  for (const KernelEntry& entry : cuda_kernel_table()) {
    EXPECT_EQ(entry.device, "cuda");
    EXPECT_FALSE(entry.operation.empty());
    EXPECT_FALSE(entry.kernel.empty());
  }
}

TEST(CudaBuild, RefusesPlanesOnTheCpu) {
  const std::vector<float> w(4 * 64, 1.0F);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const PackedTensor packed = round_nearest(MatrixView<const float>(w.data(), 4, 64), format).tensor;
  std::vector<float> out(4 * 64);
  if (built_with_cuda()) {
    EXPECT_THROW(dequantize_cuda(packed, out.data(), DType::f32, 64, nullptr), InvalidArgument);
  } else {
    EXPECT_THROW(dequantize_cuda(packed, out.data(), DType::f32, 64, nullptr), Unsupported);
  }
}

}  // namespace
}  // namespace quantloom
