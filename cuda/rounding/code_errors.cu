// Nearest codes of a matrix, and what they miss.
#include <algorithm>

#include "common/block_sum.cuh"
#include "common/load_float.cuh"
#include "rounding/device_encoder.hpp"
#include "rounding/walk_block.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

template <class R>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(CudaMatrix w, R rounder, int64_t group_size, uint8_t* codes) {
  const int64_t total = w.rows * w.cols;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / w.cols;
    const int64_t column = at % w.cols;
    const float value = load_float(w.data, w.dtype, row * w.stride + column);
    codes[at] = static_cast<uint8_t>(rounder.encode(rounder.column(row, column / group_size), value).code);
  }
}

// errors [rows, k] = w - decoded, subtracted in float32; partial[block] takes the sum of squares.
template <class R>
__global__ void __launch_bounds__(kThreads)
    errors_kernel(CudaMatrix w, R rounder, CodeMatrix matrix, int64_t first_row, int64_t rows, double* errors,
                  double* partial) {
  const int64_t total = rows * w.cols;
  double sum = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = first_row + at / w.cols;
    const int64_t column = at % w.cols;
    const int64_t group = matrix.group_of != nullptr ? static_cast<int64_t>(matrix.group_of[column])
                                                     : column / matrix.group_size;
    const int64_t from =
        row * w.cols + (matrix.position != nullptr ? static_cast<int64_t>(matrix.position[column]) : column);
    float decoded = rounder.decode(rounder.column(row, group), matrix.codes[from]);
    if (matrix.missing != nullptr && matrix.missing[from] != kNoOutlier) {
      decoded = decoded + __half2float(__ushort_as_half(matrix.missing[from]));
    }
    const float value = load_float(w.data, w.dtype, row * w.stride + column);
    double error = static_cast<double>(value - decoded);
    if (matrix.input_scales != nullptr) error *= static_cast<double>(matrix.input_scales[column]);
    errors[at] = error;
    sum += error * error;
  }
  const double whole = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = whole;
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMaxBlocks));
}

}  // namespace

void encode_codes(const CudaMatrix& w, const Rounder& rounder, int64_t group_size, uint8_t* codes,
                  cudaStream_t stream) {
  std::visit(
      [&](const auto& own) {
        encode_kernel<<<blocks_for(checked_mul(w.rows, w.cols)), kThreads, 0, stream>>>(w, own, group_size,
                                                                                        codes);
      },
      rounder);
  check_cuda(cudaGetLastError(), "launch of encode_codes");
}

void measure_code_errors(const CudaMatrix& w, const CodeMatrix& matrix, int64_t first_row, int64_t rows,
                         double* errors, double* partial_squares, cudaStream_t stream) {
  std::visit(
      [&](const auto& own) {
        errors_kernel<<<kErrorBlocks, kThreads, 0, stream>>>(w, own, matrix, first_row, rows, errors,
                                                             partial_squares);
      },
      *matrix.rounder);
  check_cuda(cudaGetLastError(), "launch of measure_code_errors");
}

}  // namespace quantloom::cuda
