#include <algorithm>

#include "additive/entry_sums.hpp"
#include "additive/every_element.cuh"
#include "additive/refit.hpp"
#include "additive/split_products.hpp"
#include "common/block_sum.cuh"
#include "common/math_handles.hpp"
#include "common/matrix_checks.hpp"
#include "formats/scalar_rounding.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kDotBlocks = 512;

struct ExpandTask {
  const double* tables;  // [books][entries][dim]
  const double* scales;  // [N][S]
  const uint16_t* codes;
  const float* weights;  // [n, columns]: values become what the sums leave of them; null for the sums
  float* values;         // [n, columns]
  int64_t rows;
  int64_t columns;
  int64_t blocks;
  int books;
  int64_t entries;
  int in_group;
  int out_group;
  int64_t scale_count;
  int64_t scale_columns;
};

// What a unit of a scale makes of a weight.
__device__ __forceinline__ double unit_of(const ExpandTask& task, int64_t row, int64_t column) {
  const int dim = task.in_group * task.out_group;
  const int64_t element = row % task.out_group * task.in_group + column % task.in_group;
  const uint16_t* const codes =
      task.codes + (row / task.out_group * task.blocks + column / task.in_group) * task.books;
  double sum = 0;
  for (int book = 0; book < task.books; ++book) {
    sum += task.tables[(book * task.entries + codes[book]) * dim + element];
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) expand_kernel(ExpandTask task) {
  for (int64_t at = first_thread(); at < task.rows * task.columns; at += thread_count()) {
    const int64_t row = at / task.columns;
    const int64_t column = at % task.columns;
    const int64_t block = column / task.in_group;
    const double scale =
        task.scales[row / task.out_group * task.scale_count + block * task.in_group / task.scale_columns];
    const auto value = static_cast<float>(scale * unit_of(task, row, column));
    task.values[at] = task.weights == nullptr ? value : task.weights[at] - value;
  }
}

// losses [N]: e^T (H e) of each group of rows, by a block.
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const float* errors, const float* products, int64_t size, double* losses) {
  const int64_t first = blockIdx.x * size;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    sum += static_cast<double>(errors[first + i]) * static_cast<double>(products[first + i]);
  }
  const double whole = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = whole;
}

__global__ void __launch_bounds__(kThreads)
    dot_kernel(const double* a, const double* b, int64_t count, double* partial) {
  double sum = 0;
  for (int64_t at = first_thread(); at < count; at += thread_count()) sum += a[at] * b[at];
  const double whole = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = whole;
}

// to += factor * from
__global__ void __launch_bounds__(kThreads)
    add_kernel(double factor, const double* from, double* to, int64_t count) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) to[at] += factor * from[at];
}

// to = from + factor * to
__global__ void __launch_bounds__(kThreads)
    turn_kernel(double factor, const double* from, double* to, int64_t count) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    to[at] = from[at] + (factor == 0 ? 0.0 : factor * to[at]);
  }
}

// In place, each block [size, size] = L L^T; 0 at its first place if a pivot is not positive: an entry
// without weight stays as it is.
__global__ void __launch_bounds__(kThreads) factorize_kernel(double* blocks, int64_t count, int size) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    double* const a = blocks + at * size * size;
    double trace = 0;
    for (int i = 0; i < size; ++i) trace += a[i * size + i];
    bool positive = true;
    for (int i = 0; i < size && positive; ++i) {
      a[i * size + i] += 1e-6 * trace;
      for (int j = 0; j <= i; ++j) {
        double sum = a[i * size + j];
        for (int t = 0; t < j; ++t) sum -= a[i * size + t] * a[j * size + t];
        if (i != j) {
          a[i * size + j] = sum / a[j * size + j];
        } else if (sum > 0) {
          a[i * size + i] = sqrt(sum);
        } else {
          positive = false;
        }
      }
    }
    if (!positive) a[0] = 0;
  }
}

