// What rounding of activations on a device asks of its arguments, and how it divides its workspace.
#pragma once

#include "activations/activation_checks.hpp"
#include "common/device_pointer.hpp"
#include "quantloom/activations/cuda_activations.hpp"

namespace quantloom::cuda {

// Offsets in bytes.
struct WorkspacePlan {
  int64_t range = 0;     // of find_range()
  int64_t count = 16;    // of outliers
  int64_t scales = 0;    // of tokens, whose integers are cut
  int64_t outliers = 0;  // that are found on the way
  int64_t bytes = 32;

  WorkspacePlan(const ActivationFormat& format, int64_t m, int64_t k);
};

// Each throws InvalidArgument or TypeMismatch naming the argument.
// x is a matrix on the device, and the format is calibrated for it.
void require_batch(const CudaMatrix& x, const ActivationFormat& format);
// `bytes` of workspace, and outlier columns if the format needs them for k inputs.
void require_scratch(const CudaActivationScratch& scratch, const ActivationFormat& format, int64_t bytes,
                     int64_t k, bool needs_index);
// On the device, as the format prescribes, for [m, k].
void require_activation_planes(const QuantizedActivations& x, int64_t m, int64_t k);

}  // namespace quantloom::cuda
