#include <algorithm>

#include "common/block_sum.cuh"
#include "common/check.cuh"
#include "common/load_float.cuh"
#include "formats/scalar_planes.hpp"
#include "formats/trellis_codes.hpp"
#include "quantloom/checked_math.hpp"
#include "rounding/trellis_steps.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAcross = 32;  // rows or columns of a block of threads that rotates
constexpr int kStep = trellis::kTileSide;

unsigned capped(int64_t blocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 65535));
}

__device__ __forceinline__ float value_at(const CudaMatrix& w, const uint8_t* dead, int64_t r, int64_t c) {
  return dead != nullptr && dead[c] != 0 ? 0.0F : load_float(w.data, w.dtype, r * w.stride + c);
}

__global__ void __launch_bounds__(kThreads)
    row_squares(const CudaMatrix w, const uint8_t* dead, double* squares) {
  for (int64_t r = blockIdx.x; r < w.rows; r += gridDim.x) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < w.cols; c += kThreads) {
      const double value = value_at(w, dead, r, c);
      sum += value * value;
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) squares[r] = sum;
  }
}

// A thread for each of 32 columns and each eighth row.
__global__ void __launch_bounds__(kThreads)
    column_squares(const CudaMatrix w, const uint8_t* dead, const double* row_factors, double* squares) {
  constexpr int kParts = kThreads / 32;
  __shared__ double parts[kParts][32];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int part = static_cast<int>(threadIdx.x / 32);
  for (int64_t first = int64_t{32} * blockIdx.x; first < w.cols; first += int64_t{32} * gridDim.x) {
    const int64_t c = first + lane;
    double sum = 0;
    for (int64_t r = part; c < w.cols && r < w.rows; r += kParts) {
      const double value = double{value_at(w, dead, r, c)} * row_factors[r];
      sum += value * value;
    }
    parts[part][lane] = sum;
    __syncthreads();
    if (part == 0 && c < w.cols) {
      for (int other = 1; other < kParts; ++other) sum += parts[other][lane];
      squares[c] = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    divide(const CudaMatrix w, const uint8_t* dead, const float* input, const float* output, float* out,
           int64_t rows, int64_t cols) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < cols;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      float value = 0;
      if (r < w.rows && c < w.cols) {
        const float both = input[c] * output[r];
        value = both == 0 ? 0.0F : value_at(w, dead, r, c) / both;
      }
      out[r * cols + c] = value;
    }
  }
}

__global__ void __launch_bounds__(kThreads) multiply(const float* rotated, int64_t stride, const float* input,
                                                     const float* output, float* out, int64_t n, int64_t k) {
  for (int64_t r = blockIdx.y; r < n; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < k;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      out[r * k + c] = output[r] * (rotated[r * stride + c] * input[c]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) take(const float* from, int64_t k, const int32_t* chosen,
                                                 const float* factors, float* out, int64_t rows) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < k;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      out[r * k + c] = factors[r] * from[chosen[r] * k + c];
    }
  }
}

// Blocks of 128 along one direction, 32 of them side by side: element i of the one at j is
// matrix[i * along + j * across]. Grid: groups of 32, blocks of 128.
template <class T>
__global__ void __launch_bounds__(kThreads) rotate(T* matrix, int64_t along, int64_t across) {
  __shared__ T values[kRotationBlock][kAcross + 1];
  T* const from =
      matrix + int64_t{blockIdx.y} * kRotationBlock * along + int64_t{blockIdx.x} * kAcross * across;
  const bool runs_along = along == 1;
  const auto each = [&](const auto& body) {
    for (int at = static_cast<int>(threadIdx.x); at < kRotationBlock * kAcross; at += kThreads) {
      const int i = runs_along ? at % kRotationBlock : at / kAcross;
      const int j = runs_along ? at / kRotationBlock : at % kAcross;
      body(values[i][j], from[i * along + j * across]);
    }
  };
  each([](T& value, const T& stored) { value = stored; });
  for (int half = 1; half < kRotationBlock; half *= 2) {
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < kRotationBlock / 2 * kAcross; at += kThreads) {
      const int pair = at / kAcross;
      const int j = at % kAcross;
      const int i = pair / half * 2 * half + pair % half;
      const T a = values[i][j];
      const T b = values[i + half][j];
      values[i][j] = a + b;
      values[i + half][j] = a - b;
    }
  }
  __syncthreads();
  constexpr auto kNorm = static_cast<T>(0.08838834764831845);  // 1 / sqrt(128)
  each([](const T& value, T& stored) { stored = value * kNorm; });
}

