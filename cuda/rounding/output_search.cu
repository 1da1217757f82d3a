// The search for scales by the error of a group's outputs, e^T H e: errors of all groups under one factor by
// a kernel, their products with the groups' blocks of H by cuBLAS.
#include <algorithm>
#include <cmath>

#include "common/math_handles.hpp"
#include "rounding/output_search.hpp"
#include "rounding/segment.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

// blocks [groups, size, size]: those of H on the diagonal, times factor.
__global__ void __launch_bounds__(kThreads)
    gather_blocks_kernel(const double* sum, int64_t k, const int32_t* column_at, int64_t first, int64_t end,
                         int64_t size, double factor, float* blocks) {
  const int64_t total = (end - first) * size;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / size;
    const int64_t group = row / size;
    const int64_t i = first + row;
    const int64_t j = first + group * size + at % size;
    float value = 0;
    if (j < end) {
      const int64_t own = column_at == nullptr ? i : static_cast<int64_t>(column_at[i]);
      const int64_t other = column_at == nullptr ? j : static_cast<int64_t>(column_at[j]);
      value = static_cast<float>(sum[own * k + other] * factor);
    }
    blocks[at] = value;
  }
}

// errors [n, width] = decoded - value for the columns of the task.
template <class R>
__global__ void __launch_bounds__(kThreads)
    errors_kernel(FitTask task, R rounder, int64_t width, float* errors) {
  const int64_t total = task.w.rows * width;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / width;
    const int64_t column = at % width;
    const int64_t group = task.first_group + column / task.group_size;
    const Segment segment = segment_of(task, row, task.first_column, width);
    const float value = segment.value(column);
    const float decoded = rounder.encode(rounder.column(row, group), value).decoded;
    errors[at] = static_cast<float>(segment.error(column, value, decoded));
  }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(float* values, int64_t count, float value) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    values[at] = value;
  }
}

// A warp for each row and group: takes the factor if its error is less than that of those before.
__global__ void __launch_bounds__(kThreads)
    compare_kernel(const float* errors, const float* products, int64_t rows, int64_t width, int64_t size,
                   float factor, bool first, double* best_errors, float* best_factors) {
  constexpr int kWarp = 32;
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = (width + size - 1) / size;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       at < rows * groups; at += warps) {
    const int64_t begin = at / groups * width + at % groups * size;
    const int64_t count = min(size, width - at % groups * size);
    double sum = 0;
    for (int64_t c = lane; c < count; c += kWarp) {
      sum += static_cast<double>(errors[begin + c]) * static_cast<double>(products[begin + c]);
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffU, sum, distance);
    }
    if (lane != 0) continue;
    if (first) {
      best_errors[at] = INFINITY;
      best_factors[at] = 1.0F;
    }
    if (sum < best_errors[at]) {
      best_errors[at] = sum;
      best_factors[at] = factor;
    }
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMaxBlocks));
}

}  // namespace

void fit_by_output_error(DeviceEncoder& encoder, const FitTask& task, const SearchFactors& search,
                         const OutputMetric& metric, cudaStream_t stream) {
  const int64_t n = task.w.rows;
  const int64_t width = task.end_column - task.first_column;
  const int64_t size = std::min(task.group_size, width);
  const int64_t groups = ceil_div(width, size);
  const BlasScope blas(stream);
  const DeviceBuffer<float> blocks(checked_mul(width, size), stream);
  const DeviceBuffer<float> errors(checked_mul(n, width), stream);
  const DeviceBuffer<float> products(errors.count(), stream);
  const DeviceBuffer<float> factors(checked_mul(n, groups), stream);
  const DeviceBuffer<float> best_factors(factors.count(), stream);
  const DeviceBuffer<double> best_errors(factors.count(), stream);
  gather_blocks_kernel<<<blocks_for(blocks.count()), kThreads, 0, stream>>>(
      metric.sum, metric.k, metric.column_at, task.first_column, task.end_column, size, metric.factor,
      blocks.data());
  check_cuda(cudaGetLastError(), "launch of gather_blocks");
  const float one = 1.0F;
  const float zero = 0.0F;
  for (int step = 0; step < search.steps(); ++step) {
    const float factor = search.host()[static_cast<size_t>(step)];
    fill_kernel<<<blocks_for(factors.count()), kThreads, 0, stream>>>(factors.data(), factors.count(),
                                                                      factor);
    encoder.fit_scaled(task, factors.data());
    std::visit(
        [&](const auto& rounder) {
          errors_kernel<<<blocks_for(errors.count()), kThreads, 0, stream>>>(task, rounder, width,
                                                                             errors.data());
        },
        encoder.rounder());
    check_cuda(cudaGetLastError(), "launch of errors of a search");
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size;
      const auto own = static_cast<int>(std::min(size, width - first));
      // Column-major: P^T = H E^T.
      check_cublas(
          cublas().sgemm(blas.handle(), kOpN, kOpN, own, static_cast<int>(n), own, &one,
                         blocks.data() + first * size, static_cast<int>(size), errors.data() + first,
                         static_cast<int>(width), &zero, products.data() + first, static_cast<int>(width)),
          "products of a search");
    }
    compare_kernel<<<blocks_for(checked_mul(factors.count(), 32)), kThreads, 0, stream>>>(
        errors.data(), products.data(), n, width, size, factor, step == 0, best_errors.data(),
        best_factors.data());
    check_cuda(cudaGetLastError(), "launch of compare");
  }
  encoder.fit_scaled_and_refine(task, best_factors.data());
  // The buffers go back in the order of the stream.
}

}  // namespace quantloom::cuda
