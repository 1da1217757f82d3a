#include <algorithm>
#include <cmath>
#include <limits>

#include "additive/every_element.cuh"
#include "additive/first_codes.hpp"
#include "common/device_pointer.hpp"
#include "common/load_float.cuh"
#include "common/matrix_checks.hpp"
#include "formats/additive_sample.hpp"
#include "formats/grouped_encoder.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "rounding/additive_checks.hpp"

namespace quantloom {
namespace cuda {
namespace {

// Tables of more entries start from rows drawn at random: k-means++ runs on the host.
constexpr int64_t kMostSpreadEntries = 1024;

// A warp for each scale.
__global__ void __launch_bounds__(kThreads)
    magnitude_kernel(CudaMatrix w, int64_t row_groups, int64_t out_group, int64_t count, int64_t span,
                     double* magnitudes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t at = first_thread() / 32; at < row_groups * count; at += thread_count() / 32) {
    const int64_t first_row = at / count * out_group;
    const int64_t rows = min(out_group, w.rows - first_row);
    const int64_t first = at % count * span;
    const int64_t width = min(span, w.cols - first);
    double squares = 0;
    for (int64_t r = first_row; r < first_row + rows; ++r) {
      for (int64_t c = lane; c < width; c += 32) {
        const auto value = static_cast<double>(load_float(w.data, w.dtype, r * w.stride + first + c));
        squares += value * value;
      }
    }
    for (int mask = 1; mask < 32; mask *= 2) squares += __shfl_xor_sync(0xffffffffU, squares, mask);
    if (lane == 0) magnitudes[at] = sqrt(squares / static_cast<double>(rows * width));
  }
}

struct BlockTask {
  CudaMatrix w;
  const float* scales;  // [N][S]
  int64_t scale_count;
  int64_t scale_columns;
  int64_t of_row;  // blocks
  int out_group;
  int in_group;
};

// x [count, dim]: blocks of w over their scales; which ones, or all where `places` is null. Zeros beyond w.
__global__ void __launch_bounds__(kThreads)
    block_kernel(BlockTask task, const int64_t* places, int64_t count, float* x) {
  const int dim = task.out_group * task.in_group;
  for (int64_t at = first_thread(); at < count * dim; at += thread_count()) {
    const int64_t place = places == nullptr ? at / dim : places[at / dim];
    const int64_t row_group = place / task.of_row;
    const int64_t row = row_group * task.out_group + at % dim / task.in_group;
    const int64_t first = place % task.of_row * task.in_group;
    const int64_t column = first + at % task.in_group;
    float value = 0;
    if (row < task.w.rows && column < task.w.cols) {
      value = load_float(task.w.data, task.w.dtype, row * task.w.stride + column) /
              task.scales[row_group * task.scale_count + first / task.scale_columns];
    }
    x[at] = value;
  }
}

// Takes the entries of codes [count] from x, but where a block reaches beyond the matrix, and puts the codes
// among those of all tables (unless null).
__global__ void __launch_bounds__(kThreads)
    subtract_kernel(BlockTask task, const float* table, const int32_t* codes, int64_t count, int64_t books,
                    int64_t book, float* x, uint16_t* all_codes) {
  const int dim = task.out_group * task.in_group;
  for (int64_t at = first_thread(); at < count * dim; at += thread_count()) {
    const int64_t place = at / dim;
    const int64_t column = place % task.of_row * task.in_group + at % task.in_group;
    if (all_codes == nullptr || column < task.w.cols) x[at] -= table[codes[place] * dim + at % dim];
    if (all_codes != nullptr && at % dim == 0) {
      all_codes[place * books + book] = static_cast<uint16_t>(codes[place]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) to_halves_kernel(float* values, int64_t count) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    values[at] = __half2float(__float2half_rn(values[at]));
  }
}

BlockTask blocks_of(const CudaMatrix& w, const Additive& format, const float* scales, int64_t of_row) {
  return {w,
          scales,
          format.scale_count(w.cols),
          format.scale_columns(w.cols),
          of_row,
          static_cast<int>(format.out_group),
          static_cast<int>(format.in_group)};
}

}  // namespace

std::vector<double> mean_magnitudes(const CudaMatrix& w, const Additive& format, cudaStream_t stream) {
  if (w.rows == 0 || w.cols == 0) return {};
  const int64_t row_groups = format.row_groups(w.rows);
  const int64_t count = format.scale_count(w.cols);
  std::vector<double> magnitudes(static_cast<size_t>(checked_mul(row_groups, count)));
  const auto size = static_cast<int64_t>(magnitudes.size());
  const DeviceBuffer<double> on_device(size, stream);
  magnitude_kernel<<<blocks_for(size * 32), kThreads, 0, stream>>>(
      w, row_groups, format.out_group, count, format.scale_columns(w.cols), on_device.data());
  check_cuda(cudaGetLastError(), "launch of magnitude");
  download(on_device.data(), magnitudes.data(), size, stream);
  return magnitudes;
}

AdditiveArrays scaled_arrays(const CudaMatrix& w, const Additive& format,
                             const std::vector<double>& magnitudes, cudaStream_t stream) {
  const int64_t blocks = w.cols > 0 ? format.blocks(w.cols) : 0;
  const int64_t count = checked_mul(format.row_groups(w.rows), blocks);
  const auto scale_count = static_cast<int64_t>(magnitudes.size());
  AdditiveArrays arrays{DeviceBuffer<float>(static_cast<int64_t>(format.tables.size()), stream),
                        DeviceBuffer<float>(scale_count, stream),
                        DeviceBuffer<uint16_t>(checked_mul(count, format.codebooks), stream)};
  arrays.tables.upload(format.tables.data(), static_cast<int64_t>(format.tables.size()));
  const int64_t of_row = std::max<int64_t>(w.cols > 0 ? format.scale_count(w.cols) : 0, 1);
  const int64_t table_size = format.entries() * format.dim();
  float outermost = 0;
  for (int64_t book = 0; book < format.codebooks; ++book) {
    float most = 0;
    for (int64_t i = 0; i < table_size; ++i) {
      most = std::max(most, std::abs(format.tables[static_cast<size_t>(book * table_size + i)]));
    }
    outermost += most;
  }
  std::vector<float> scales;
  for (int64_t i = 0; i < scale_count; ++i) {
    const double wanted = magnitudes[static_cast<size_t>(i)];
    scales.push_back(wanted == 0 ? 1.0F : quantloom::stored_scale(format.scale_dtype, wanted));
    require_finite_grid(scales.back(), std::max(outermost, 1.0F), format.scale_dtype, wanted,
                        {-wanted, wanted, 0}, i / of_row * format.out_group, i % of_row);
  }
  arrays.scales.upload(scales.data(), scale_count);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  return arrays;
}

AdditiveArrays nearest_codes(const CudaMatrix& w, const Additive& format,
                             const std::vector<double>& magnitudes, cudaStream_t stream) {
  AdditiveArrays arrays = scaled_arrays(w, format, magnitudes, stream);
  const int64_t blocks = w.cols > 0 ? format.blocks(w.cols) : 0;
  const int64_t count = checked_mul(format.row_groups(w.rows), blocks);
  if (count == 0) return arrays;
  const BlockTask task = blocks_of(w, format, arrays.scales.data(), blocks);
  const int64_t dim = format.dim();
  const DeviceBuffer<float> x(checked_mul(count, dim), stream);
  const DeviceBuffer<int32_t> codes(count, stream);
  block_kernel<<<blocks_for(count * dim), kThreads, 0, stream>>>(task, nullptr, count, x.data());
  check_cuda(cudaGetLastError(), "launch of block");
  for (int64_t book = 0; book < format.codebooks; ++book) {
    const float* const table = arrays.tables.data() + book * format.entries() * dim;
    nearest_neighbour_cuda({x.data(), DType::f32, count, dim, dim},
                           {table, DType::f32, format.entries(), dim, dim}, codes.data(), stream);
    subtract_kernel<<<blocks_for(count * dim), kThreads, 0, stream>>>(
        task, table, codes.data(), count, format.codebooks, book, x.data(), arrays.codes.data());
    check_cuda(cudaGetLastError(), "launch of subtract");
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  return arrays;
}

}  // namespace cuda

std::shared_ptr<const Additive> fit_additive_cuda(const Additive& format, const CudaMatrix& w,
                                                  const AdditiveFitOptions& options, void* stream_given) {
  const auto stream = static_cast<cudaStream_t>(stream_given);
  require_valid(options, w.cols);
  require_without_levels(format);
  cuda::require_matrix(w, "w");
  cuda::require_finite_cuda(w, "w", stream);
  const int64_t dim = format.dim();
  const int64_t entries = format.entries();
  std::vector<float> tables(static_cast<size_t>(format.codebooks * entries * dim), 0.0F);
  if (w.rows > 0 && w.cols > 0) {
    const std::vector<double> magnitudes = cuda::mean_magnitudes(w, format, stream);
    const AdditiveSample sample = draw_blocks(format, w.rows, w.cols, magnitudes, options);
    const auto count = static_cast<int64_t>(sample.places.size());
    const auto scale_count = static_cast<int64_t>(sample.scales.size());
    cuda::DeviceBuffer<int64_t> places(count, stream);
    places.upload(sample.places.data(), count);
    cuda::DeviceBuffer<float> scales(scale_count, stream);
    scales.upload(sample.scales.data(), scale_count);
    cuda::DeviceBuffer<float> weights(count, stream);
    weights.upload(sample.weights.data(), count);
    const cuda::DeviceBuffer<float> x(checked_mul(count, dim), stream);
    const cuda::BlockTask task = cuda::blocks_of(w, format, scales.data(), sample.of_row);
    cuda::block_kernel<<<cuda::blocks_for(count * dim), cuda::kThreads, 0, stream>>>(task, places.data(),
                                                                                     count, x.data());
    check_cuda(cudaGetLastError(), "launch of block");
    const CudaMatrix rows{x.data(), DType::f32, count, dim, dim};
    KMeansOptions kmeans;
    kmeans.max_sweeps = options.sweeps;
    kmeans.reseed_empty = true;
    kmeans.seed = options.seed;
    kmeans.threads = options.threads;
    if (entries > cuda::kMostSpreadEntries) kmeans.start = CodebookStart::random;
    cuda::DeviceBuffer<float> table(entries * dim, stream);
    const cuda::DeviceBuffer<int32_t> codes(count, stream);
    for (int64_t book = 0; book < format.codebooks; ++book) {
      if (count <= entries) {
        table.fill_bytes(0);
        check_cuda(cudaMemcpyAsync(table.data(), x.data(), static_cast<size_t>(count * dim) * sizeof(float),
                                   cudaMemcpyDeviceToDevice, stream),
                   "copy of blocks");
      } else {
        static_cast<void>(
            kmeans_cuda(rows, entries, kmeans, weights.data(), table.data(), codes.data(), stream));
      }
      cuda::to_halves_kernel<<<cuda::blocks_for(entries * dim), cuda::kThreads, 0, stream>>>(table.data(),
                                                                                             entries * dim);
      check_cuda(cudaGetLastError(), "launch of to_halves");
      cuda::download(table.data(), tables.data() + book * entries * dim, entries * dim, stream);
      if (book + 1 == format.codebooks) break;
      nearest_neighbour_cuda(rows, {table.data(), DType::f32, entries, dim, dim}, codes.data(), stream);
      cuda::subtract_kernel<<<cuda::blocks_for(count * dim), cuda::kThreads, 0, stream>>>(
          task, table.data(), codes.data(), count, 0, 0, x.data(), nullptr);
      check_cuda(cudaGetLastError(), "launch of subtract");
    }
    check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  }
  return std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                          format.scale_group, format.scale_dtype, tables);
}

}  // namespace quantloom
