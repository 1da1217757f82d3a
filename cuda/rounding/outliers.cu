#include <algorithm>
#include <cmath>
#include <string>

#include "quantloom/error.hpp"
#include "rounding/outliers.hpp"
#include "rounding/segment.cuh"
#include "rounding/walk_block.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFitThreads = 64;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 8192;
constexpr unsigned kAll = 0xffffffffU;
constexpr float kRoundingShift = 0x1.8p23F;
// Magnitudes are found by the bits of float32 below the sign, in two passes.
constexpr int kHighBits = 16;
constexpr int kLowBits = 15;

__global__ void __launch_bounds__(kThreads) energies_kernel(CudaMatrix w, double* energies) {
  for (int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; column < w.cols;
       column += static_cast<int64_t>(gridDim.x) * kThreads) {
    double sum = 0;
    for (int64_t row = 0; row < w.rows; ++row) {
      const auto value = static_cast<double>(load_float(w.data, w.dtype, row * w.stride + column));
      sum += value * value;
    }
    energies[column] = sum;
  }
}

// weight * (rounding error of a value on the grid of levels + 1 numbers from low to high)^2.
__device__ float grid_error(float value, float low, float high, float levels, float weight) {
  const float step = (high - low) / levels;
  // 0 / 0 of equal values: the comparison makes it 0.
  float steps = (value - low) / step;
  steps = steps > 0.0F ? steps : 0.0F;
  steps = steps < levels ? steps : levels;
  const float missing = ((steps + kRoundingShift) - kRoundingShift) * step + low - value;
  return weight * (missing * missing);
}

// A thread for each row and group: sums are taken in the order of the columns.
__global__ void __launch_bounds__(kFitThreads)
    leave_out_kernel(FitTask task, const float* weights, int64_t groups_here, float levels, double threshold,
                     float* out) {
  const int64_t width = task.end_column - task.first_column;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kFitThreads + threadIdx.x;
       at < task.w.rows * groups_here; at += static_cast<int64_t>(gridDim.x) * kFitThreads) {
    const int64_t row = at / groups_here;
    const int64_t begin = at % groups_here * task.group_size;
    const int64_t first = task.first_column + begin;
    const int64_t count = min(task.group_size, task.end_column - first);
    const Segment segment = segment_of(task, row, first, count);
    float* const own = out + row * width + begin;
    float least = INFINITY;
    float second_least = INFINITY;
    float largest = -INFINITY;
    float second_largest = -INFINITY;
    int64_t least_at = 0;
    int64_t largest_at = 0;
    for (int64_t c = 0; c < count; ++c) {
      const float v = segment.value(c);
      own[c] = v;
      const bool lower = v < least;
      second_least = lower ? least : (v < second_least ? v : second_least);
      least_at = lower ? c : least_at;
      least = lower ? v : least;
      const bool higher = v > largest;
      second_largest = higher ? largest : (second_largest < v ? v : second_largest);
      largest_at = higher ? c : largest_at;
      largest = higher ? v : largest;
    }
    if (count < 2) continue;  // a value alone has no others to gain
    double total = 0;
    double without_least = 0;
    double without_largest = 0;
    for (int64_t c = 0; c < count; ++c) {
      const float v = own[c];
      const float weight = weights[first + c];
      total += static_cast<double>(grid_error(v, least, largest, levels, weight));
      without_least +=
          c == least_at ? 0.0 : static_cast<double>(grid_error(v, second_least, largest, levels, weight));
      without_largest +=
          c == largest_at ? 0.0 : static_cast<double>(grid_error(v, least, second_largest, levels, weight));
    }
    if (!(total > threshold)) continue;  // an error alone is at most the total
    const auto is_found = [&](int64_t c) {
      double gain = static_cast<double>(grid_error(own[c], least, largest, levels, weights[first + c]));
      if (c == least_at) gain = total - without_least;
      if (c == largest_at) gain = total - without_largest;
      return gain > threshold;
    };
    int64_t found = 0;
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      if (is_found(c)) {
        ++found;
      } else {
        sum += static_cast<double>(own[c]);
      }
    }
    if (found == 0) continue;
    const auto mean = static_cast<float>(found < count ? sum / static_cast<double>(count - found) : 0.0);
    for (int64_t c = 0; c < count; ++c) {
      if (is_found(c)) own[c] = mean;
    }
  }
}

