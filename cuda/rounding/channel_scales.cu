// The search of channel scales on the device.
#include <algorithm>
#include <limits>

#include "common/device_pointer.hpp"
#include "common/load_float.cuh"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "rounding/rounds.hpp"
#include "rounding/scale_exponents.hpp"

namespace quantloom {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

__global__ void __launch_bounds__(kThreads) scale_kernel(CudaMatrix w, const float* scales, float* out) {
  const int64_t total = w.rows * w.cols;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    out[at] = load_float(w.data, w.dtype, at / w.cols * w.stride + at % w.cols) * scales[at % w.cols];
  }
}

// diag(H) of inputs that were divided by the scales, as scaled_hessian() has it.
std::vector<double> scaled_diagonal(const std::vector<double>& diagonal, const std::vector<float>& inverse) {
  std::vector<double> result(diagonal.size());
  for (size_t j = 0; j < result.size(); ++j) {
    result[j] = diagonal[j] * (static_cast<double>(inverse[j]) * inverse[j]);
  }
  return result;
}

class ScaledLosses {
 public:
  ScaledLosses(std::span<const CudaScaledLayer> layers, const CudaHessian& hessian,
               const std::vector<double>& diagonal, cudaStream_t stream)
      : layers_(layers),
        hessian_(hessian),
        diagonal_(diagonal),
        stream_(stream),
        scales_(hessian.k(), stream),
        inverse_(hessian.k(), stream) {}

  // Infinite if scaled weights do not fit a format.
  double at(std::span<const int8_t> codes) {
    const bool scaled = std::any_of(codes.begin(), codes.end(), [](int8_t code) { return code != 0; });
    FitMetric metric;
    metric.weights = column_weights(diagonal_);
    if (scaled) {
      std::vector<float> scales;
      std::vector<float> inverse;
      for (const int8_t code : codes) {
        scales.push_back(channel_scale(code));
        inverse.push_back(channel_scale(static_cast<int8_t>(-code)));
      }
      metric.weights = column_weights(scaled_diagonal(diagonal_, inverse));
      scales_.upload(scales.data(), std::ssize(scales));
      inverse_.upload(inverse.data(), std::ssize(inverse));
      check_cuda(cudaStreamSynchronize(stream_), "copy to the device");
    }
    double loss = 0;
    for (const CudaScaledLayer& layer : layers_) {
      if (layer.w.rows == 0 || layer.w.cols == 0) continue;
      const double own =
          scaled ? scaled_loss(layer, metric) : loss_of(layer.w, layer.format, metric, nullptr);
      if (own == std::numeric_limits<double>::infinity()) return own;
      loss += own;
    }
    return loss;
  }

 private:
  double loss_of(const CudaMatrix& w, const std::shared_ptr<const Format>& format, const FitMetric& metric,
                 const float* input_scales) const {
    const NearestRounding rounding(w, format, nullptr, std::nullopt, metric, stream_);
    const CudaHessian* const hessians[] = {&hessian_};
    return rounding.losses(hessians, input_scales).proxy_losses.front();
  }

  double scaled_loss(const CudaScaledLayer& layer, const FitMetric& metric) const {
    const int64_t count = checked_mul(layer.w.rows, layer.w.cols);
    const DeviceBuffer<float> values(count, stream_);
    const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(count, kThreads), 1, kMaxBlocks));
    scale_kernel<<<blocks, kThreads, 0, stream_>>>(layer.w, scales_.data(), values.data());
    check_cuda(cudaGetLastError(), "launch of scale_columns");
    try {
      return loss_of({values.data(), DType::f32, layer.w.rows, layer.w.cols, layer.w.cols}, layer.format,
                     metric, inverse_.data());
    } catch (const NumericError&) {
      return std::numeric_limits<double>::infinity();
    }
  }

  std::span<const CudaScaledLayer> layers_;
  const CudaHessian& hessian_;
  const std::vector<double>& diagonal_;
  cudaStream_t stream_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<float> inverse_;
};

}  // namespace
}  // namespace cuda

ChannelScales search_channel_scales_cuda(std::span<const CudaScaledLayer> layers, const CudaHessian& hessian,
                                         std::span<const double> magnitudes,
                                         const ChannelScaleOptions& options, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  require_valid(options);
  if (layers.empty()) throw InvalidArgument("layers", "none", "at least one");
  for (const CudaScaledLayer& layer : layers) {
    if (layer.format == nullptr) throw InvalidArgument("format", "null", "a format");
    const auto* outliers = dynamic_cast<const Outliers*>(layer.format.get());
    cuda::require_columns_format(outliers != nullptr ? *outliers->dense : *layer.format,
                                 "search_channel_scales_cuda");
    if (outliers != nullptr && !outliers->percent) {
      throw InvalidArgument("format", layer.format->spec() + ", with a count", "a percentage of outliers");
    }
    cuda::require_hessian(hessian, layer.w.cols, "hessian");
    cuda::require_matrix(layer.w, "w");
    static_cast<void>(layer.format->planes(layer.w.rows, layer.w.cols));
    if (layer.w.rows > 0 && layer.w.cols > 0) cuda::require_finite_cuda(layer.w, "w", cuda_stream);
  }
  require_magnitudes(magnitudes, hessian.k());
  const std::vector<double> diagonal = hessian.diagonal(stream);
  cuda::ScaledLosses losses(layers, hessian, diagonal, cuda_stream);
  return best_scales(magnitudes, diagonal, options,
                     [&](std::span<const int8_t> codes) { return losses.at(codes); });
}

}  // namespace quantloom
