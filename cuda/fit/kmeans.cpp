// k-means on the device: the same loop as src/fit/kmeans.cpp.
#include <algorithm>
#include <vector>

#include "common/device_pointer.hpp"
#include "common/matrix_checks.hpp"
#include "fit/centroid_sums.hpp"
#include "fit/codebook_checks.hpp"
#include "fit/codebook_search.hpp"
#include "fit/codebook_start.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"

namespace quantloom {
namespace {

using cuda::DeviceBuffer;

cudaStream_t to_stream(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

void require_rows(const CudaMatrix& x) {
  cuda::require_matrix(x, "x");
  fit::require_dims(x.cols, "x");
  if (x.rows >= (int64_t{1} << 31)) {
    throw InvalidArgument("x", text_of(x.rows, " rows"), "fewer than 2^31");
  }
}

// Values [rows, d] on the device, gathered from those rows of x (all if empty), on the host.
std::vector<float> host_rows(const CudaMatrix& x, const std::vector<int64_t>& rows, cudaStream_t stream) {
  const auto count = rows.empty() ? x.rows : static_cast<int64_t>(rows.size());
  DeviceBuffer<int64_t> places(static_cast<int64_t>(rows.size()), stream);
  places.upload(rows.data(), static_cast<int64_t>(rows.size()));
  DeviceBuffer<float> gathered(checked_mul(count, x.cols), stream);
  cuda::gather_rows(x, rows.empty() ? nullptr : places.data(), count, gathered.data(), stream);
  std::vector<float> values(static_cast<size_t>(count * x.cols));
  cuda::download(gathered.data(), values.data(), count * x.cols, stream);
  return values;
}

std::vector<float> make_start(const CudaMatrix& x, const float* weights, int64_t count,
                              const KMeansOptions& options, cudaStream_t stream) {
  std::vector<float> centroids;
  if (options.start == CodebookStart::given) {
    for (int64_t i = 0; i < count; ++i) {
      const float* const row = options.centroids.row(i);
      centroids.insert(centroids.end(), row, row + x.cols);
    }
    return centroids;
  }
  const std::vector<int64_t> rows = fit::start_rows(x.rows, count, options);
  const std::vector<float> values = host_rows(x, rows, stream);
  std::vector<float> some_weights;
  if (weights != nullptr) some_weights = host_rows({weights, DType::f32, x.rows, 1, 1}, rows, stream);
  const auto row_count = static_cast<int64_t>(values.size()) / x.cols;
  return fit::start_from({values.data(), row_count, x.cols}, some_weights, count, options);
}

// Moves empty centroids to the rows that are described worst by `before`, the centroids of the codes.
void reseed(const CudaMatrix& x, const float* weights, const float* before, const int32_t* codes,
            const DeviceBuffer<int32_t>& empty, float* centroids, cudaStream_t stream) {
  std::vector<int32_t> flags(static_cast<size_t>(empty.count()));
  cuda::download(empty.data(), flags.data(), empty.count(), stream);
  std::vector<int64_t> entries;
  for (size_t i = 0; i < flags.size(); ++i) {
    if (flags[i] != 0) entries.push_back(static_cast<int64_t>(i));
  }
  const int64_t moved = std::min(static_cast<int64_t>(entries.size()), x.rows);
  DeviceBuffer<double> errors(x.rows, stream);
  cuda::measure_rows(x, weights, before, codes, errors.data(), stream);
  std::vector<int32_t> rows(static_cast<size_t>(moved));
  std::vector<double> row_errors(static_cast<size_t>(moved));
  cuda::worst_rows(errors.data(), x.rows, moved, rows.data(), row_errors.data(), stream);
  std::vector<int64_t> places;
  for (size_t i = 0; i < rows.size() && row_errors[i] > 0; ++i) places.push_back(rows[i]);
  if (places.empty()) return;
  const std::vector<float> values = host_rows(x, places, stream);
  for (size_t i = 0; i < places.size(); ++i) {
    check_cuda(
        cudaMemcpyAsync(centroids + entries[i] * x.cols, values.data() + static_cast<int64_t>(i) * x.cols,
                        static_cast<size_t>(x.cols) * sizeof(float), cudaMemcpyHostToDevice, stream),
        "copy to the device");
  }
  check_cuda(cudaStreamSynchronize(stream), "copy to the device");
}

}  // namespace

void nearest_neighbour_cuda(const CudaMatrix& x, const CudaMatrix& centroids, int32_t* codes, void* stream) {
  const cudaStream_t queue = to_stream(stream);
  require_rows(x);
  cuda::require_matrix(centroids, "centroids");
  // For its checks of the shape; nothing is read.
  fit::require_codebook({nullptr, centroids.rows, centroids.cols}, x.cols, "centroids");
  if (x.rows > 0) cuda::require_device_memory(codes, "codes");
  const float largest = std::max(cuda::checked_largest(x, "x", true, queue),
                                 cuda::checked_largest(centroids, "centroids", true, queue));
  DeviceBuffer<float> table(checked_mul(centroids.rows, centroids.cols), queue);
  cuda::gather_rows(centroids, nullptr, centroids.rows, table.data(), queue);
  cuda::CodebookSearch search(x, centroids.rows, largest, queue);
  search.run(table.data(), codes);
  check_cuda(cudaStreamSynchronize(queue), "work of the stream");
}

CudaKMeansReport kmeans_cuda(const CudaMatrix& x, int64_t count, const KMeansOptions& options,
                             const float* weights, float* centroids, int32_t* codes, void* stream) {
  const cudaStream_t queue = to_stream(stream);
  fit::require_options(count, options);
  require_rows(x);
  float largest_given = 0;
  if (options.start == CodebookStart::given) {
    fit::require_codebook(options.centroids, x.cols, "centroids");
    if (options.centroids.rows() != count) {
      throw InvalidArgument("centroids", text_of(options.centroids.rows(), " vectors"), text_of(count));
    }
    largest_given = fit::largest_magnitude(options.centroids, "centroids", 1);
  } else if (x.rows == 0) {
    throw InvalidArgument("x", "no rows", "at least one");
  }
  cuda::require_device_memory(centroids, "centroids");
  if (x.rows > 0) cuda::require_device_memory(codes, "codes");
  float most_weight = 1;
  if (weights != nullptr && x.rows > 0) {
    cuda::require_device_memory(weights, "weights");
    most_weight = cuda::checked_largest({weights, DType::f32, x.rows, 1, 1}, "weights", false, queue);
  }
  const float largest = cuda::checked_largest(x, "x", true, queue);

  const std::vector<float> start = make_start(x, weights, count, options, queue);
  check_cuda(
      cudaMemcpyAsync(centroids, start.data(), start.size() * sizeof(float), cudaMemcpyHostToDevice, queue),
      "copy to the device");
  check_cuda(cudaStreamSynchronize(queue), "copy to the device");
  cuda::CodebookSearch search(x, count, std::max(largest, largest_given), queue);
  search.run(centroids, codes);

  CudaKMeansReport report;
  cuda::CentroidSums sums(x, weights, count, largest, most_weight, queue);
  const int64_t values = count * x.cols;
  DeviceBuffer<float> before(options.reseed_empty ? values : 0, queue);
  DeviceBuffer<int32_t> codes_before(x.rows, queue);
  DeviceBuffer<int32_t> empty(count, queue);
  DeviceBuffer<int32_t> empty_count(1, queue);
  DeviceBuffer<unsigned long long> changes(1, queue);
  while (report.sweeps < options.max_sweeps && !report.converged) {
    if (options.reseed_empty)
      cuda::gather_rows({centroids, DType::f32, count, x.cols, x.cols}, nullptr, count, before.data(), queue);
    sums.apply(codes, centroids, empty.data(), empty_count.data());
    if (options.reseed_empty && x.rows > 0) {
      int32_t empty_entries = 0;
      cuda::download(empty_count.data(), &empty_entries, 1, queue);
      if (empty_entries > 0) reseed(x, weights, before.data(), codes, empty, centroids, queue);
    }
    check_cuda(cudaMemcpyAsync(codes_before.data(), codes, static_cast<size_t>(x.rows) * sizeof(int32_t),
                               cudaMemcpyDeviceToDevice, queue),
               "copy of codes");
    search.run(centroids, codes);
    changes.fill_bytes(0);
    cuda::count_changes(codes_before.data(), codes, x.rows, changes.data(), queue);
    unsigned long long changed = 0;
    cuda::download(changes.data(), &changed, 1, queue);
    report.changed = static_cast<double>(changed) / static_cast<double>(std::max<int64_t>(x.rows, 1));
    report.converged = report.changed <= options.threshold;
    ++report.sweeps;
  }
  DeviceBuffer<double> errors(x.rows, queue);
  DeviceBuffer<double> sum(1, queue);
  cuda::measure_rows(x, weights, centroids, codes, errors.data(), queue);
  cuda::sum_values(errors.data(), x.rows, sum.data(), queue);
  cuda::download(sum.data(), &report.squared_error, 1, queue);
  return report;
}

}  // namespace quantloom
