#include <algorithm>
#include <bit>
#include <cmath>
#include <cub/device/device_radix_sort.cuh>
#include <vector>

#include "common/load_float.cuh"
#include "common/matrix_checks.hpp"
#include "fit/centroid_sums.hpp"
#include "fit/fixed_point.hpp"
#include "fit/row_distance.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kRun = 32;  // sorted rows that a thread adds up

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMaxBlocks));
}

__device__ __forceinline__ int64_t first_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * kThreads;
}

// found[0]: the least key of a value that is not finite (as find_non_finite makes it), found[1]: the least
// index of a negative one. largest: the bits of the largest magnitude, which rise as it does.
__global__ void __launch_bounds__(kThreads)
    examine_kernel(CudaMatrix values, unsigned long long* found, unsigned* largest) {
  unsigned long long bad = kNoneFound;
  unsigned long long negative = kNoneFound;
  unsigned most = 0;
  const int64_t total = values.rows * values.cols;
  for (int64_t at = first_thread(); at < total; at += thread_count()) {
    const float value =
        load_float(values.data, values.dtype, at / values.cols * values.stride + at % values.cols);
    const auto index = static_cast<unsigned long long>(at);
    if (!(fabsf(value) <= 0x1.fffffep127F)) {
      bad = min(bad, index * 4 + (value != value ? 2 : (value < 0 ? 1 : 0)));
    } else {
      most = max(most, __float_as_uint(fabsf(value)));
    }
    if (value < 0) negative = min(negative, index);
  }
  if (bad != kNoneFound) atomicMin(&found[0], bad);
  if (negative != kNoneFound) atomicMin(&found[1], negative);
  most = __reduce_max_sync(0xffffffffU, most);
  if (threadIdx.x % 32 == 0) atomicMax(largest, most);
}

__global__ void __launch_bounds__(kThreads) count_rows_kernel(int64_t n, int32_t* rows) {
  for (int64_t at = first_thread(); at < n; at += thread_count()) rows[at] = static_cast<int32_t>(at);
}

struct SumTask {
  CudaMatrix x;
  const float* weights;
  const int32_t* codes;  // sorted
  const int32_t* rows;   // in the same order
  double value_power;
  double weight_power;
  unsigned long long* sums;
};

// Thread (run, column) adds up one column, the last of which is the weight, of kRun rows in the order of
// their codes. Integers: neither that order nor that of the atomic additions matters.
__global__ void __launch_bounds__(kThreads) add_rows_kernel(SumTask task) {
  const int64_t columns = task.x.cols + 1;
  const int64_t runs = (task.x.rows + kRun - 1) / kRun;
  for (int64_t at = first_thread(); at < runs * columns; at += thread_count()) {
    const int64_t column = at % columns;
    const int64_t begin = at / columns * kRun;
    const int64_t end = min(begin + kRun, task.x.rows);
    int32_t code = task.codes[begin];
    long long high = 0;
    unsigned long long low = 0;
    const auto flush = [&] {
      unsigned long long* const sum = task.sums + (code * columns + column) * 2;
      if (high != 0) atomicAdd(&sum[0], static_cast<unsigned long long>(high));
      if (low != 0) atomicAdd(&sum[1], low);
      high = 0;
      low = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      if (task.codes[i] != code) {
        flush();
        code = task.codes[i];
      }
      const int64_t row = task.rows[i];
      const double weight = task.weights == nullptr ? 1.0 : static_cast<double>(task.weights[row]);
      long long fixed = 0;
      if (column == task.x.cols) {
        fixed = __double2ll_rn(__dmul_rn(weight, task.weight_power));
      } else {
        const double value =
            static_cast<double>(load_float(task.x.data, task.x.dtype, row * task.x.stride + column));
        fixed = __double2ll_rn(__dmul_rn(__dmul_rn(weight, value), task.value_power));
      }
      high += fixed >> 32;
      low += static_cast<unsigned long long>(fixed) & 0xffffffffULL;
    }
    flush();
  }
}

__device__ __forceinline__ double sum_value(const unsigned long long* sum) {
  const long long high = static_cast<long long>(sum[0] + (sum[1] >> 32));
  return __dadd_rn(__dmul_rn(static_cast<double>(high), 0x1p32), static_cast<double>(sum[1] & 0xffffffffULL));
}

