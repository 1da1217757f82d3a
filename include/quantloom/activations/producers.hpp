// What makes activations: the norms and the gated activation of a transformer, whose results are rounded in
// the same pass.
//
// All is computed in float32 and rounded once to the dtype of x, so that rounding the result to integers is
// the same as doing both one after the other:
//   rms_norm    x * r * w, r = 1 / sqrt(mean(x^2) + epsilon); w + 1 in place of w with add_one (Gemma)
//   layer_norm  (x - mean(x)) * r * w + b, r from the centred values
//   silu_mul    y = silu(x) rounded to the dtype, then y * up; silu(x) = x / (1 + exp(-x)), exp by a
//   polynomial
//               of degree 5 (1.1e-7)
// Means are sums in float64 of sums of eight neighbours in float32. They are exact, and so do not depend on
// the order, where no eight neighbours are smaller than 2^-29 of the whole; the factor r is found from them
// in float64 and rounded to float32. Every device and instruction set gives the same bytes then.
#pragma once

#include <span>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

enum class ProducerKind : uint8_t { rms_norm, layer_norm, silu_mul };

struct ActivationProducer {
  ProducerKind kind = ProducerKind::rms_norm;
  std::span<const float> weight = {};  // [k], or empty: ones
  std::span<const float> bias = {};    // [k], of layer_norm, or empty
  float epsilon = 1e-6F;               // >= 0
  bool add_one = false;                // to the weight, of rms_norm
  FloatMatrix up = {};                 // of silu_mul: dtype and shape of x
};

// out [m, k]: float32 values that x's dtype holds. Throws InvalidArgument or TypeMismatch naming the
// argument.
void produce_activations(const FloatMatrix& x, const ActivationProducer& producer, MatrixView<float> out,
                         int threads = 0);

}  // namespace quantloom