__device__ __forceinline__ uint32_t magnitude_bits(const CudaMatrix& w, int64_t at) {
  const float value = load_float(w.data, w.dtype, at / w.cols * w.stride + at % w.cols);
  return __float_as_uint(value) & 0x7fffffffU;
}

// Counts magnitudes by their high bits, or by their low bits those whose high bits are `high`.
template <bool kLow>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(CudaMatrix w, uint32_t high, unsigned long long* counts) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < w.rows * w.cols;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t bits = magnitude_bits(w, at);
    if (kLow && bits >> kLowBits != high) continue;
    atomicAdd(counts + (kLow ? bits & ((1U << kLowBits) - 1U) : bits >> kLowBits), 1ULL);
  }
}

// A warp for each row: how many magnitudes are `threshold`.
__global__ void __launch_bounds__(kThreads)
    count_equal_kernel(CudaMatrix w, uint32_t threshold, int32_t* counts) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < w.rows;
       row += static_cast<int64_t>(gridDim.x) * (kThreads / kWarp)) {
    int32_t count = 0;
    for (int64_t c = lane; c < w.cols; c += kWarp) count += magnitude_bits(w, row * w.cols + c) == threshold;
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      count += __shfl_xor_sync(kAll, count, distance);
    }
    if (lane == 0) counts[row] = count;
  }
}

// before [n]: of magnitudes equal to the threshold, those in the rows before; the first `equal` are taken.
__global__ void __launch_bounds__(kThreads)
    mask_kernel(CudaMatrix w, uint32_t threshold, const int64_t* before, int64_t equal, float* masked,
                uint16_t* missing) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < w.rows;
       row += static_cast<int64_t>(gridDim.x) * (kThreads / kWarp)) {
    int64_t seen = before[row];
    for (int64_t base = 0; base < w.cols; base += kWarp) {
      const int64_t at = row * w.cols + base + lane;
      const bool inside = base + lane < w.cols;
      const uint32_t bits = inside ? magnitude_bits(w, at) : 0;
      const unsigned ties = __ballot_sync(kAll, inside && bits == threshold);
      const bool tie_taken = seen + __popc(ties & ((1U << lane) - 1U)) < equal;
      const bool taken = inside && (bits > threshold || (bits == threshold && tie_taken));
      if (inside) {
        masked[at] = taken ? 0.0F : load_float(w.data, w.dtype, row * w.stride + base + lane);
        missing[at] = taken ? uint16_t{0} : kNoOutlier;
      }
      seen += __popc(ties);
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads) missing_kernel(CudaMatrix w, R rounder, CodeMatrix matrix,
                                                           uint16_t* missing, unsigned long long* overflow) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < w.rows * w.cols;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (missing[at] == kNoOutlier) continue;
    const int64_t row = at / w.cols;
    const int64_t column = at % w.cols;
    const float decoded = rounder.decode(rounder.column(row, column / matrix.group_size), matrix.codes[at]);
    const __half beyond = __float2half_rn(load_float(w.data, w.dtype, row * w.stride + column) - decoded);
    if (__hisinf(beyond) != 0) atomicMin(overflow, static_cast<unsigned long long>(at));
    missing[at] = __half_as_ushort(beyond);
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const uint16_t* missing, int64_t n, int64_t k, int32_t* counts) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < n;
       row += static_cast<int64_t>(gridDim.x) * (kThreads / kWarp)) {
    int32_t count = 0;
    for (int64_t c = lane; c < k; c += kWarp) count += missing[row * k + c] != kNoOutlier;
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      count += __shfl_xor_sync(kAll, count, distance);
    }
    if (lane == 0) counts[row] = count;
  }
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads)
    store_kernel(const uint16_t* missing, const int32_t* position, int64_t n, int64_t k,
                 const int32_t* offsets, uint16_t* narrow, int32_t* wide, uint16_t* values) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < n;
       row += static_cast<int64_t>(gridDim.x) * (kThreads / kWarp)) {
    int64_t next = offsets[row];
    for (int64_t base = 0; base < k; base += kWarp) {
      const int64_t column = base + lane;
      uint16_t value = kNoOutlier;
      if (column < k) {
        const int64_t from = position == nullptr ? column : static_cast<int64_t>(position[column]);
        value = missing[row * k + from];
      }
      const unsigned found = __ballot_sync(kAll, value != kNoOutlier);
      if (value != kNoOutlier) {
        const int64_t at = next + __popc(found & ((1U << lane) - 1U));
        if (narrow != nullptr) {
          narrow[at] = static_cast<uint16_t>(column);
        } else {
          wide[at] = static_cast<int32_t>(column);
        }
        values[at] = value;
      }
      next += __popc(found);
    }
  }
}

