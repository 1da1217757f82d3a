// Activations as integers: codes with their scales, and the way back.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "quantloom/activations/activation_format.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom {

// A batch [m, k] of m tokens with G = format.group_count(k) groups. Planes, for scope token and group:
//   codes   int8 [m, k]
//   scales  float32 [m, 1], [m, G] for scope group, [1, 1] for scope tensor
//   zeros   int8, the shape of scales; asymmetric only
//   shifts  uint8 [m, G]; significant digits only
//   outlier_columns  int32 [o], rising, outlier_values float32 [m, o]: with outliers only; codes there stand
//                    for 0
struct QuantizedActivations {
  ActivationFormat format;
  int64_t m = 0;
  int64_t k = 0;
  std::map<std::string, Tensor> planes;
};

// Their names, dtypes and shapes; `outliers`: columns that are kept.
std::vector<PlaneSpec> activation_planes(const ActivationFormat& format, int64_t m, int64_t k,
                                         int64_t outliers = 0);

// Throws InvalidArgument for a static format without a grid, NumericError naming token and input unless all
// values are finite and below 2^127. The same codes on every instruction set. threads 0: OpenMP's default.
QuantizedActivations quantize_activations(const FloatMatrix& x, const ActivationFormat& format,
                                          int threads = 0);

// The values that the codes stand for, to `out` [m, k]. Throws InvalidArgument naming a plane that is not as
// the format prescribes.
void dequantize_activations(const QuantizedActivations& x, MatrixView<float> out, int threads = 0);

// Both in one, bit for bit; `out` [m, k] may be the memory of x if that is float32. x is checked before
// anything is written.
void round_activations(const FloatMatrix& x, const ActivationFormat& format, MatrixView<float> out,
                       int threads = 0);

// The slow obvious reference of quantize_activations().
QuantizedActivations quantize_activations_reference(const FloatMatrix& x, const ActivationFormat& format);

}  // namespace quantloom
