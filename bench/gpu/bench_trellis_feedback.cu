// Quantizing the linear layers of a model to a trellis on the device, and where the time goes.
//
// The layers are those of a Llama of 8 billion parameters, 32 blocks of them. Each is rounded with error
// feedback (round_trellis_feedback_cuda() without losses), the second run counts: with the ratio given, with
// the ratio tried (as it is below 3 bits unless told otherwise), and along rows and columns at once. Beside
// that, on their own: the factor of the Hessian, and the search of all rings in batches as the walk has them.
// What is left of the first is scales, rotations, updates, decoding and launches.
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/layer.cuh"
#include "gpu/program.hpp"
#include "quantloom/formats/trellis_cuda.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "rounding/upper_factor.hpp"

namespace quantloom {
namespace {

using bench::seconds_of;
using cuda::DeviceBuffer;

constexpr int kBlocks = 32;

struct LayerKind {
  const char* name;
  int64_t n;
  int64_t k;
  int count;  // in a block
};

constexpr LayerKind kKinds[] = {
    {"q, o", 4096, 4096, 2}, {"k, v", 1024, 4096, 2}, {"gate, up", 14336, 4096, 2}, {"down", 4096, 14336, 1}};

struct Split {
  double all = 0;
  double tried = 0;
  double two_sided = 0;
  double search = 0;
  double factor = 0;

  void add(double times, const Split& other) {
    all += times * other.all;
    tried += times * other.tried;
    two_sided += times * other.two_sided;
    search += times * other.search;
    factor += times * other.factor;
  }
};

Split measure(const LayerKind& kind, const std::shared_ptr<const Trellis>& format) {
  const bench::Layer layer(kind.n, kind.k, 16384);
  const CudaHessian& hessian = layer.hessian();
  PackedTensor packed = empty_packed_cuda(format, kind.n, kind.k);
  CudaErrorFeedbackOptions options;
  options.measure_losses = false;
  Split split;
  const auto seconds = [&](const std::vector<double>& factors) {
    const TrellisFeedbackOptions choices{true, true, true, factors};
    return seconds_of(
        1, [&] { round_trellis_feedback_cuda(layer.w(), packed, hessian, options, choices, nullptr); });
  };
  split.all = seconds({0.96});
  split.tried = seconds({0.75, 0.85, 0.95, 1.05});
  {
    const bench::Layer outputs(16, kind.n, 16384);
    options.output_hessian = &outputs.hessian();
    split.two_sided = seconds({0.96});
    options.output_hessian = nullptr;
  }

  const std::vector<double> diagonal = hessian.diagonal(nullptr);
  std::vector<int32_t> order;
  for (int64_t c = 0; c < kind.k; ++c) order.push_back(static_cast<int32_t>(c));
  DeviceBuffer<int32_t> device_order(kind.k, nullptr);
  device_order.upload(order.data(), kind.k);
  split.factor = seconds_of(1, [&] {
    const cuda::UpperFactor upper(hessian, diagonal, device_order.data(), options.damping,
                                  options.damping_ladder, nullptr);
  });

  const CudaTrellisCodebook codebook(format->codebook);
  const DeviceBuffer<float> targets(kind.n * 16, nullptr);
  gather_tiles_cuda({layer.w().data, DType::f16, kind.n, 16, kind.k}, 50, targets.data(), nullptr);
  CudaRings rings;
  rings.targets = targets.data();
  rings.count = kind.n / 16;
  rings.shape = format->shape();
  rings.words = reinterpret_cast<uint32_t*>(packed.planes.at("codes").bytes());
  const int64_t bytes = trellis_workspace_cuda(rings.shape, TrellisSearch::normal, rings.count).fast_bytes;
  const auto workspace = bench::device_memory(bytes);
  split.search = seconds_of(1, [&] {
    for (int64_t step = 0; step < kind.k / 16; ++step) {
      encode_rings_cuda(codebook, rings, TrellisSearch::normal, workspace.get(), bytes, nullptr);
    }
  });
  std::printf(
      "  %-9s %5lld x %5lld %8.3f s, %6.1f M weights/s; search %7.3f s, factor %6.3f s; ratio tried %7.3f s, "
      "two-sided %7.3f s\n",
      kind.name, static_cast<long long>(kind.n), static_cast<long long>(kind.k), split.all,
      static_cast<double>(kind.n * kind.k) / split.all * 1e-6, split.search, split.factor, split.tried,
      split.two_sided);
  std::fflush(stdout);
  return split;
}

nlohmann::json as_json(const Split& split) {
  return {{"seconds", split.all},
          {"search_seconds", split.search},
          {"factor_seconds", split.factor},
          {"ratio_tried_seconds", split.tried},
          {"two_sided_seconds", split.two_sided}};
}

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("error feedback to trellises on %s, CUDA %s\n", properties.name,
              cuda_toolkit_version().c_str());
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"formats", nlohmann::json::array()}};
  const auto specs = quick ? std::vector<std::string>{"trellis:3:mul1", "trellis:3:octagon"}
                           : std::vector<std::string>{"trellis:2:mul1", "trellis:3:mul1", "trellis:4:mul1",
                                                      "trellis:3:octagon"};
  for (const std::string& spec : specs) {
    const auto format = std::dynamic_pointer_cast<const Trellis>(format_from_spec(spec));
    std::printf("%s\n", spec.c_str());
    nlohmann::json rows = nlohmann::json::array();
    Split sum;
    for (const LayerKind& kind : kKinds) {
      const Split split = measure(kind, format);
      sum.add(kBlocks * kind.count, split);
      nlohmann::json row = as_json(split);
      row.update({{"layer", kind.name}, {"n", kind.n}, {"k", kind.k}, {"count", kind.count}});
      rows.push_back(row);
    }
    std::printf(
        "  %d blocks: %.1f s, of it search %.1f s, factors %.1f s, the rest %.1f s; "
        "ratio tried %.1f s, two-sided %.1f s\n",
        kBlocks, sum.all, sum.search, sum.factor, sum.all - sum.search - sum.factor, sum.tried,
        sum.two_sided);
    report["formats"].push_back({{"format", spec}, {"rows", rows}, {"model", as_json(sum)}});
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_trellis_feedback", argc, argv, quantloom::run);
}
