#include "quantloom/rounding/channel_scales.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "calibration/error_statistics.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/scale_exponents.hpp"

namespace quantloom {
namespace {

constexpr int kCodesPerOctave = 16;
constexpr int64_t kRowsPerPiece = 64;

// 2^(i / 16), so that scales are the same whatever the processor's exp2.
constexpr double kSixteenths[kCodesPerOctave] = {
    1.0,
    1.0442737824274138,
    1.0905077326652577,
    1.1387886347566916,
    1.1892071150027210,
    1.2418578120734840,
    1.2968395546510096,
    1.3542555469368927,
    1.4142135623730951,
    1.4768261459394993,
    1.5422108254079407,
    1.6104903319492543,
    1.6817928305074290,
    1.7562521603732995,
    1.8340080864093424,
    1.9152065613971474,
};

std::vector<float> inverse_scales(std::span<const int8_t> codes) {
  std::vector<float> result;
  result.reserve(codes.size());
  for (const int8_t code : codes) result.push_back(channel_scale(static_cast<int8_t>(-code)));
  return result;
}

void scale_columns_in_parallel(const FloatMatrix& w, std::span<const int8_t> codes, MatrixView<float> out,
                               int threads) {
  parallel_for(ceil_div(w.rows(), kRowsPerPiece), threads, [&](int64_t piece) {
    const int64_t first = piece * kRowsPerPiece;
    const int64_t rows = std::min(kRowsPerPiece, w.rows() - first);
    for (int64_t r = first; r < first + rows; ++r) {
      w.read(r, 0, w.cols(), out.row(r));
      for (int64_t j = 0; j < w.cols(); ++j) out(r, j) *= channel_scale(codes[static_cast<size_t>(j)]);
    }
  });
}

// The loss of nearest rounding with these scales; infinity if the scaled weights do not fit the format.
double loss_at(std::span<const ScaledLayer> layers, const Hessian& hessian, std::span<const int8_t> codes,
               int threads) {
  const bool scaled = std::any_of(codes.begin(), codes.end(), [](int8_t code) { return code != 0; });
  const Hessian own = scaled ? scaled_hessian(hessian, codes) : Hessian(0);
  double loss = 0;
  for (const ScaledLayer& layer : layers) {
    NearestOptions options;
    options.hessian = scaled ? &own : &hessian;
    options.threads = threads;
    if (!scaled) {
      loss += round_nearest(layer.w, layer.format, options).report.proxy_loss;
      continue;
    }
    std::vector<float> values(static_cast<size_t>(checked_mul(layer.w.rows(), layer.w.cols())));
    const MatrixView<float> w(values.data(), layer.w.rows(), layer.w.cols());
    scale_columns_in_parallel(layer.w, codes, w, threads);
    try {
      loss += round_nearest(w, layer.format, options).report.proxy_loss;
    } catch (const NumericError&) {
      return std::numeric_limits<double>::infinity();
    }
  }
  return loss;
}

void require_arguments(std::span<const ScaledLayer> layers, const Hessian& hessian,
                       std::span<const double> magnitudes, const ChannelScaleOptions& options) {
  require_valid(options);
  if (layers.empty()) throw InvalidArgument("layers", "none", "at least one");
  for (const ScaledLayer& layer : layers) {
    if (layer.format == nullptr) throw InvalidArgument("format", "null", "a format");
    require_hessian(hessian, layer.w.cols(), "hessian");
    require_finite(layer.w, "w", options.threads);
  }
  require_magnitudes(magnitudes, hessian.k());
}

}  // namespace

float channel_scale(int8_t code) {
  const int octave = code >= 0 ? code / kCodesPerOctave : -((kCodesPerOctave - 1 - code) / kCodesPerOctave);
  return static_cast<float>(std::ldexp(kSixteenths[code - octave * kCodesPerOctave], octave));
}

std::vector<int8_t> channel_scale_codes(std::span<const double> magnitudes, double exponent, int code_step) {
  if (!std::isfinite(exponent)) throw InvalidArgument("exponent", text_of(exponent), "a finite number");
  if (code_step < 1 || kLargestScaleCode % code_step != 0) {
    throw InvalidArgument("code_step", text_of(code_step), text_of("a divisor of ", kLargestScaleCode));
  }
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (size_t j = 0; j < magnitudes.size(); ++j) {
    if (!(magnitudes[j] >= 0) || !std::isfinite(magnitudes[j])) {
      throw InvalidArgument(text_of("magnitudes[", j, "]"), text_of(magnitudes[j]),
                            "a finite number of 0 or more");
    }
    if (magnitudes[j] == 0) continue;
    low = std::min(low, std::log2(magnitudes[j]));
    high = std::max(high, std::log2(magnitudes[j]));
  }
  const double centre = (low + high) / 2;
  std::vector<int8_t> codes(magnitudes.size(), 0);
  for (size_t j = 0; j < magnitudes.size(); ++j) {
    if (magnitudes[j] == 0) continue;
    const double octaves = exponent * (std::log2(magnitudes[j]) - centre);
    const double code = code_step * std::nearbyint(octaves * kCodesPerOctave / code_step);
    codes[j] = static_cast<int8_t>(
        std::clamp(code, -static_cast<double>(kLargestScaleCode), static_cast<double>(kLargestScaleCode)));
  }
  return codes;
}

void scale_columns(const FloatMatrix& w, std::span<const int8_t> codes, MatrixView<float> out) {
  if (std::ssize(codes) != w.cols() || out.rows() != w.rows() || out.cols() != w.cols()) {
    throw InvalidArgument("codes", text_of(codes.size(), " entries"),
                          text_of(w.cols(), ", and an output of the shape of w"));
  }
  scale_columns_in_parallel(w, codes, out, 1);
}

Hessian scaled_hessian(const Hessian& hessian, std::span<const int8_t> codes) {
  const int64_t k = hessian.k();
  if (std::ssize(codes) != k) {
    throw InvalidArgument("codes", text_of(codes.size(), " entries"), text_of(k, ", one for each input"));
  }
  const std::vector<float> inverse = inverse_scales(codes);
  const MatrixView<const double> sum = hessian.sum();
  std::vector<double> values(static_cast<size_t>(checked_mul(k, k)));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      // The product of the scales first: (i, j) and (j, i) come out the same.
      values[static_cast<size_t>(i * k + j)] =
          sum(i, j) *
          (static_cast<double>(inverse[static_cast<size_t>(i)]) * inverse[static_cast<size_t>(j)]);
    }
  }
  return {MatrixView<const double>(values.data(), k, k), hessian.tokens()};
}

