// The yardstick of products: cuBLAS with dense weights.
#pragma once

#include "common/libraries.hpp"
#include "device.cuh"
#include "matmul_report.hpp"

namespace quantloom::bench {

constexpr int64_t kCublasWorkspaceBytes = int64_t{32} << 20;

class CublasProduct {
 public:
  explicit CublasProduct(const Stream& stream) : workspace_(device_memory(kCublasWorkspaceBytes)) {
    const cuda::Cublas& api = cuda::cublas();
    cuda::check_cublas(api.create(&handle_), "cublasCreate");
    cuda::check_cublas(api.set_stream(handle_, stream.get()), "cublasSetStream");
    cuda::check_cublas(api.set_workspace(handle_, workspace_.get(), kCublasWorkspaceBytes),
                       "cublasSetWorkspace");
  }
  ~CublasProduct() { static_cast<void>(cuda::cublas().destroy(handle_)); }
  CublasProduct(const CublasProduct&) = delete;
  CublasProduct& operator=(const CublasProduct&) = delete;

  // y [m, n] = x [m, k] w^T, w [n, k]; row-major.
  void operator()(const void* w, const void* x, void* y, DType dtype, Shape shape, int64_t m) const {
    const auto type = dtype == DType::f16 ? CUDA_R_16F : CUDA_R_16BF;
    const float one = 1.0F;
    const float zero = 0.0F;
    const auto n = static_cast<int>(shape.n);
    const auto k = static_cast<int>(shape.k);
    cuda::check_cublas(
        cuda::cublas().gemm_ex(handle_, cuda::kOpT, cuda::kOpN, n, static_cast<int>(m), k, &one, w, type, k,
                               x, type, k, &zero, y, type, n, cuda::kCompute32F, cuda::kGemmDefault),
        "cublasGemmEx");
  }

 private:
  std::shared_ptr<std::byte> workspace_;
  cuda::CublasHandle handle_ = nullptr;
};

}  // namespace quantloom::bench