__global__ void __launch_bounds__(kThreads)
    move_centroids_kernel(const unsigned long long* sums, int64_t count, int64_t d, double value_power,
                          double weight_power, float* centroids, int32_t* empty, int32_t* empty_count) {
  const int64_t entry = first_thread();
  if (entry >= count) return;
  const unsigned long long* const mine = sums + entry * (d + 1) * 2;
  const double weight = __ddiv_rn(sum_value(mine + d * 2), weight_power);
  empty[entry] = weight > 0 ? 0 : 1;
  if (!(weight > 0)) {
    atomicAdd(empty_count, 1);
    return;
  }
  for (int64_t j = 0; j < d; ++j) {
    const double mean = __ddiv_rn(__ddiv_rn(sum_value(mine + j * 2), value_power), weight);
    centroids[entry * d + j] = __double2float_rn(mean);
  }
}

__global__ void __launch_bounds__(kThreads) count_changes_kernel(const int32_t* before, const int32_t* after,
                                                                 int64_t n, unsigned long long* changes) {
  unsigned mine = 0;
  for (int64_t at = first_thread(); at < n; at += thread_count()) mine += before[at] != after[at] ? 1 : 0;
  mine = __reduce_add_sync(0xffffffffU, mine);
  if (threadIdx.x % 32 == 0 && mine != 0) atomicAdd(changes, static_cast<unsigned long long>(mine));
}

__global__ void __launch_bounds__(kThreads)
    measure_rows_kernel(CudaMatrix x, const float* weights, const float* centroids, const int32_t* codes,
                        double* errors) {
  for (int64_t row = first_thread(); row < x.rows; row += thread_count()) {
    const double distance =
        squared_distance(x, row * x.stride, centroids + static_cast<int64_t>(codes[row]) * x.cols);
    errors[row] = __dmul_rn(weights == nullptr ? 1.0 : static_cast<double>(weights[row]), distance);
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(CudaMatrix x, const int64_t* rows, int64_t count, float* gathered) {
  for (int64_t at = first_thread(); at < count * x.cols; at += thread_count()) {
    const int64_t row = rows == nullptr ? at / x.cols : rows[at / x.cols];
    gathered[at] = load_float(x.data, x.dtype, row * x.stride + at % x.cols);
  }
}

}  // namespace

float checked_largest(const CudaMatrix& values, const std::string& argument, bool negative_too,
                      cudaStream_t stream) {
  const int64_t total = checked_mul(values.rows, values.cols);
  if (total == 0) return 0;
  DeviceBuffer<uint64_t> found(2, stream);
  DeviceBuffer<unsigned> largest(1, stream);
  found.fill_bytes(0xff);
  largest.fill_bytes(0);
  examine_kernel<<<blocks_for(total), kThreads, 0, stream>>>(
      values, reinterpret_cast<unsigned long long*>(found.data()), largest.data());
  check_cuda(cudaGetLastError(), "launch of examine");
  require_none_found(found.data(), values.cols, argument, "", stream);
  uint64_t negative = 0;
  download(found.data() + 1, &negative, 1, stream);
  if (!negative_too && negative != kNoneFound) {
    throw InvalidArgument(argument, text_of("a negative number at index ", negative), "numbers >= 0");
  }
  unsigned bits = 0;
  download(largest.data(), &bits, 1, stream);
  return std::bit_cast<float>(bits);
}

CentroidSums::CentroidSums(const CudaMatrix& x, const float* weights, int64_t count, float largest,
                           float most_weight, cudaStream_t stream)
    : x_(x),
      weights_(weights),
      count_(count),
      value_power_(std::ldexp(
          1.0, fit::fixed_exponent(static_cast<double>(largest) * static_cast<double>(most_weight)))),
      weight_power_(std::ldexp(1.0, fit::fixed_exponent(most_weight))),
      stream_(stream),
      rows_(x.rows, stream),
      sorted_codes_(x.rows, stream),
      sorted_rows_(x.rows, stream),
      sums_(checked_mul(count, 2 * (x.cols + 1)), stream) {
  count_rows_kernel<<<blocks_for(x.rows), kThreads, 0, stream>>>(x.rows, rows_.data());
  check_cuda(cudaGetLastError(), "launch of count_rows");
  check_cuda(cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes_, sorted_codes_.data(), sorted_codes_.data(),
                                             rows_.data(), sorted_rows_.data(), static_cast<int>(x.rows)),
             "space to sort codes");
  sort_space_ = DeviceBuffer<unsigned char>(static_cast<int64_t>(sort_bytes_), stream);
}