ChannelScales search_channel_scales(std::span<const ScaledLayer> layers, const Hessian& hessian,
                                    std::span<const double> magnitudes, const ChannelScaleOptions& options) {
  require_arguments(layers, hessian, magnitudes, options);
  return best_scales(magnitudes, hessian.diagonal(), options, [&](std::span<const int8_t> codes) {
    return loss_at(layers, hessian, codes, options.threads);
  });
}

void require_valid(const ChannelScaleOptions& options) {
  static_cast<void>(resolve_threads(options.threads));
  if (options.steps < 1 || options.steps > 1000) {
    throw InvalidArgument("steps", text_of(options.steps), "a number from 1 to 1000");
  }
}

void require_magnitudes(std::span<const double> magnitudes, int64_t k) {
  if (std::ssize(magnitudes) == k) return;
  throw InvalidArgument("magnitudes", text_of(magnitudes.size(), " entries"),
                        text_of(k, ", one for each input"));
}

ChannelScales best_scales(std::span<const double> magnitudes, const std::vector<double>& diagonal,
                          const ChannelScaleOptions& options,
                          const std::function<double(std::span<const int8_t>)>& loss_at) {
  std::vector<double> live(magnitudes.begin(), magnitudes.end());
  for (size_t j = 0; j < live.size(); ++j) {
    if (diagonal[j] == 0) live[j] = 0;
  }
  ChannelScales best;
  for (int i = 0; i < options.steps; ++i) {
    const double exponent = static_cast<double>(i) / options.steps;
    std::vector<int8_t> codes = channel_scale_codes(live, exponent, options.code_step);
    const double loss = loss_at(codes);
    best.losses.push_back(loss);
    if (i > 0 && !(loss < best.loss)) continue;
    best.codes = std::move(codes);
    best.exponent = exponent;
    best.loss = loss;
  }
  return best;
}

}  // namespace quantloom
