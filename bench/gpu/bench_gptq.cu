// GPTQ on the device: seconds for the layers of a model of 8 billion weights, beside the time that cuBLAS
// takes for as many floating-point operations in products of large matrices, measured in the same run: 2/3
// k^3 in float64 (factor and inverse of the Hessian) and n k^2 in float32 (updates of the columns to come).
//
// Weights are random, inputs have a few strong features and depend on one another. Times are of the host,
// around calls that wait for the device, the best of several repeats.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "common/device_buffer.hpp"
#include "common/math_handles.hpp"
#include "gpu/layer.cuh"
#include "gpu/program.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "rounding/upper_factor.hpp"
#include "rounding/walk.hpp"

namespace quantloom {
namespace {

using bench::seconds_of;
using cuda::DeviceBuffer;

struct Settings {
  int repeats = 5;
  int64_t tokens = 65536;
};

// cuBLAS for products of [rows, depth] and [depth, depth]: seconds per floating-point operation.
template <class T, class Multiply>
double seconds_per_flop(int64_t rows, int64_t depth, int repeats, const Multiply& multiply) {
  DeviceBuffer<T> a(rows * depth, nullptr);
  DeviceBuffer<T> b(depth * depth, nullptr);
  const DeviceBuffer<T> c(rows * depth, nullptr);
  a.fill_bytes(0x3c);  // small numbers: 0.0115 in float32, 1e-17 in float64
  b.fill_bytes(0x3c);
  const cuda::BlasScope blas(nullptr);
  const T one = 1;
  const T zero = 0;
  const double seconds = seconds_of(repeats, [&] {
    cuda::check_cublas(
        multiply(blas.handle(), cuda::kOpN, cuda::kOpN, static_cast<int>(depth), static_cast<int>(rows),
                 static_cast<int>(depth), &one, b.data(), static_cast<int>(depth), a.data(),
                 static_cast<int>(depth), &zero, c.data(), static_cast<int>(depth)),
        "product");
  });
  return seconds /
         (2.0 * static_cast<double>(rows) * static_cast<double>(depth) * static_cast<double>(depth));
}

nlohmann::json measure(const Settings& settings, int64_t n, int64_t k) {
  const auto format = std::make_shared<const Uniform>(4, 128);
  const bench::Layer layer(n, k, settings.tokens);
  const CudaMatrix w = layer.w();
  const CudaHessian& hessian = layer.hessian();

  PackedTensor packed = empty_packed_cuda(format, n, k);
  CudaErrorFeedbackOptions options;
  RoundingReport report;
  const double with_losses =
      seconds_of(1, [&] { report = round_error_feedback_cuda(w, packed, hessian, options, nullptr); });
  options.measure_losses = false;
  const double seconds =
      seconds_of(settings.repeats, [&] { round_error_feedback_cuda(w, packed, hessian, options, nullptr); });
  options.scale_search = ScaleSearch{};
  const double with_search =
      seconds_of(settings.repeats, [&] { round_error_feedback_cuda(w, packed, hessian, options, nullptr); });

  const std::vector<double> diagonal = hessian.diagonal(nullptr);
  const std::vector<int64_t> walk = walk_order(diagonal, 1, true);
  const std::vector<int32_t> order(walk.begin(), walk.end());
  DeviceBuffer<int32_t> device_order(k, nullptr);
  device_order.upload(order.data(), k);
  const double factor = seconds_of(settings.repeats, [&] {
    const cuda::UpperFactor upper(hessian, diagonal, device_order.data(), 0.01, options.damping_ladder,
                                  nullptr);
  });
  const double nearest = seconds_of(settings.repeats, [&] { round_nearest_cuda(w, packed, {}, nullptr); });

  const double flops64 = 2.0 / 3.0 * static_cast<double>(k) * static_cast<double>(k) * static_cast<double>(k);
  const double flops32 = static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(k);
  const double same_flops = flops64 * seconds_per_flop<double>(std::min<int64_t>(k, 4096), k,
                                                               settings.repeats, cuda::cublas().dgemm) +
                            flops32 * seconds_per_flop<float>(n, k, settings.repeats, cuda::cublas().sgemm);
  std::printf(
      "%6lld x %-6lld %8.1f ms (factor %.1f ms), %.2f x cuBLAS for the same operations (%.1f ms); "
      "with scale search %.1f ms, with losses %.1f ms; nearest %.2f ms; Hessian %.2f M tokens/s; "
      "loss %.3f of nearest\n",
      static_cast<long long>(n), static_cast<long long>(k), seconds * 1e3, factor * 1e3, seconds / same_flops,
      same_flops * 1e3, with_search * 1e3, with_losses * 1e3, nearest * 1e3, layer.tokens_per_second() * 1e-6,
      report.proxy_loss / report.proxy_loss_nearest);
  std::fflush(stdout);
  return {{"format", format->spec()},
          {"n", n},
          {"k", k},
          {"seconds", seconds},
          {"factor_seconds", factor},
          {"search_seconds", with_search},
          {"losses_seconds", with_losses},
          {"nearest_seconds", nearest},
          {"cublas_same_operations_seconds", same_flops},
          {"ratio_to_cublas", seconds / same_flops},
          {"hessian_tokens_per_second", layer.tokens_per_second()},
          {"loss_over_nearest", report.proxy_loss / report.proxy_loss_nearest},
          {"damping", report.damping}};
}

// Other formats that are rounded column by column, and the search of channel scales.
nlohmann::json measure_format(const bench::Layer& layer, int64_t n, int64_t k, const char* spec,
                              const std::optional<OutlierSearch>& outliers, int repeats) {
  const auto format = format_from_spec(spec);
  CudaErrorFeedbackOptions options;
  options.outliers = outliers;
  options.measure_losses = false;
  if (outliers) options.scale_search = ScaleSearch{.steps = 8};
  const PackedTensor planes = empty_packed_cuda(format, n, k);
  const auto round = [&] {
    PackedTensor packed = planes;
    return round_error_feedback_cuda(layer.w(), packed, layer.hessian(), options, nullptr);
  };
  round();
  const double beforehand = seconds_of(repeats, round);
  options.static_groups = false;
  options.act_order = false;
  const double feedback = seconds_of(repeats, round);
  PackedTensor packed = planes;
  const double nearest = seconds_of(repeats, [&] { round_nearest_cuda(layer.w(), packed, {}, nullptr); });
  options.measure_losses = true;
  const RoundingReport report = round();
  std::printf(
      "%6lld x %-6lld %-22s feedback %7.1f ms, groups fitted on the walk %7.1f ms%s; nearest %6.1f ms; "
      "loss %.3f of nearest\n",
      static_cast<long long>(n), static_cast<long long>(k), spec, beforehand * 1e3, feedback * 1e3,
      outliers ? ", search and outliers" : "", nearest * 1e3, report.proxy_loss / report.proxy_loss_nearest);
  std::fflush(stdout);
  return {{"format", spec},
          {"n", n},
          {"k", k},
          {"outliers", report.outliers},
          {"feedback_seconds", beforehand},
          {"feedback_fitted_on_the_walk_seconds", feedback},
          {"nearest_seconds", nearest},
          {"loss_over_nearest", report.proxy_loss / report.proxy_loss_nearest}};
}

nlohmann::json measure_formats(const Settings& settings, int64_t n, int64_t k) {
  const bench::Layer layer(n, k, settings.tokens);
  nlohmann::json rows = nlohmann::json::array();
  for (const char* spec : {"bcq:2:g128", "bcq:3:g128", "bcq:4:g128:offset", "spqr:3:g16:s3:z3:b16"}) {
    rows.push_back(measure_format(layer, n, k, spec, std::nullopt, settings.repeats));
  }
  rows.push_back(measure_format(layer, n, k, "spqr:3:g16:s3:z3:b16", OutlierSearch{.percent = 1.0}, 1));
  const std::vector<CudaScaledLayer> layers = {{layer.w(), format_from_spec("uniform:4:g128:asym")}};
  std::vector<double> magnitudes = layer.hessian().diagonal(nullptr);
  for (double& magnitude : magnitudes) magnitude = std::sqrt(magnitude);
  const double search =
      seconds_of(1, [&] { search_channel_scales_cuda(layers, layer.hessian(), magnitudes, {}, nullptr); });
  PackedTensor packed = empty_packed_cuda(layers[0].format, n, k);
  CudaNearestOptions clip;
  clip.hessian = &layer.hessian();
  clip.scale_search = ScaleSearch{.steps = 10, .smallest = 0.55, .output_error = true};
  const double clipping =
      seconds_of(settings.repeats, [&] { round_nearest_cuda(layer.w(), packed, clip, nullptr); });
  std::printf("%6lld x %-6lld AWQ: 20 exponents %.1f ms, clipping and its losses %.1f ms\n",
              static_cast<long long>(n), static_cast<long long>(k), search * 1e3, clipping * 1e3);
  std::fflush(stdout);
  rows.push_back({{"format", "uniform:4:g128:asym"},
                  {"n", n},
                  {"k", k},
                  {"channel_scales_seconds", search},
                  {"clipping_seconds", clipping}});
  return rows;
}

nlohmann::json run(bool quick) {
  Settings settings;
  if (quick) settings = {.repeats = 2, .tokens = 16384};
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("GPTQ on %s, CUDA %s\n", properties.name, cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const std::vector<std::pair<int64_t, int64_t>> shapes =
      quick ? std::vector<std::pair<int64_t, int64_t>>{{4096, 4096}}
            : std::vector<std::pair<int64_t, int64_t>>{{4096, 4096}, {14336, 4096}, {4096, 14336}};
  for (const auto& [n, k] : shapes) report["rows"].push_back(measure(settings, n, k));
  report["formats"] = measure_formats(settings, 4096, 4096);
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_gptq", argc, argv, quantloom::run);
}
