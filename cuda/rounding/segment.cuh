// What a fit reads: columns of one row and group of a FitTask.
#pragma once

#include "common/load_float.cuh"
#include "rounding/steps.hpp"

namespace quantloom::cuda {

// Columns [first, first + count) of one row.
struct Segment {
  const void* values;
  DType dtype;
  int64_t offset;  // of column `first` in the matrix
  int64_t first;
  int64_t count;
  const uint8_t* dead;
  const float* weights;
  const uint16_t* missing;  // of column `first`; null for none
  const void* original;
  DType original_dtype;
  int64_t original_offset;

  __device__ float value(int64_t i) const {
    if (dead != nullptr && dead[first + i] != 0) return 0.0F;
    return load_float(values, dtype, offset + i);
  }
  __device__ float weight(int64_t i) const { return weights == nullptr ? 1.0F : weights[first + i]; }
  // What value i, for which `decoded` is stored, is decoded to too much.
  __device__ double error(int64_t i, float value, float decoded) const {
    if (missing != nullptr && missing[i] != kNoOutlier) {
      value = load_float(original, original_dtype, original_offset + i);
      decoded = decoded + __half2float(__float2half_rn(value - decoded));
    }
    return static_cast<double>(decoded) - static_cast<double>(value);
  }
};

__device__ __forceinline__ Segment segment_of(const FitTask& task, int64_t row, int64_t first,
                                              int64_t count) {
  return {task.w.data,
          task.w.dtype,
          row * task.w.stride + first,
          first,
          count,
          task.dead,
          task.weights,
          task.missing != nullptr ? task.missing + row * task.w.cols + first : nullptr,
          task.original.data,
          task.original.dtype,
          row * task.original.stride + first};
}

// What a search of scales tries, on the device.
struct Search {
  const float* factors = nullptr;
  int steps = 0;
  double norm = 2;
};

inline Search search_of(const SearchFactors& factors) {
  return {factors.data(), factors.steps(), factors.norm()};
}

// What an error counts in a search.
__device__ __forceinline__ double search_error(double weight, double error, double norm) {
  return norm == 2.0 ? weight * (error * error) : weight * pow(fabs(error), norm);
}

}  // namespace quantloom::cuda