template <class T>
void launch_rotate(T* matrix, int64_t side, int64_t blocks, int64_t along, int64_t across,
                   cudaStream_t stream) {
  if (side == 0 || blocks == 0) return;
  const int64_t groups = side / kAcross;
  for (int64_t first = 0; first < blocks; first += 65535) {
    const dim3 grid(static_cast<unsigned>(groups),
                    static_cast<unsigned>(std::min<int64_t>(blocks - first, 65535)));
    rotate<<<grid, kThreads, 0, stream>>>(matrix + first * kRotationBlock * along, along, across);
    check_cuda(cudaGetLastError(), "launch of rotate");
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_sides(const double* sum, int64_t k, const double* factors, double* out, int64_t size) {
  for (int64_t r = blockIdx.y; r < size; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < size;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      out[r * size + c] = r < k && c < k ? factors[r] * sum[r * k + c] * factors[c] : 0.0;
    }
  }
}

__global__ void __launch_bounds__(kThreads) symmetrize(double* matrix, int64_t size) {
  for (int64_t r = blockIdx.y; r < size; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < r;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      const double mean = 0.5 * (matrix[r * size + c] + matrix[c * size + r]);
      matrix[r * size + c] = mean;
      matrix[c * size + r] = mean;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    solve(const float* values, int64_t stride, const float* decoded, const float* upper, int64_t upper_stride,
          float* errors, int64_t errors_stride, int64_t n) {
  __shared__ float triangle[kStep][kStep];
  for (int at = static_cast<int>(threadIdx.x); at < kStep * kStep; at += kThreads) {
    triangle[at / kStep][at % kStep] = upper[at / kStep * upper_stride + at % kStep];
  }
  __syncthreads();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= n) return;
  float e[kStep];
#pragma unroll
  for (int c = 0; c < kStep; ++c) {
    float left = values[r * stride + c] - decoded[r * kStep + c];
#pragma unroll
    for (int before = 0; before < c; ++before) left = fmaf(-triangle[before][c], e[before], left);
    e[c] = left / triangle[c][c];
    errors[r * errors_stride + c] = e[c];
  }
}

__global__ void __launch_bounds__(kThreads)
    row_products(const float* product, const CudaMatrix w, const float* decoded, double* with_original,
                 double* with_decoded) {
  for (int64_t r = blockIdx.x; r < w.rows; r += gridDim.x) {
    double original = 0;
    double again = 0;
    for (int64_t c = threadIdx.x; c < w.cols; c += kThreads) {
      const double factor = product[r * w.cols + c];
      original += factor * double{load_float(w.data, w.dtype, r * w.stride + c)};
      again += factor * double{decoded[r * w.cols + c]};
    }
    original = block_sum<kThreads>(original);
    again = block_sum<kThreads>(again);
    if (threadIdx.x == 0) {
      with_original[r] = original;
      with_decoded[r] = again;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    subtract(const CudaMatrix w, const float* decoded, int64_t first_row, int64_t count, double* errors,
             double* partial_squares) {
  double sum = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t r = first_row + at / w.cols;
    const int64_t c = at % w.cols;
    const double error =
        double{load_float(w.data, w.dtype, r * w.stride + c)} - double{decoded[r * w.cols + c]};
    errors[at] = error;
    sum += error * error;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial_squares[blockIdx.x] = sum;
}

// A thread for each of 32 columns and each eighth row.
__global__ void __launch_bounds__(kThreads)
    column_products(const float* a, const float* b, int64_t n, int64_t k, double* sums) {
  constexpr int kParts = kThreads / 32;
  __shared__ double parts[kParts][32];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int part = static_cast<int>(threadIdx.x / 32);
  for (int64_t first = int64_t{32} * blockIdx.x; first < k; first += int64_t{32} * gridDim.x) {
    const int64_t c = first + lane;
    double sum = 0;
    for (int64_t r = part; c < k && r < n; r += kParts) sum += double{a[r * k + c]} * double{b[r * k + c]};
    parts[part][lane] = sum;
    __syncthreads();
    if (part == 0 && c < k) {
      for (int other = 1; other < kParts; ++other) sum += parts[other][lane];
      sums[c] = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) weigh(const float* gram, const double* sum, double largest,
                                                  double diagonal_factor, double* form, int64_t k) {
  for (int64_t r = blockIdx.y; r < k; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < k;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      double value = double{c <= r ? gram[r * k + c] : gram[c * k + r]} * (sum[r * k + c] / largest);
      if (r == c) {
        value *= diagonal_factor;
        if (diagonal_factor != 1 && !(value > 0)) value = 1;
      }
      form[r * k + c] = value;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    quadratic(const double* form, const double* values, int64_t k, double* products) {
  for (int64_t r = blockIdx.x; r < k; r += gridDim.x) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < k; c += kThreads) sum += form[r * k + c] * values[c];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) products[r] = sum * values[r];
  }
}

__global__ void __launch_bounds__(kThreads)
    narrow_errors(const CudaMatrix w, const float* decoded, float* out) {
  for (int64_t r = blockIdx.y; r < w.rows; r += gridDim.y) {
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < w.cols;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      out[r * w.cols + c] = load_float(w.data, w.dtype, r * w.stride + c) - decoded[r * w.cols + c];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const double* from, double factor, float* to, int64_t count) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    to[at] = static_cast<float>(from[at] * factor);
  }
}

dim3 grid_of(int64_t rows, int64_t cols) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(cols, kThreads), 1, 64)), capped(rows));
}

}  // namespace

