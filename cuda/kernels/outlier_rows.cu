#include "common/check.cuh"
#include "kernels/outlier_rows.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowLanes = 32;  // that share a row

template <class T>
__device__ T rounded_to(float value) {
  return HalfPair<T>::from_float(value);
}
template <>
__device__ float rounded_to<float>(float value) {
  return value;
}

template <class T>
__device__ float float_of(T value) {
  return HalfPair<T>::to_float(value);
}
template <>
__device__ float float_of<float>(float value) {
  return value;
}

// A row's columns differ, so that no two threads meet.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    add_outliers(const __grid_constant__ FragmentMatrix w, Out* out, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x % kRowLanes);
  const int64_t rows = static_cast<int64_t>(gridDim.x) * (kThreads / kRowLanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowLanes) + threadIdx.x / kRowLanes;
       row < w.n; row += rows) {
    const int end = __ldg(w.outliers.offsets + row + 1);
    for (int at = __ldg(w.outliers.offsets + row) + lane; at < end; at += kRowLanes) {
      int column = outlier_column(w.outliers, at);
      if (w.outliers.places != nullptr) column = __ldg(w.outliers.places + column);
      Out& value = out[row * stride + column];
      value = rounded_to<Out>(float_of(value) + outlier_value(w.outliers, at));
    }
  }
}

template <class Out>
void launch(const FragmentMatrix& w, void* out, int64_t stride, cudaStream_t stream) {
  const int64_t blocks = (w.n + kThreads / kRowLanes - 1) / (kThreads / kRowLanes);
  add_outliers<Out><<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, 0, stream>>>(
      w, static_cast<Out*>(out), stride);
  check_cuda(cudaGetLastError(), "matmul_cuda: launch of add_outliers");
}

}  // namespace

void add_outliers_to_decoded(const FragmentMatrix& w, void* out, int64_t stride, DType dtype,
                             cudaStream_t stream) {
  if (w.n == 0 || w.outliers.offsets == nullptr) return;
  switch (dtype) {
    case DType::f16:
      return launch<__half>(w, out, stride, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(w, out, stride, stream);
    default:
      return launch<float>(w, out, stride, stream);
  }
}

}  // namespace quantloom::cuda
