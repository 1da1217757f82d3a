// The search for scales by the error of a group's outputs.
#pragma once

#include <cstdint>

#include "rounding/device_encoder.hpp"

namespace quantloom::cuda {

// What errors are measured with: H as a sum over tokens.
struct OutputMetric {
  const double* sum = nullptr;  // [k, k], on the device
  int64_t k = 0;
  double factor = 1;                   // of all entries
  const int32_t* column_at = nullptr;  // [k]: the input of each column of a task's matrix; null: its own
};

// Fits the groups of `task` with the factors of least e^T H e, the larger one on a tie; not one group for the
// whole matrix.
void fit_by_output_error(DeviceEncoder& encoder, const FitTask& task, const SearchFactors& search,
                         const OutputMetric& metric, cudaStream_t stream);

}  // namespace quantloom::cuda
