#include <algorithm>
#include <cmath>

#include "common/block_sum.cuh"
#include "common/device_buffer.hpp"
#include "common/load_float.cuh"
#include "common/matrix_checks.hpp"
#include "quantloom/error.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* values, int64_t count, double* out) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += values[i];
  const double sum = block_sum<kThreads>(mine);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void __launch_bounds__(kThreads)
    find_non_finite_kernel(CudaMatrix matrix, int64_t first_row, unsigned long long* key) {
  unsigned long long found = kNoneFound;
  for (int64_t row = blockIdx.y; row < matrix.rows; row += gridDim.y) {
    for (int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; column < matrix.cols;
         column += static_cast<int64_t>(gridDim.x) * kThreads) {
      const float value = load_float(matrix.data, matrix.dtype, row * matrix.stride + column);
      if (fabsf(value) <= 0x1.fffffep127F) continue;
      const unsigned long long kind = value != value ? 2 : (value < 0 ? 1 : 0);
      const auto index = static_cast<unsigned long long>((first_row + row) * matrix.cols + column);
      found = min(found, index * 4 + kind);
    }
  }
  if (found != kNoneFound) atomicMin(key, found);
}

}  // namespace

void sum_values(const double* values, int64_t count, double* out, cudaStream_t stream) {
  sum_kernel<<<1, kThreads, 0, stream>>>(values, count, out);
  check_cuda(cudaGetLastError(), "launch of sum");
}

void find_non_finite(const CudaMatrix& matrix, int64_t first_row, uint64_t* key, cudaStream_t stream) {
  if (matrix.rows == 0 || matrix.cols == 0) return;
  const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(ceil_div(matrix.cols, kThreads * 4), 64)),
                    static_cast<unsigned>(std::min<int64_t>(matrix.rows, 4096)));
  find_non_finite_kernel<<<blocks, kThreads, 0, stream>>>(matrix, first_row,
                                                          reinterpret_cast<unsigned long long*>(key));
  check_cuda(cudaGetLastError(), "launch of find_non_finite");
}

void require_none_found(const uint64_t* key, int64_t cols, const std::string& argument,
                        const std::string& rows, cudaStream_t stream) {
  uint64_t found = 0;
  download(key, &found, 1, stream);
  if (found == kNoneFound) return;
  const float values[] = {INFINITY, -INFINITY, NAN, NAN};
  const auto index = static_cast<int64_t>(found / 4);
  throw NumericError(text_of(argument, ": got ", values[found % 4], " at row ", index / cols, rows,
                             ", column ", index % cols, ", expected finite values"));
}

void require_finite_cuda(const CudaMatrix& matrix, const std::string& argument, cudaStream_t stream) {
  if (matrix.rows == 0 || matrix.cols == 0) return;
  DeviceBuffer<uint64_t> key(1, stream);
  key.fill_bytes(0xff);
  find_non_finite(matrix, 0, key.data(), stream);
  require_none_found(key.data(), matrix.cols, argument, "", stream);
}

}  // namespace quantloom::cuda