unsigned blocks_for(int64_t threads, int of_block = kThreads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, of_block), 1, kMaxBlocks));
}

// The largest bin with which, and all above it, at least `count` are counted; `above`: those above it.
uint32_t find_bin(const std::vector<unsigned long long>& bins, int64_t count, int64_t& above) {
  for (size_t bin = bins.size(); bin-- > 0;) {
    const auto here = static_cast<int64_t>(bins[bin]);
    if (above + here >= count) return static_cast<uint32_t>(bin);
    above += here;
  }
  return 0;
}

}  // namespace

void column_energies(const CudaMatrix& w, double* energies, cudaStream_t stream) {
  energies_kernel<<<blocks_for(w.cols), kThreads, 0, stream>>>(w, energies);
  check_cuda(cudaGetLastError(), "launch of column_energies");
}

void leave_outliers_out(const FitTask& task, const float* weights, int bits, double threshold, float* out,
                        cudaStream_t stream) {
  const int64_t groups_here = ceil_div(task.end_column - task.first_column, task.group_size);
  leave_out_kernel<<<blocks_for(checked_mul(task.w.rows, groups_here), kFitThreads), kFitThreads, 0,
                     stream>>>(task, weights, groups_here, static_cast<float>((1 << bits) - 1), threshold,
                               out);
  check_cuda(cudaGetLastError(), "launch of leave_outliers_out");
}

