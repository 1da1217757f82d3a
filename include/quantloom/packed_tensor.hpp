// PackedTensor: a compressed matrix, the one thing that crosses every border of the library: what a
// rounding returns, what a file stores, what a kernel multiplies with.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "quantloom/matrix_view.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom {

class Format;

// A matrix [n, k] = [out_features, in_features] as the named planes that its format prescribes
// ("codes", "scales", "zeros", ...). Planes are canonical: the bytes a file stores.
struct PackedTensor {
  std::shared_ptr<const Format> format;
  int64_t n = 0;
  int64_t k = 0;
  std::map<std::string, Tensor> planes;

  // Throws InvalidArgument if the plane is missing.
  const Tensor& plane(std::string_view name) const;
  // All stored bits: every plane, padding included.
  int64_t size_in_bits() const;
  // size_in_bits() / (n * k); 0 for an empty matrix.
  double bits_per_weight() const;
};

// Throws InvalidArgument, naming the plane, unless the planes are just those that the format
// prescribes for [n, k], with their dtypes and shapes, all on one device, and (on the CPU) with
// values that decode safely: finite scales, group indices in range.
void validate(const PackedTensor& packed);

// Decodes to float32 `out` [n, k]. Threads: 0 = OpenMP's default.
void dequantize(const PackedTensor& packed, MatrixView<float> out, int threads = 0);

}  // namespace quantloom