void CentroidSums::apply(const int32_t* codes, float* centroids, int32_t* empty, int32_t* empty_count) {
  check_cuda(cudaMemsetAsync(empty_count, 0, sizeof(int32_t), stream_), "fill of device memory");
  sums_.fill_bytes(0);
  if (x_.rows > 0) {
    const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(count_ - 1))));
    size_t bytes = sort_bytes_;
    check_cuda(
        cub::DeviceRadixSort::SortPairs(sort_space_.data(), bytes, codes, sorted_codes_.data(), rows_.data(),
                                        sorted_rows_.data(), static_cast<int>(x_.rows), 0, bits, stream_),
        "sort of codes");
    const SumTask task{x_,           weights_,      sorted_codes_.data(), sorted_rows_.data(),
                       value_power_, weight_power_, sums_.data()};
    add_rows_kernel<<<blocks_for(ceil_div(x_.rows, kRun) * (x_.cols + 1)), kThreads, 0, stream_>>>(task);
    check_cuda(cudaGetLastError(), "launch of add_rows");
  }
  move_centroids_kernel<<<static_cast<unsigned>(ceil_div(count_, kThreads)), kThreads, 0, stream_>>>(
      sums_.data(), count_, x_.cols, value_power_, weight_power_, centroids, empty, empty_count);
  check_cuda(cudaGetLastError(), "launch of move_centroids");
}

void count_changes(const int32_t* before, const int32_t* after, int64_t n, unsigned long long* changes,
                   cudaStream_t stream) {
  if (n == 0) return;
  count_changes_kernel<<<blocks_for(n), kThreads, 0, stream>>>(before, after, n, changes);
  check_cuda(cudaGetLastError(), "launch of count_changes");
}

void measure_rows(const CudaMatrix& x, const float* weights, const float* centroids, const int32_t* codes,
                  double* errors, cudaStream_t stream) {
  if (x.rows == 0) return;
  measure_rows_kernel<<<blocks_for(x.rows), kThreads, 0, stream>>>(x, weights, centroids, codes, errors);
  check_cuda(cudaGetLastError(), "launch of measure_rows");
}

void worst_rows(const double* errors, int64_t n, int64_t moved, int32_t* rows, double* row_errors,
                cudaStream_t stream) {
  DeviceBuffer<int32_t> all(n, stream);
  DeviceBuffer<int32_t> sorted_rows(n, stream);
  DeviceBuffer<double> sorted_errors(n, stream);
  count_rows_kernel<<<blocks_for(n), kThreads, 0, stream>>>(n, all.data());
  check_cuda(cudaGetLastError(), "launch of count_rows");
  // Stable: equal errors stay in the order of their rows.
  size_t bytes = 0;
  check_cuda(cub::DeviceRadixSort::SortPairsDescending(nullptr, bytes, errors, sorted_errors.data(),
                                                       all.data(), sorted_rows.data(), static_cast<int>(n)),
             "space to sort errors");
  DeviceBuffer<unsigned char> space(static_cast<int64_t>(bytes), stream);
  check_cuda(
      cub::DeviceRadixSort::SortPairsDescending(space.data(), bytes, errors, sorted_errors.data(), all.data(),
                                                sorted_rows.data(), static_cast<int>(n), 0, 64, stream),
      "sort of errors");
  download(sorted_rows.data(), rows, moved, stream);
  download(sorted_errors.data(), row_errors, moved, stream);
}

void gather_rows(const CudaMatrix& x, const int64_t* rows, int64_t count, float* gathered,
                 cudaStream_t stream) {
  const int64_t total = checked_mul(count, x.cols);
  if (total == 0) return;
  gather_rows_kernel<<<blocks_for(total), kThreads, 0, stream>>>(x, rows, count, gathered);
  check_cuda(cudaGetLastError(), "launch of gather_rows");
}

}  // namespace quantloom::cuda
