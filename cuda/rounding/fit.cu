// Fitting of groups: one warp for each row and group. Lanes share the columns while the range is taken, and
// the factors while the scale search runs: each factor's error is summed by one lane in the order of the
// columns, as on the CPU.
#include <climits>
#include <cmath>

#include "quantloom/error.hpp"
#include "rounding/segment.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 65536;
constexpr unsigned kAll = 0xffffffffU;

// Every lane gets the range; 32 columns are read at a time and handed around.
__device__ ValueRange range_of(const Segment& segment, bool with_mean) {
  const int lane = threadIdx.x % kWarp;
  float low = 0;
  float high = 0;
  double sum = 0;
  for (int64_t base = 0; base < segment.count; base += kWarp) {
    const float mine = base + lane < segment.count ? segment.value(base + lane) : 0.0F;
    low = mine < low ? mine : low;
    high = mine > high ? mine : high;
    if (with_mean) {
      const auto here = static_cast<int>(min(static_cast<int64_t>(kWarp), segment.count - base));
      for (int j = 0; j < here; ++j) sum += static_cast<double>(fabsf(__shfl_sync(kAll, mine, j)));
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other_low = __shfl_xor_sync(kAll, low, step);
    const float other_high = __shfl_xor_sync(kAll, high, step);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  ValueRange range;
  range.low = low;
  range.high = high;
  if (with_mean) range.mean_magnitude = sum / static_cast<double>(segment.count);
  return range;
}

// The weighted error of the segment under this lane's parameters. All lanes take part.
__device__ double error_of(const Segment& segment, const ScalarGrid& grid, const GroupFit& fit, double norm) {
  const int lane = threadIdx.x % kWarp;
  double sum = 0;
  for (int64_t base = 0; base < segment.count; base += kWarp) {
    const bool inside = base + lane < segment.count;
    const float mine = inside ? segment.value(base + lane) : 0.0F;
    const float my_weight = inside ? segment.weight(base + lane) : 0.0F;
    const auto here = static_cast<int>(min(static_cast<int64_t>(kWarp), segment.count - base));
    for (int j = 0; j < here; ++j) {
      const float value = __shfl_sync(kAll, mine, j);
      const double weight = static_cast<double>(__shfl_sync(kAll, my_weight, j));
      const EncodedValue encoded = encode_value(grid, value, fit.scale, fit.zero);
      sum += search_error(weight, segment.error(base + j, value, encoded.decoded), norm);
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    fit_groups_kernel(FitTask task, int64_t groups_here, Search search, const float* factors) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t total = task.w.rows * groups_here;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; at < total;
       at += warps) {
    const int64_t row = at / groups_here;
    const int64_t group = at % groups_here;
    const int64_t first = task.first_column + group * task.group_size;
    const int64_t count = min(task.group_size, task.end_column - first);
    const Segment segment = segment_of(task, row, first, count);
    const ValueRange range = range_of(segment, task.grid.is_sign());
    GroupFit best = fit_grid(task.grid, range, factors != nullptr ? static_cast<double>(factors[at]) : 1.0);
    bool finite = best.finite;
    if (search.steps > 0) {
      double best_error = INFINITY;
      int best_step = INT_MAX;
      for (int first_step = 0; first_step < search.steps; first_step += kWarp) {
        const int step = min(first_step + lane, search.steps - 1);
        const GroupFit fit = fit_grid(task.grid, range, static_cast<double>(search.factors[step]));
        finite = finite && fit.finite;
        const double error = error_of(segment, task.grid, fit, search.norm);
        // The last step may be tried by many lanes; the result is the same.
        if (error < best_error) {
          best_error = error;
          best_step = step;
        }
      }
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const double other_error = __shfl_xor_sync(kAll, best_error, distance);
        const int other_step = __shfl_xor_sync(kAll, best_step, distance);
        if (other_error < best_error || (other_error == best_error && other_step < best_step)) {
          best_error = other_error;
          best_step = other_step;
        }
      }
      const float factor = best_step < search.steps ? search.factors[best_step] : 1.0F;
      best = fit_grid(task.grid, range, static_cast<double>(factor));
      finite = __all_sync(kAll, finite) != 0;
    }
    if (lane == 0) {
      const int64_t number = task.first_group + group;
      const int64_t index = row * task.parameters.row_stride + number * task.parameters.group_stride;
      task.parameters.scales[index] = best.scale;
      task.parameters.zeros[index] = best.zero;
      if (!finite) {
        atomicMin(reinterpret_cast<unsigned long long*>(task.failure),
                  static_cast<unsigned long long>(row * task.group_count + number));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) row_ranges_kernel(FitTask task, ValueRange* ranges) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       row < task.w.rows; row += warps) {
    const ValueRange range = range_of(segment_of(task, row, 0, task.w.cols), task.grid.is_sign());
    if (threadIdx.x % kWarp == 0) ranges[row] = range;
  }
}

// One thread: the mean is summed in the order of the rows. Ranges of some thousand rows take microseconds.
__global__ void whole_range_kernel(const ValueRange* ranges, int64_t n, ValueRange* whole) {
  ValueRange result;
  for (int64_t row = 0; row < n; ++row) {
    const ValueRange range = ranges[row];
    result.low = range.low < result.low ? range.low : result.low;
    result.high = range.high > result.high ? range.high : result.high;
    result.mean_magnitude += range.mean_magnitude / static_cast<double>(n);
  }
  *whole = result;
}

// errors [n, 32]: of each row, under the factors from first_step on.
__global__ void __launch_bounds__(kThreads)
    row_errors_kernel(FitTask task, const ValueRange* whole, Search search, int first_step, double* errors) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int step = min(first_step + lane, search.steps - 1);
  const GroupFit fit = fit_grid(task.grid, *whole, static_cast<double>(search.factors[step]));
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       row < task.w.rows; row += warps) {
    errors[row * kWarp + lane] = error_of(segment_of(task, row, 0, task.w.cols), task.grid, fit, search.norm);
  }
}

struct BestStep {
  double error;
  int step;
};

// One warp: the best of the steps so far and the 32 from first_step on.
__global__ void best_step_kernel(const double* errors, int64_t n, int first_step, int steps, BestStep* best) {
  const int lane = threadIdx.x;
  int step = first_step + lane;
  double error = 0;
  for (int64_t row = 0; row < n; ++row) error += errors[row * kWarp + lane];
  if (step >= steps || !(error < INFINITY)) {
    error = INFINITY;
    step = INT_MAX;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const double other_error = __shfl_xor_sync(kAll, error, distance);
    const int other_step = __shfl_xor_sync(kAll, step, distance);
    if (other_error < error || (other_error == error && other_step < step)) {
      error = other_error;
      step = other_step;
    }
  }
  if (lane == 0 && (first_step == 0 || error < best->error)) *best = {error, step};
}

// One thread.
__global__ void fit_whole_kernel(FitTask task, const ValueRange* whole, Search search, const BestStep* best) {
  GroupFit fit = fit_grid(task.grid, *whole, 1.0);
  bool finite = fit.finite;
  for (int step = 0; step < search.steps; ++step) {
    finite = finite && fit_grid(task.grid, *whole, static_cast<double>(search.factors[step])).finite;
  }
  if (search.steps > 0 && best->step < search.steps) {
    fit = fit_grid(task.grid, *whole, static_cast<double>(search.factors[best->step]));
  }
  task.parameters.scales[0] = fit.scale;
  task.parameters.zeros[0] = fit.zero;
  if (!finite) *task.failure = 0;
}

unsigned blocks_for(int64_t warps) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(warps, kThreads / kWarp), 1, kMaxBlocks));
}

}  // namespace