// z = the solution of L L^T z = residual for each row of each entry.
__global__ void __launch_bounds__(kThreads)
    precondition_kernel(const double* blocks, const double* residual, double* z, int64_t rows, int out_group,
                        int size) {
  for (int64_t at = first_thread(); at < rows; at += thread_count()) {
    const double* const l = blocks + at / out_group * size * size;
    const double* const from = residual + at * size;
    double* const x = z + at * size;
    if (!(l[0] > 0)) {
      for (int i = 0; i < size; ++i) x[i] = 0;
      continue;
    }
    for (int i = 0; i < size; ++i) {
      double value = from[i];
      for (int t = 0; t < i; ++t) value -= l[i * size + t] * x[t];
      x[i] = value / l[i * size + i];
    }
    for (int i = size - 1; i >= 0; --i) {
      double value = x[i];
      for (int t = i + 1; t < size; ++t) value -= l[t * size + i] * x[t];
      x[i] = value / l[i * size + i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    round_tables_kernel(const double* x, int64_t count, float* tables) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    const auto value = static_cast<float>(fmin(fmax(x[at], -65504.0), 65504.0));
    tables[at] = __half2float(__float2half_rn(value)) + 0.0F;
  }
}

// sums [N][S]: products times what one unit of a scale makes, a warp for each scale.
__global__ void __launch_bounds__(kThreads)
    project_kernel(ExpandTask task, const float* products, double* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row_groups = task.rows / task.out_group;
  const int64_t span =
      task.scale_count == 1 ? task.columns : task.scale_columns;  // whole blocks, or all of them
  for (int64_t at = first_thread() / 32; at < row_groups * task.scale_count; at += thread_count() / 32) {
    const int64_t row_group = at / task.scale_count;
    const int64_t first = at % task.scale_count * span;
    const int64_t width = min(span, task.columns - first);
    double sum = 0;
    for (int a = 0; a < task.out_group; ++a) {
      const int64_t row = row_group * task.out_group + a;
      for (int64_t c = lane; c < width; c += 32) {
        sum += unit_of(task, row, first + c) * static_cast<double>(products[row * task.columns + first + c]);
      }
    }
    for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, mask);
    if (lane == 0) sums[at] = sum;
  }
}

// One step of conjugate gradients of each group of rows on its own, by a thread.
__global__ void __launch_bounds__(kThreads)
    scale_step_kernel(int64_t rows, int64_t count, const double* image, double* x, double* residual,
                      double* direction, double* sizes) {
  for (int64_t row = first_thread(); row < rows; row += thread_count()) {
    const int64_t first = row * count;
    double curvature = 0;
    for (int64_t i = first; i < first + count; ++i) curvature += direction[i] * image[i];
    const bool moves = curvature > 0;
    double next = 0;
    for (int64_t i = first; i < first + count; ++i) {
      if (moves) {
        x[i] += sizes[row] / curvature * direction[i];
        residual[i] -= sizes[row] / curvature * image[i];
      }
      next += residual[i] * residual[i];
    }
    for (int64_t i = first; i < first + count; ++i) {
      direction[i] = moves && sizes[row] > 0 ? residual[i] + next / sizes[row] * direction[i] : 0;
    }
    sizes[row] = next;
  }
}

__global__ void __launch_bounds__(kThreads)
    row_sizes_kernel(int64_t rows, int64_t count, const double* residual, double* sizes) {
  for (int64_t row = first_thread(); row < rows; row += thread_count()) {
    double sum = 0;
    for (int64_t i = row * count; i < (row + 1) * count; ++i) sum += residual[i] * residual[i];
    sizes[row] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) store_scales_kernel(const double* x, int64_t count, DType dtype,
                                                                double unit, float* stored, double* numbers) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    const float value = stored_scale(dtype, fmax(x[at], 0.0) * unit);
    if (isfinite(value)) stored[at] = value;
    numbers[at] = static_cast<double>(stored[at]) / unit;
  }
}

// Takes back the scales of rows whose loss has not fallen.
__global__ void __launch_bounds__(kThreads)
    keep_scales_kernel(const double* before, const double* after, const float* old_stored, int64_t rows,
                       int64_t count, float* stored) {
  for (int64_t at = first_thread(); at < rows * count; at += thread_count()) {
    if (!(after[at / count] < before[at / count])) stored[at] = old_stored[at];
  }
}

class Refit {
 public:
  Refit(const AdditiveProblem& problem, AdditiveArrays& arrays)
      : problem_(problem),
        format_(problem.format),
        arrays_(arrays),
        stream_(problem.stream),
        size_(arrays.tables.count()),
        blas_(stream_),
        h_(checked_mul(problem.columns, problem.columns), stream_),
        h_high_(h_.count(), stream_),
        h_low_(h_.count(), stream_),
        scales_(arrays.scales.count(), stream_),
        numbers_(size_, stream_),
        values_(checked_mul(problem.n, problem.columns), stream_),
        high_(values_.count(), stream_),
        low_(values_.count(), stream_),
        products_(values_.count(), stream_),
        losses_(problem.row_groups, stream_),
        partial_(kDotBlocks, stream_),
        sum_(1, stream_) {
    problem.hessian(nullptr, h_.data());
    split(h_.data(), h_high_.data(), h_low_.data(), h_.count(), stream_);
    convert(arrays.scales.data(), scales_.data(), scales_.count(), 1 / problem.weight_unit(), stream_);
  }

