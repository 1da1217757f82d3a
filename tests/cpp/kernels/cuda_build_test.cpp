// What holds in any build on any machine, with or without CUDA or a GPU.
#include <gtest/gtest.h>

#include "kernels/cuda_kernels.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"
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

TEST(CudaBuild, WhyNotAnswersInWordsOnAnyMachine) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& spec : entry.examples) {
      for (const int64_t m : {0, 1, 17, 5000}) {
        std::optional<std::string> why;
        EXPECT_NO_THROW(why = why_not_matmul_cuda(*format_from_spec(spec), m, DType::f16));
        EXPECT_NE(why, "") << spec;
        EXPECT_TRUE(built_with_cuda() || why.has_value()) << spec;
      }
      EXPECT_TRUE(why_not_matmul_cuda(*format_from_spec(spec), 1, DType::i8)) << spec;
      EXPECT_TRUE(why_not_matmul_cuda(*format_from_spec(spec), 1, DType::f16, {.kernel = "nothing"})) << spec;
    }
  }
}

TEST(CudaBuild, ProductsRefusePlanesOnTheCpu) {
  const std::vector<float> w(4 * 64, 1.0F);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const PackedTensor packed = round_nearest(MatrixView<const float>(w.data(), 4, 64), format).tensor;
  PreparedPlanes prepared = prepare_fragments(packed);
  PackedTensor back = packed;
  std::vector<uint16_t> x(64);
  std::vector<uint16_t> y(4, 0xFFFF);
  CudaMatmulArguments arguments;
  arguments.x = x.data();
  arguments.x_stride = 64;
  arguments.y = y.data();
  arguments.y_stride = 4;
  arguments.m = 1;
  EXPECT_THROW(matmul_cuda(prepared, arguments), Error);
  EXPECT_THROW(prepare_cuda(packed, prepared, nullptr), Error);
  EXPECT_THROW(unprepare_cuda(prepared, back, nullptr), Error);
  EXPECT_EQ(y, std::vector<uint16_t>(4, 0xFFFF));
}

}  // namespace
}  // namespace quantloom