SearchFactors::SearchFactors(const std::optional<ScaleSearch>& search, cudaStream_t stream) {
  if (!search) return;
  by_output_error_ = search->output_error;
  norm_ = search->norm;
  for (int i = 0; i < search->steps; ++i) {
    const double fraction = search->steps == 1 ? 0.0 : static_cast<double>(i) / (search->steps - 1);
    host_.push_back(static_cast<float>(1.0 - fraction * (1.0 - search->smallest)));
  }
  factors_ = DeviceBuffer<float>(steps(), stream);
  factors_.upload(host_.data(), steps());
}

void fit_groups(const FitTask& task, const SearchFactors& search, const float* factors, cudaStream_t stream) {
  const int64_t groups_here = ceil_div(task.end_column - task.first_column, task.group_size);
  fit_groups_kernel<<<blocks_for(checked_mul(task.w.rows, groups_here)), kThreads, 0, stream>>>(
      task, groups_here, search_of(search), factors);
  check_cuda(cudaGetLastError(), "launch of fit_groups");
}

void fit_whole(const FitTask& task, const SearchFactors& search, cudaStream_t stream) {
  const int64_t n = task.w.rows;
  const DeviceBuffer<ValueRange> ranges(n, stream);
  const DeviceBuffer<ValueRange> whole(1, stream);
  const DeviceBuffer<BestStep> best(1, stream);
  row_ranges_kernel<<<blocks_for(n), kThreads, 0, stream>>>(task, ranges.data());
  whole_range_kernel<<<1, 1, 0, stream>>>(ranges.data(), n, whole.data());
  if (search.steps() > 0) {
    const DeviceBuffer<double> errors(checked_mul(n, kWarp), stream);
    for (int first = 0; first < search.steps(); first += kWarp) {
      row_errors_kernel<<<blocks_for(n), kThreads, 0, stream>>>(task, whole.data(), search_of(search), first,
                                                                errors.data());
      best_step_kernel<<<1, kWarp, 0, stream>>>(errors.data(), n, first, search.steps(), best.data());
    }
  }
  fit_whole_kernel<<<1, 1, 0, stream>>>(task, whole.data(), search_of(search), best.data());
  check_cuda(cudaGetLastError(), "launch of fit_whole");
}

}  // namespace quantloom::cuda
