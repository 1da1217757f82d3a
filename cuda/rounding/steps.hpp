// The steps that the roundings on the device are made of. Each enqueues work on a stream and returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/device_buffer.hpp"
#include "common/matrix_checks.hpp"
#include "formats/scalar_planes.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom::cuda {

// The factors of a scale search, on the device; none for no search.
class SearchFactors {
 public:
  SearchFactors(const std::optional<ScaleSearch>& search, cudaStream_t stream);
  const float* data() const { return factors_.data(); }
  int steps() const { return static_cast<int>(host_.size()); }
  double norm() const { return norm_; }
  const std::vector<float>& host() const { return host_; }
  bool by_output_error() const { return by_output_error_; }

 private:
  std::vector<float> host_;
  double norm_ = 2;
  bool by_output_error_ = false;
  DeviceBuffer<float> factors_;
};

// In a matrix of what outliers are beyond their dense values, in float16, where there is none: a NaN.
inline constexpr uint16_t kNoOutlier = 0xffff;

// What to fit: groups of `group_size` consecutive columns of `w`, beginning at first_column; the last one
// ends at end_column.
struct FitTask {
  CudaMatrix w;
  int64_t first_column = 0;
  int64_t end_column = 0;
  int64_t group_size = 0;
  int64_t first_group = 0;  // the number of the first one among all group_count of a row
  int64_t group_count = 0;
  const uint8_t* dead = nullptr;   // by column of w: not 0 where the weights count as 0; null for none
  const float* weights = nullptr;  // by column of w: how much errors count in the search; null for 1
  // Where `missing` [rows, columns of w] is not kNoOutlier, w holds 0 in place of what `original` has and an
  // outlier makes up for; a search measures what is then left. Null for none.
  const uint16_t* missing = nullptr;
  CudaMatrix original;
  ScalarGrid grid;
  GroupParameters parameters;
  uint64_t* failure = nullptr;  // takes the least row * group_count + group whose grid is not finite
};

// Fits each group of each row on its own: with the search, or, without steps, with ranges times factors
// [rows, groups of the task] (null for 1).
void fit_groups(const FitTask& task, const SearchFactors& search, const float* factors, cudaStream_t stream);
// Fits all columns of all rows as one group; parameters at index 0.
void fit_whole(const FitTask& task, const SearchFactors& search, cudaStream_t stream);

}  // namespace quantloom::cuda
