#include <algorithm>

#include "additive/every_element.cuh"
#include "additive/feedback_codes.hpp"
#include "additive/first_codes.hpp"
#include "common/device_pointer.hpp"
#include "common/math_handles.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"
#include "rounding/upper_factor.hpp"
#include "rounding/walk.hpp"
#include "rounding/walk_block.hpp"

namespace quantloom::cuda {
namespace {

// One step of the walk: the columns of a block.
struct Step {
  float* working;  // [n, stride]: weights, columns in the order of the walk
  int64_t stride;
  int64_t n;
  const float* tables;
  const float* scales;  // [N][S]
  uint16_t* codes;      // [N, blocks, books]
  int64_t row_groups;
  int64_t blocks;
  int64_t scale_count;
  int64_t entries;
  int books;
  int out_group;
  int in_group;
  const float* upper;  // [k, stride]
  float* errors;       // [n, kWalkBlock]: of the block of columns
  int64_t block;       // in the matrix
  int64_t scale;       // of a group of rows
  int64_t position;    // of its first column on the walk
  int64_t begin;       // of the block of columns
  int64_t end;
};

// x [N, dim]: what the step is to code, over its scales. Zeros beyond the matrix.
__global__ void __launch_bounds__(kThreads) load_step_kernel(Step step, float* x) {
  const int dim = step.out_group * step.in_group;
  for (int64_t at = first_thread(); at < step.row_groups * dim; at += thread_count()) {
    const int64_t group = at / dim;
    const int64_t row = group * step.out_group + at % dim / step.in_group;
    float value = 0;
    if (row < step.n) {
      value = __fdiv_rn(step.working[row * step.stride + step.position + at % step.in_group],
                        step.scales[group * step.scale_count + step.scale]);
    }
    x[at] = value;
  }
}

// Takes the entries of a table from x, and keeps their codes.
__global__ void __launch_bounds__(kThreads)
    subtract_step_kernel(Step step, int book, const int32_t* found, float* x) {
  const int dim = step.out_group * step.in_group;
  for (int64_t at = first_thread(); at < step.row_groups * dim; at += thread_count()) {
    const int64_t group = at / dim;
    const int64_t code = found[group];
    x[at] -= step.tables[(book * step.entries + code) * dim + at % dim];
    if (at % dim == 0) {
      step.codes[(group * step.blocks + step.block) * step.books + book] = static_cast<uint16_t>(code);
    }
  }
}

// A warp takes a row, a lane of it a column of the step: errors, and what they do to the block's columns to
// come.
__global__ void __launch_bounds__(kThreads) push_step_kernel(Step step) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int dim = step.out_group * step.in_group;
  for (int64_t row = first_thread() / 32; row < step.n; row += thread_count() / 32) {
    const int64_t group = row / step.out_group;
    float* const working = step.working + row * step.stride;
    float error = 0;
    if (lane < step.in_group) {
      const int64_t element = row % step.out_group * step.in_group + lane;
      const uint16_t* const codes = step.codes + (group * step.blocks + step.block) * step.books;
      float sum = step.tables[codes[0] * dim + element];
      for (int book = 1; book < step.books; ++book) {
        sum = __fadd_rn(sum, step.tables[(book * step.entries + codes[book]) * dim + element]);
      }
      const float scale = step.scales[group * step.scale_count + step.scale];
      error = __fsub_rn(working[step.position + lane], __fmul_rn(sum, scale));
    }
    for (int c = 0; c < step.in_group; ++c) {
      const float* const upper = step.upper + (step.position + c) * step.stride + step.position;
      if (lane == c) error = __fdiv_rn(error, upper[c]);
      const float of_column = __shfl_sync(~0U, error, c);
      if (lane > c && lane < step.in_group) error = __fmaf_rn(-upper[lane], of_column, error);
    }
    if (lane < step.in_group) step.errors[row * kWalkBlock + step.position - step.begin + lane] = error;
    for (int64_t first = step.position + step.in_group; first < step.end; first += 32) {
      const int64_t column = first + lane;
      float value = column < step.end ? working[column] : 0.0F;
      for (int c = 0; c < step.in_group; ++c) {
        const float of_column = __shfl_sync(~0U, error, c);
        if (column < step.end) {
          value = __fmaf_rn(-step.upper[(step.position + c) * step.stride + column], of_column, value);
        }
      }
      if (column < step.end) working[column] = value;
    }
  }
}

template <class T>
DeviceBuffer<T> uploaded(const std::vector<T>& values, cudaStream_t stream) {
  DeviceBuffer<T> buffer(static_cast<int64_t>(values.size()), stream);
  buffer.upload(values.data(), static_cast<int64_t>(values.size()));
  return buffer;
}

}  // namespace

