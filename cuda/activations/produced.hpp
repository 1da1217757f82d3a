// Rounding what a norm or a gated activation makes, in the same kernel. Arguments are checked by the callers.
#pragma once

#include <cuda_runtime_api.h>

#include "activations/token_rounding.hpp"
#include "quantloom/activations/cuda_activations.hpp"

namespace quantloom::cuda {

// Where rounded values of a format with a scale for each token, or a fixed one, go; one of the three.
struct ProducedPlaces {
  const IntegerTokens* integers = nullptr;
  const QuantizedActivations* planes = nullptr;
  void* values = nullptr;  // or, without a format, the values as they are
  int64_t stride = 0;
};

// format null: not rounded. outlier_index: of `outliers` columns, or null.
void launch_norm(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat* format,
                 const ProducedPlaces& to, const void* outlier_index, int64_t outliers, cudaStream_t stream,
                 bool overlap);
void launch_silu(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat* format,
                 const ProducedPlaces& to, const void* outlier_index, int64_t outliers, cudaStream_t stream,
                 bool overlap);

// round_tokens() of what `producer` makes of x, without significant digits and of scope tensor only if
// static.
void round_produced_tokens(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat& format,
                           const IntegerTokens& out, cudaStream_t stream, bool overlap = false);

}  // namespace quantloom::cuda