void mask_largest(const CudaMatrix& w, int64_t count, float* masked, uint16_t* missing, cudaStream_t stream) {
  const unsigned blocks = blocks_for(checked_mul(w.rows, w.cols));
  uint32_t threshold = 0xffffffffU;  // above all magnitudes
  int64_t above = 0;
  if (count > 0) {
    std::vector<unsigned long long> bins(size_t{1} << kHighBits);
    DeviceBuffer<unsigned long long> counts(std::ssize(bins), stream);
    counts.fill_bytes(0);
    histogram_kernel<false><<<blocks, kThreads, 0, stream>>>(w, 0, counts.data());
    check_cuda(cudaGetLastError(), "launch of histogram");
    download(counts.data(), bins.data(), std::ssize(bins), stream);
    const uint32_t high = find_bin(bins, count, above);
    bins.resize(size_t{1} << kLowBits);
    counts.fill_bytes(0);
    histogram_kernel<true><<<blocks, kThreads, 0, stream>>>(w, high, counts.data());
    check_cuda(cudaGetLastError(), "launch of histogram");
    download(counts.data(), bins.data(), std::ssize(bins), stream);
    threshold = high << kLowBits | find_bin(bins, count, above);
  }
  const DeviceBuffer<int32_t> equal(w.rows, stream);
  count_equal_kernel<<<blocks_for(checked_mul(w.rows, kWarp)), kThreads, 0, stream>>>(w, threshold,
                                                                                      equal.data());
  check_cuda(cudaGetLastError(), "launch of count_equal");
  std::vector<int32_t> of_rows(static_cast<size_t>(w.rows));
  download(equal.data(), of_rows.data(), w.rows, stream);
  std::vector<int64_t> before(of_rows.size());
  for (size_t row = 1; row < before.size(); ++row) before[row] = before[row - 1] + of_rows[row - 1];
  DeviceBuffer<int64_t> starts(w.rows, stream);
  starts.upload(before.data(), w.rows);
  mask_kernel<<<blocks_for(checked_mul(w.rows, kWarp)), kThreads, 0, stream>>>(
      w, threshold, starts.data(), count - above, masked, missing);
  check_cuda(cudaGetLastError(), "launch of mask_largest");
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

void measure_missing(const CudaMatrix& w, const CodeMatrix& matrix, uint16_t* missing,
                     unsigned long long* overflow, cudaStream_t stream) {
  std::visit(
      [&](const auto& rounder) {
        missing_kernel<<<blocks_for(checked_mul(w.rows, w.cols)), kThreads, 0, stream>>>(w, rounder, matrix,
                                                                                         missing, overflow);
      },
      *matrix.rounder);
  check_cuda(cudaGetLastError(), "launch of measure_missing");
}

void require_no_overflow(const unsigned long long* overflow, int64_t k, const std::vector<int32_t>& column_at,
                         cudaStream_t stream) {
  unsigned long long found = 0;
  download(overflow, &found, 1, stream);
  if (found == kNoneFound) return;
  const auto at = static_cast<int64_t>(found);
  const int64_t column = column_at.empty() ? at % k : column_at[static_cast<size_t>(at % k)];
  throw NumericError(text_of("outlier of row ", at / k, ", column ", column,
                             ": got one too far from its dense value, expected at most 65504 beyond it"));
}

std::vector<int32_t> count_outliers(const uint16_t* missing, int64_t n, int64_t k, cudaStream_t stream) {
  const DeviceBuffer<int32_t> counts(n, stream);
  count_kernel<<<blocks_for(checked_mul(n, kWarp)), kThreads, 0, stream>>>(missing, n, k, counts.data());
  check_cuda(cudaGetLastError(), "launch of count_outliers");
  std::vector<int32_t> result(static_cast<size_t>(n));
  download(counts.data(), result.data(), n, stream);
  return result;
}

void store_outliers(const uint16_t* missing, const int32_t* position, const std::vector<int32_t>& counts,
                    PackedTensor& packed, cudaStream_t stream) {
  std::vector<int32_t> offsets = {0};
  for (const int32_t count : counts) offsets.push_back(offsets.back() + count);
  auto* const own = reinterpret_cast<int32_t*>(packed.planes.at("outlier_offsets").bytes());
  check_cuda(
      cudaMemcpyAsync(own, offsets.data(), offsets.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream),
      "copy to the device");
  Tensor& columns = packed.planes.at("outlier_columns");
  const bool narrow = columns.dtype() == DType::u16;
  if (columns.element_count() > 0) {
    store_kernel<<<blocks_for(checked_mul(packed.n, kWarp)), kThreads, 0, stream>>>(
        missing, position, packed.n, packed.k, own,
        narrow ? reinterpret_cast<uint16_t*>(columns.bytes()) : nullptr,
        narrow ? nullptr : reinterpret_cast<int32_t*>(columns.bytes()),
        reinterpret_cast<uint16_t*>(packed.planes.at("outlier_values").bytes()));
    check_cuda(cudaGetLastError(), "launch of store_outliers");
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

}  // namespace quantloom::cuda
