// Activation-aware scaling of input channels (AWQ: Lin et al., "AWQ: Activation-aware Weight Quantization",
// 2024): W diag(s) is rounded in place of W, and inputs are divided by s, so that channels with large inputs
// lose less. Scales are s_j = m_j^a with m_j the mean magnitude of channel j, and the exponent a is searched
// for by the error of the layers' outputs, tr(E H E^T), which the Hessian gives exactly.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/calibration/hessian.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/formats/format.hpp"

namespace quantloom {

// A scale is 2^(code / 16): steps of 4.4%, from 2^-7 to 2^7.
inline constexpr int kLargestScaleCode = 112;
float channel_scale(int8_t code);

// One of the layers that share the inputs: its weights [n, k] and the format they are rounded to.
struct ScaledLayer {
  FloatMatrix w;
  std::shared_ptr<const Format> format;
};

struct ChannelScaleOptions {
  int steps = 20;     // exponents tried: 0, 1/steps, ..., (steps - 1)/steps
  int code_step = 1;  // codes are multiples of it: 16 gives powers of two
  int threads = 0;
};

struct ChannelScales {
  std::vector<int8_t> codes;   // [k]; all 0 if no exponent beats 0
  double exponent = 0;         // the one with the least loss, the smaller one on a tie
  double loss = 0;             // tr(E H E^T) of nearest rounding, summed over the layers
  std::vector<double> losses;  // at each exponent; infinity where scales of weights leave their stored type
};

// The codes of m^exponent [k], centred so that the largest scale times the smallest is 1. Channels whose
// magnitude is 0 get 1 (code 0), and ratios beyond 2^14 are cut off, so that every scale is finite whatever
// the magnitudes. Throws InvalidArgument for magnitudes that are negative or not finite, and for a code_step
// that does not divide 112.
std::vector<int8_t> channel_scale_codes(std::span<const double> magnitudes, double exponent,
                                        int code_step = 1);

// w [n, k] with column j times the scale of codes[j], in float32.
void scale_columns(const FloatMatrix& w, std::span<const int8_t> codes, MatrixView<float> out);

// The Hessian of inputs that were divided by the scales.
Hessian scaled_hessian(const Hessian& hessian, std::span<const int8_t> codes);

// Searches the exponent. magnitudes [k], >= 0: mean |x| of each input, or whatever else says how large it is;
// dead inputs (diag H = 0) keep scale 1. Throws InvalidArgument naming what has another number of columns
// than the Hessian, NumericError for weights that are not finite or that do not fit their format even
// unscaled.
//
// Memory beyond the inputs: a scaled copy of one layer, its packed form, and 8 k^2 bytes.
ChannelScales search_channel_scales(std::span<const ScaledLayer> layers, const Hessian& hessian,
                                    std::span<const double> magnitudes,
                                    const ChannelScaleOptions& options = {});

struct CudaScaledLayer {
  CudaMatrix w;
  std::shared_ptr<const Format> format;
};

// The same for weights and a Hessian on the current CUDA device; `stream` is a cudaStream_t, and the function
// returns after its work is done. The same codes at each exponent; losses, whose sums are taken in another
// order, to about 1e-6 relative, so that exponents whose losses agree so far may change places. Unsupported
// for formats other than "uniform", "codebook", "bcq" and "spqr", with outliers or without, and in a CPU-only
// build.
//
// Memory on the device beyond the inputs: of one layer a scaled copy and its codes (5 n k bytes), and
// 16 * 1024 * k bytes.
ChannelScales search_channel_scales_cuda(std::span<const CudaScaledLayer> layers, const CudaHessian& hessian,
                                         std::span<const double> magnitudes,
                                         const ChannelScaleOptions& options, void* stream);

}  // namespace quantloom