void sum_row_squares(const CudaMatrix& w, const uint8_t* dead, double* squares, cudaStream_t stream) {
  row_squares<<<capped(w.rows), kThreads, 0, stream>>>(w, dead, squares);
  check_cuda(cudaGetLastError(), "launch of row_squares");
}

void sum_column_squares(const CudaMatrix& w, const uint8_t* dead, const double* row_factors, double* squares,
                        cudaStream_t stream) {
  column_squares<<<capped(ceil_div(w.cols, 32)), kThreads, 0, stream>>>(w, dead, row_factors, squares);
  check_cuda(cudaGetLastError(), "launch of column_squares");
}

void divide_by_scales(const CudaMatrix& w, const uint8_t* dead, const float* input, const float* output,
                      float* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  divide<<<grid_of(rows, cols), kThreads, 0, stream>>>(w, dead, input, output, out, rows, cols);
  check_cuda(cudaGetLastError(), "launch of divide");
}

void multiply_by_scales(const float* rotated, int64_t stride, const float* input, const float* output,
                        float* out, int64_t n, int64_t k, cudaStream_t stream) {
  multiply<<<grid_of(n, k), kThreads, 0, stream>>>(rotated, stride, input, output, out, n, k);
  check_cuda(cudaGetLastError(), "launch of multiply");
}

void take_rows(const float* from, int64_t k, const int32_t* chosen, const float* factors, float* out,
               int64_t rows, cudaStream_t stream) {
  take<<<grid_of(rows, k), kThreads, 0, stream>>>(from, k, chosen, factors, out, rows);
  check_cuda(cudaGetLastError(), "launch of take");
}