  void tables(int steps) {
    const EntrySums sums(problem_, arrays_);
    const double before = total_loss();
    // E and E H are there: the right-hand side is what the errors ask of the tables.
    const DeviceBuffer<double> residual(size_, stream_);
    const DeviceBuffer<double> x(size_, stream_);
    const DeviceBuffer<double> z(size_, stream_);
    const DeviceBuffer<double> direction(size_, stream_);
    const DeviceBuffer<double> image(size_, stream_);
    const auto g = static_cast<int>(format_.in_group);
    const int64_t entries = size_ / format_.dim();
    const DeviceBuffer<double> blocks(checked_mul(entries, g * g), stream_);
    sums.gather_blocks(h_.data(), scales_.data(), blocks.data());
    factorize_kernel<<<blocks_for(entries), kThreads, 0, stream_>>>(blocks.data(), entries, g);
    check_cuda(cudaGetLastError(), "launch of factorize");
    const auto precondition = [&] {
      precondition_kernel<<<blocks_for(size_ / g), kThreads, 0, stream_>>>(
          blocks.data(), residual.data(), z.data(), size_ / g, static_cast<int>(format_.out_group), g);
      check_cuda(cudaGetLastError(), "launch of precondition");
    };
    sums.gather(products_.data(), scales_.data(), residual.data());
    convert(arrays_.tables.data(), x.data(), size_, 1.0, stream_);
    precondition();
    turn(0, z, direction);
    double size = dot(residual, z);
    const double start = size;
    for (int step = 0; step < steps && size > 1e-24 * start && size > 0; ++step) {
      expand(direction.data(), scales_.data(), false);
      multiply();
      sums.gather(products_.data(), scales_.data(), image.data());
      const double curvature = dot(direction, image);
      if (!(curvature > 0)) break;
      const double length = size / curvature;
      add(length, direction, x);
      add(-length, image, residual);
      precondition();
      const double next = dot(residual, z);
      turn(next / size, z, direction);
      size = next;
    }
    DeviceBuffer<float> rounded(size_, stream_);
    round_tables_kernel<<<blocks_for(size_), kThreads, 0, stream_>>>(x.data(), size_, rounded.data());
    check_cuda(cudaGetLastError(), "launch of round_tables");
    std::swap(arrays_.tables, rounded);
    if (!(total_loss() < before)) std::swap(arrays_.tables, rounded);
  }

  void scales(int steps) {
    const int64_t rows = problem_.row_groups;
    const int64_t count = problem_.scale_count;
    const int64_t all = rows * count;
    find_losses();
    const DeviceBuffer<double> before(rows, stream_);
    convert(losses_.data(), before.data(), rows, 1.0, stream_);
    const DeviceBuffer<double> residual(all, stream_);
    const DeviceBuffer<double> x(all, stream_);
    const DeviceBuffer<double> direction(all, stream_);
    const DeviceBuffer<double> image(all, stream_);
    const DeviceBuffer<double> sizes(rows, stream_);
    project(residual);
    convert(scales_.data(), x.data(), all, 1.0, stream_);
    convert(residual.data(), direction.data(), all, 1.0, stream_);
    row_sizes_kernel<<<blocks_for(rows), kThreads, 0, stream_>>>(rows, count, residual.data(), sizes.data());
    for (int64_t step = 0; step < std::min<int64_t>(steps, count); ++step) {
      expand(numbers_.data(), direction.data(), false);
      multiply();
      project(image);
      scale_step_kernel<<<blocks_for(rows), kThreads, 0, stream_>>>(
          rows, count, image.data(), x.data(), residual.data(), direction.data(), sizes.data());
    }
    check_cuda(cudaGetLastError(), "launch of scale_step");
    const DeviceBuffer<float> old(all, stream_);
    convert(arrays_.scales.data(), old.data(), all, 1.0, stream_);
    store_scales_kernel<<<blocks_for(all), kThreads, 0, stream_>>>(
        x.data(), all, format_.scale_dtype, problem_.weight_unit(), arrays_.scales.data(), scales_.data());
    check_cuda(cudaGetLastError(), "launch of store_scales");
    find_losses();
    keep_scales_kernel<<<blocks_for(all), kThreads, 0, stream_>>>(before.data(), losses_.data(), old.data(),
                                                                  rows, count, arrays_.scales.data());
    check_cuda(cudaGetLastError(), "launch of keep_scales");
  }

