// The yardstick of integer products: cuBLASLt on int8 operands alone, without scales and without rounding the
// activations. Its result is int32, or int8 (of one common factor), whichever is faster.
#pragma once

#include <array>
#include <vector>

#include "common/libraries.hpp"
#include "device.cuh"
#include "matmul_report.hpp"

namespace quantloom::bench {

class LtIntegers {
 public:
  // For products of `m` tokens; results as int32 or int8. All that the library proposes are timed on `w`, `x`
  // and `y`, and the fastest is kept.
  LtIntegers(const Stream& stream, Shape shape, int64_t m, bool narrow, const void* w, const void* x, void* y)
      : stream_(stream), narrow_(narrow), workspace_(device_memory(kWorkspaceBytes)) {
    const cuda::CublasLt& api = cuda::cublas_lt();
    constexpr int kCompute32I = 72;  // cublasComputeType_t
    cuda::check_cublas(api.create(&handle_), "cublasLtCreate");
    cuda::check_cublas(api.matmul_desc_create(&product_, kCompute32I, narrow ? CUDA_R_32F : CUDA_R_32I),
                       "desc");
    const int transpose = cuda::kOpT;
    cuda::check_cublas(api.matmul_desc_set(product_, cuda::kMatmulTransA, &transpose, sizeof(int)), "desc");
    const auto n = static_cast<uint64_t>(shape.n);
    const auto k = static_cast<uint64_t>(shape.k);
    const auto tokens = static_cast<uint64_t>(m);
    cuda::check_cublas(api.layout_create(&layouts_[0], CUDA_R_8I, k, n, shape.k), "layout");
    cuda::check_cublas(api.layout_create(&layouts_[1], CUDA_R_8I, k, tokens, shape.k), "layout");
    cuda::check_cublas(api.layout_create(&layouts_[2], narrow ? CUDA_R_8I : CUDA_R_32I, n, tokens, shape.n),
                       "layout");
    cuda::check_cublas(api.preference_create(&preference_), "preference");
    const uint64_t bytes = kWorkspaceBytes;
    cuda::check_cublas(
        api.preference_set(preference_, cuda::kPreferenceMaxWorkspaceBytes, &bytes, sizeof(bytes)),
        "preference");
    std::array<cuda::MatmulHeuristic, 8> found{};
    int count = 0;
    cuda::check_cublas(api.heuristic(handle_, product_, layouts_[0], layouts_[1], layouts_[2], layouts_[2],
                                     preference_, static_cast<int>(found.size()), found.data(), &count),
                       "heuristic");
    double least = 0;
    for (int i = 0; i < count; ++i) {
      algorithm_ = found[static_cast<size_t>(i)].algorithm;
      const double seconds = time_launches(stream, 2, 5, [&](int) { (*this)(w, x, y); }).seconds;
      if (i == 0 || seconds < least) {
        least = seconds;
        best_ = algorithm_;
      }
    }
    if (count == 0) throw Unsupported("cuBLASLt proposes no int8 product");
    algorithm_ = best_;
  }
  ~LtIntegers() {
    const cuda::CublasLt& api = cuda::cublas_lt();
    static_cast<void>(api.preference_destroy(preference_));
    for (cuda::MatrixLayout layout : layouts_) static_cast<void>(api.layout_destroy(layout));
    static_cast<void>(api.matmul_desc_destroy(product_));
    static_cast<void>(api.destroy(handle_));
  }
  LtIntegers(const LtIntegers&) = delete;
  LtIntegers& operator=(const LtIntegers&) = delete;

  // y [m, n] = x [m, k] w^T, w [n, k]; row-major int8.
  void operator()(const void* w, const void* x, void* y) const {
    const int one = 1;
    const int zero = 0;
    const float one_float = 1.0F;
    const float zero_float = 0.0F;
    const void* alpha = narrow_ ? static_cast<const void*>(&one_float) : &one;
    const void* beta = narrow_ ? static_cast<const void*>(&zero_float) : &zero;
    cuda::check_cublas(cuda::cublas_lt().matmul(handle_, product_, alpha, w, layouts_[0], x, layouts_[1],
                                                beta, y, layouts_[2], y, layouts_[2], &algorithm_,
                                                workspace_.get(), kWorkspaceBytes, stream_.get()),
                       "cublasLtMatmul");
  }

 private:
  static constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

  const Stream& stream_;
  bool narrow_;
  std::shared_ptr<std::byte> workspace_;
  cuda::CublasLtHandle handle_ = nullptr;
  cuda::MatmulDesc product_ = nullptr;
  cuda::MatmulPreference preference_ = nullptr;
  std::array<cuda::MatrixLayout, 3> layouts_{};
  cuda::MatmulAlgorithm algorithm_{};
  cuda::MatmulAlgorithm best_{};
};

}  // namespace quantloom::bench
