// The other steps of k-means on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "common/device_buffer.hpp"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom::cuda {

// The largest magnitude, 0 for none. Waits for the stream. Throws NumericError naming `argument`, row and
// column of a value that is not finite, and InvalidArgument of a negative one unless `negative_too`.
float checked_largest(const CudaMatrix& values, const std::string& argument, bool negative_too,
                      cudaStream_t stream);

// Sums of rows by code in fixed point, as src/fit/fixed_point.hpp makes them, and the means.
class CentroidSums {
 public:
  // weights: null, or one for each row.
  CentroidSums(const CudaMatrix& x, const float* weights, int64_t count, float largest, float most_weight,
               cudaStream_t stream);

  // Enqueues: moves each of centroids [count, d] to the mean of its rows. Those without weight stay; their
  // number goes to *empty_count and a 1 for each to empty [count], both on the device.
  void apply(const int32_t* codes, float* centroids, int32_t* empty, int32_t* empty_count);

 private:
  CudaMatrix x_;
  const float* weights_;
  int64_t count_;
  double value_power_;
  double weight_power_;
  cudaStream_t stream_;
  DeviceBuffer<int32_t> rows_;  // 0, 1, ...
  DeviceBuffer<int32_t> sorted_codes_;
  DeviceBuffer<int32_t> sorted_rows_;
  DeviceBuffer<unsigned char> sort_space_;
  size_t sort_bytes_ = 0;
  DeviceBuffer<unsigned long long> sums_;  // [count][d + 1][2]: high and low
};

// *changes += the number of rows whose codes differ.
void count_changes(const int32_t* before, const int32_t* after, int64_t n, unsigned long long* changes,
                   cudaStream_t stream);

// errors [n] = weight * squared distance of each row from its centroid.
void measure_rows(const CudaMatrix& x, const float* weights, const float* centroids, const int32_t* codes,
                  double* errors, cudaStream_t stream);

// The rows of the `moved` largest errors, the largest first; the lowest row first on a tie. Waits.
void worst_rows(const double* errors, int64_t n, int64_t moved, int32_t* rows, double* row_errors,
                cudaStream_t stream);

// gathered [rows.count(), d] = those rows of x as float32; a null `rows` stands for all of them.
void gather_rows(const CudaMatrix& x, const int64_t* rows, int64_t count, float* gathered,
                 cudaStream_t stream);

}  // namespace quantloom::cuda
