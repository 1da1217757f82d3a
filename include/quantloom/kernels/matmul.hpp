// Products straight from packed codes on the CPU: y = x W^T for x [m, k], W [n, k], y [m, n].
//
// A PackedTensor is first brought into the order that the SIMD loops read (rows interleaved, one linear
// stream per thread); prepare() does that once, at load. Results do not depend on the thread count.
#pragma once

#include <memory>

#include "quantloom/activations/activation_format.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// How activations enter the product.
enum class Activations : uint8_t {
  exact,  // as float32; accumulation in float32
  // Rounded to int8 with one scale per token and block of at most 128 inputs of one group. Adds a relative
  // output error of about 0.7% for normally distributed inputs (bench_matmul prints it) and keeps up with
  // memory at all widths, where decoding to float does not below 4 bits. A token's result depends neither on
  // the batch it comes in nor on the instruction set. Evenly spaced grids, and trellises whose weights are
  // sums of bytes (mul1, 1mad): inputs are rounded in the rotated basis, weights not rounded to float16.
  int8,
};

// A matrix in kernel order. Immutable; may be shared between threads.
class PreparedTensor {
 public:
  virtual ~PreparedTensor() = default;
  virtual int64_t n() const = 0;
  virtual int64_t k() const = 0;
  virtual int64_t byte_count() const = 0;
};

// Throws Unsupported if no CPU kernel takes the format (kernel_table() lists them).
std::shared_ptr<const PreparedTensor> prepare(const PackedTensor& packed, int threads = 0);

struct MatmulOptions {
  Activations activations = Activations::exact;
  int threads = 0;
};

// x [m, k] must be finite for Activations::int8 (NumericError), which codebooks do not take (Unsupported). y
// is overwritten and must not overlap x.
void matmul(const FloatMatrix& x, const PreparedTensor& w, MatrixView<float> y,
            const MatmulOptions& options = {});

// The product of x as `activations` rounds it: that of round_activations(). Evenly spaced grids and sdr are
// multiplied as integers, exactly within each run of at most 128 inputs that share scales, where such runs
// are whole steps of 16 inputs (matmul_is_integer()); else x is rounded, then multiplied as with
// Activations::exact. A token's result does not depend on the others, unless they share a dynamic scale.
// Throws as round_activations() does, before y is touched.
void matmul(const FloatMatrix& x, const PreparedTensor& w, MatrixView<float> y,
            const ActivationFormat& activations, int threads = 0);

// Whether that product is one of integers.
bool matmul_is_integer(const PreparedTensor& w, const ActivationFormat& activations);

// The slow obvious reference: decodes W and accumulates in float64.
void matmul_reference(const FloatMatrix& x, const PackedTensor& w, MatrixView<float> y);

}  // namespace quantloom