AdditiveArrays feedback_codes(const CudaMatrix& w, const Additive& format, const CudaHessian& hessian,
                              const std::vector<double>& diagonal, const CudaErrorFeedbackOptions& options,
                              std::vector<double>& damping_tried, cudaStream_t stream) {
  const int64_t n = w.rows;
  const int64_t k = w.cols;
  const int64_t dim = format.dim();
  std::vector<int32_t> natural;
  std::vector<uint8_t> is_dead;
  for (const double entry : diagonal) {
    natural.push_back(static_cast<int32_t>(natural.size()));
    is_dead.push_back(entry == 0 ? 1 : 0);
  }
  const std::vector<int64_t> columns = walk_order(diagonal, format.in_group, options.act_order);
  const std::vector<int32_t> on_walk(columns.begin(), columns.end());
  const DeviceBuffer<int32_t> order = uploaded(on_walk, stream);
  const DeviceBuffer<uint8_t> dead = uploaded(is_dead, stream);
  const UpperFactor factor(hessian, diagonal, order.data(), options.damping, options.damping_ladder, stream);
  damping_tried = factor.damping_tried();
  const int64_t stride = factor.stride();
  const DeviceBuffer<float> working(checked_mul(n, stride), stream);
  {
    const DeviceBuffer<int32_t> as_it_is = uploaded(natural, stream);
    gather_columns(w, as_it_is.data(), dead.data(), working.data(), stride, stream);
    check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  }
  AdditiveArrays arrays = scaled_arrays(
      w, format, mean_magnitudes({working.data(), DType::f32, n, k, stride}, format, stream), stream);
  gather_columns(w, order.data(), dead.data(), working.data(), stride, stream);

  const int64_t row_groups = format.row_groups(n);
  const DeviceBuffer<float> errors(checked_mul(n, kWalkBlock), stream);
  const DeviceBuffer<float> x(checked_mul(row_groups, dim), stream);
  const DeviceBuffer<int32_t> found(row_groups, stream);
  Step step{};
  step.working = working.data();
  step.stride = stride;
  step.n = n;
  step.tables = arrays.tables.data();
  step.scales = arrays.scales.data();
  step.codes = arrays.codes.data();
  step.row_groups = row_groups;
  step.blocks = format.blocks(k);
  step.scale_count = format.scale_count(k);
  step.entries = format.entries();
  step.books = format.codebooks;
  step.out_group = static_cast<int>(format.out_group);
  step.in_group = static_cast<int>(format.in_group);
  step.upper = factor.upper();
  step.errors = errors.data();
  const BlasScope blas(stream);
  const float one = 1.0F;
  const float minus_one = -1.0F;
  const int64_t width =
      std::max<int64_t>(std::min<int64_t>(options.block, kWalkBlock) / step.in_group, 1) * step.in_group;
  for (step.begin = 0; step.begin < k; step.begin = step.end) {
    step.end = std::min(k, step.begin + width);
    for (step.position = step.begin; step.position < step.end; step.position += step.in_group) {
      const int64_t column = columns[static_cast<size_t>(step.position)];
      step.block = column / step.in_group;
      step.scale = column / format.scale_columns(k);
      load_step_kernel<<<blocks_for(row_groups * dim), kThreads, 0, stream>>>(step, x.data());
      check_cuda(cudaGetLastError(), "launch of load_step");
      for (int book = 0; book < step.books; ++book) {
        nearest_neighbour_cuda(
            {x.data(), DType::f32, row_groups, dim, dim},
            {arrays.tables.data() + book * step.entries * dim, DType::f32, step.entries, dim, dim},
            found.data(), stream);
        subtract_step_kernel<<<blocks_for(row_groups * dim), kThreads, 0, stream>>>(step, book, found.data(),
                                                                                    x.data());
        check_cuda(cudaGetLastError(), "launch of subtract_step");
      }
      push_step_kernel<<<blocks_for(n * 32), kThreads, 0, stream>>>(step);
      check_cuda(cudaGetLastError(), "launch of push_step");
    }
    if (step.end == k) break;
    // Column-major: remainder^T -= U[block, remainder]^T errors^T.
    check_cublas(
        cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k - step.end), static_cast<int>(n),
                       static_cast<int>(step.end - step.begin), &minus_one,
                       factor.upper() + step.begin * stride + step.end, static_cast<int>(stride),
                       errors.data(), kWalkBlock, &one, working.data() + step.end, static_cast<int>(stride)),
        "update of the remaining columns");
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  return arrays;
}

}  // namespace quantloom::cuda
