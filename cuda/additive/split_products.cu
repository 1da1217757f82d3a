#include <algorithm>
#include <array>
#include <utility>

#include "additive/split_products.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 8192;
constexpr int kFastTf32 = 77;  // cublasComputeType_t

__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* from, float* high, float* low, int64_t count) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const float value = from[at];
    const float upper = tf32_part(value);
    high[at] = upper;
    low[at] = value - upper;
  }
}

}  // namespace

void split(const float* from, float* high, float* low, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kThreads), kMostBlocks));
  split_kernel<<<blocks, kThreads, 0, stream>>>(from, high, low, count);
  check_cuda(cudaGetLastError(), "launch of split");
}

void multiply(const BlasScope& blas, int m, int n, int k, const SplitMatrix& a, const SplitMatrix& h,
              float* products, int product_stride) {
  const float one = 1;
  const float zero = 0;
  // The small parts first. Column-major, (a h)^T = h^T a^T.
  const std::array<std::pair<const float*, const float*>, 3> parts = {
      {{h.high, a.low}, {h.low, a.high}, {h.high, a.high}}};
  for (size_t i = 0; i < parts.size(); ++i) {
    check_cublas(cublas().gemm_ex(blas.handle(), kOpN, kOpN, n, m, k, &one, parts[i].first, CUDA_R_32F,
                                  h.stride, parts[i].second, CUDA_R_32F, a.stride, i == 0 ? &zero : &one,
                                  products, CUDA_R_32F, product_stride, kFastTf32, kGemmDefault),
                 "products by tensor cores");
  }
}

}  // namespace quantloom::cuda