 private:
  ExpandTask task_of(const double* tables, const double* scales, bool errors) const {
    return {tables,
            scales,
            arrays_.codes.data(),
            errors ? problem_.weights() : nullptr,
            values_.data(),
            problem_.n,
            problem_.columns,
            problem_.blocks,
            format_.codebooks,
            format_.entries(),
            static_cast<int>(format_.in_group),
            static_cast<int>(format_.out_group),
            problem_.scale_count,
            problem_.scale_columns};
  }
  // values = scales * the sums of entries of `tables`, or what they leave of the weights.
  void expand(const double* tables, const double* scales, bool errors) {
    expand_kernel<<<blocks_for(values_.count()), kThreads, 0, stream_>>>(task_of(tables, scales, errors));
    check_cuda(cudaGetLastError(), "launch of expand");
  }
  // products = values H
  void multiply() {
    const auto columns = static_cast<int>(problem_.columns);
    split(values_.data(), high_.data(), low_.data(), values_.count(), stream_);
    cuda::multiply(blas_, static_cast<int>(problem_.n), columns, columns,
                   {high_.data(), low_.data(), columns}, {h_high_.data(), h_low_.data(), columns},
                   products_.data(), columns);
  }
  // Sets values to the errors, products to theirs with H, losses to those of groups of rows.
  void find_losses() {
    convert(arrays_.tables.data(), numbers_.data(), size_, 1.0, stream_);
    expand(numbers_.data(), scales_.data(), true);
    multiply();
    loss_kernel<<<static_cast<unsigned>(problem_.row_groups), kThreads, 0, stream_>>>(
        values_.data(), products_.data(), format_.out_group * problem_.columns, losses_.data());
    check_cuda(cudaGetLastError(), "launch of loss");
  }
  double total_loss() {
    find_losses();
    return summed(losses_.data(), problem_.row_groups);
  }
  double summed(const double* values, int64_t count) {
    sum_values(values, count, sum_.data(), stream_);
    double sum = 0;
    download(sum_.data(), &sum, 1, stream_);
    return sum;
  }
  double dot(const DeviceBuffer<double>& a, const DeviceBuffer<double>& b) {
    dot_kernel<<<kDotBlocks, kThreads, 0, stream_>>>(a.data(), b.data(), a.count(), partial_.data());
    check_cuda(cudaGetLastError(), "launch of dot");
    return summed(partial_.data(), kDotBlocks);
  }
  void add(double factor, const DeviceBuffer<double>& from, const DeviceBuffer<double>& to) {
    add_kernel<<<blocks_for(from.count()), kThreads, 0, stream_>>>(factor, from.data(), to.data(),
                                                                   from.count());
    check_cuda(cudaGetLastError(), "launch of add");
  }
  void turn(double factor, const DeviceBuffer<double>& from, const DeviceBuffer<double>& to) {
    turn_kernel<<<blocks_for(from.count()), kThreads, 0, stream_>>>(factor, from.data(), to.data(),
                                                                    from.count());
    check_cuda(cudaGetLastError(), "launch of turn");
  }
  void project(const DeviceBuffer<double>& sums) {
    project_kernel<<<blocks_for(sums.count() * 32), kThreads, 0, stream_>>>(
        task_of(numbers_.data(), scales_.data(), false), products_.data(), sums.data());
    check_cuda(cudaGetLastError(), "launch of project");
  }

  const AdditiveProblem& problem_;
  const Additive& format_;
  AdditiveArrays& arrays_;
  cudaStream_t stream_;
  int64_t size_;  // of all tables
  BlasScope blas_;
  DeviceBuffer<float> h_;  // [columns, columns]
  DeviceBuffer<float> h_high_;
  DeviceBuffer<float> h_low_;
  DeviceBuffer<double> scales_;   // in units of the weights
  DeviceBuffer<double> numbers_;  // tables
  DeviceBuffer<float> values_;    // [n, columns]
  DeviceBuffer<float> high_;
  DeviceBuffer<float> low_;
  DeviceBuffer<float> products_;  // [n, columns]
  DeviceBuffer<double> losses_;   // [N]
  DeviceBuffer<double> partial_;
  DeviceBuffer<double> sum_;
};

}  // namespace

void refit_arrays(const AdditiveProblem& problem, AdditiveArrays& arrays, const RefitOptions& options) {
  if (problem.row_groups == 0 || problem.blocks == 0 || options.steps == 0) return;
  Refit refit(problem, arrays);
  if (options.tables) refit.tables(options.steps);
  if (options.scales) refit.scales(options.steps);
  check_cuda(cudaStreamSynchronize(problem.stream), "work of the stream");
}

}  // namespace quantloom::cuda