void rotate_columns(float* matrix, int64_t rows, int64_t cols, cudaStream_t stream) {
  launch_rotate(matrix, rows, cols / kRotationBlock, 1, cols, stream);
}
void rotate_columns(double* matrix, int64_t rows, int64_t cols, cudaStream_t stream) {
  launch_rotate(matrix, rows, cols / kRotationBlock, 1, cols, stream);
}
void rotate_rows(float* matrix, int64_t rows, int64_t cols, cudaStream_t stream) {
  launch_rotate(matrix, cols, rows / kRotationBlock, cols, 1, stream);
}
void rotate_rows(double* matrix, int64_t rows, int64_t cols, cudaStream_t stream) {
  launch_rotate(matrix, cols, rows / kRotationBlock, cols, 1, stream);
}

void scale_both_sides(const double* sum, int64_t k, const double* factors, double* out, int64_t size,
                      cudaStream_t stream) {
  scale_sides<<<grid_of(size, size), kThreads, 0, stream>>>(sum, k, factors, out, size);
  check_cuda(cudaGetLastError(), "launch of scale_sides");
}

void make_symmetric(double* matrix, int64_t size, cudaStream_t stream) {
  symmetrize<<<grid_of(size, size), kThreads, 0, stream>>>(matrix, size);
  check_cuda(cudaGetLastError(), "launch of symmetrize");
}

void solve_step(const float* values, int64_t stride, const float* decoded, const float* upper,
                int64_t upper_stride, float* errors, int64_t errors_stride, int64_t n, cudaStream_t stream) {
  solve<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(
      values, stride, decoded, upper, upper_stride, errors, errors_stride, n);
  check_cuda(cudaGetLastError(), "launch of solve");
}

void dot_rows(const float* product, const CudaMatrix& w, const float* decoded, double* with_original,
              double* with_decoded, cudaStream_t stream) {
  row_products<<<capped(w.rows), kThreads, 0, stream>>>(product, w, decoded, with_original, with_decoded);
  check_cuda(cudaGetLastError(), "launch of row_products");
}

void subtract_rows(const CudaMatrix& w, const float* decoded, int64_t first_row, int64_t rows, double* errors,
                   double* partial_squares, cudaStream_t stream) {
  subtract<<<kErrorBlocks, kThreads, 0, stream>>>(w, decoded, first_row, rows * w.cols, errors,
                                                  partial_squares);
  check_cuda(cudaGetLastError(), "launch of subtract");
}

void dot_columns(const float* a, const float* b, int64_t n, int64_t k, double* sums, cudaStream_t stream) {
  column_products<<<capped(ceil_div(k, 32)), kThreads, 0, stream>>>(a, b, n, k, sums);
  check_cuda(cudaGetLastError(), "launch of column_products");
}

void weigh_gram(const float* gram, const double* sum, double largest, double diagonal_factor, double* form,
                int64_t k, cudaStream_t stream) {
  weigh<<<grid_of(k, k), kThreads, 0, stream>>>(gram, sum, largest, diagonal_factor, form, k);
  check_cuda(cudaGetLastError(), "launch of weigh");
}

void quadratic_terms(const double* form, const double* values, int64_t k, double* products,
                     cudaStream_t stream) {
  quadratic<<<capped(k), kThreads, 0, stream>>>(form, values, k, products);
  check_cuda(cudaGetLastError(), "launch of quadratic");
}

void subtract_narrow(const CudaMatrix& w, const float* decoded, float* out, cudaStream_t stream) {
  narrow_errors<<<grid_of(w.rows, w.cols), kThreads, 0, stream>>>(w, decoded, out);
  check_cuda(cudaGetLastError(), "launch of narrow_errors");
}

void narrow(const double* from, double factor, float* to, int64_t count, cudaStream_t stream) {
  narrow_kernel<<<capped(ceil_div(count, kThreads)), kThreads, 0, stream>>>(from, factor, to, count);
  check_cuda(cudaGetLastError(), "launch of narrow");
}

}  // namespace quantloom::cuda
