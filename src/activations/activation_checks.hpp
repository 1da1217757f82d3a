// What the CPU and CUDA sides of rounding ask of a format.
#pragma once

#include "quantloom/activations/activation_format.hpp"

namespace quantloom {

// Throws InvalidArgument unless the format is calibrated, for tokens of k inputs.
void require_calibrated(const ActivationFormat& format, int64_t k);

// Scales of a token, or of the tensor.
int64_t scales_per_token(const ActivationFormat& format, int64_t k);

}  // namespace quantloom
