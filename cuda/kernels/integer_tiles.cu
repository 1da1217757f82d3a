// The kernels of integer products, and which of them suits.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/integer_product.cuh"

namespace quantloom::cuda {
namespace {

template <bool kOutliers, int kTokens, int kRows, int kParts, int kTiles = 1>
constexpr IntegerKernel kernel_of() {
  using Tile = IntegerTile<kTokens, kRows, kParts, kTiles, kOutliers>;
  return {{kTokens, kRows, kParts, kTiles},
          kOutliers,
          launch_integer_tiles<Tile>,
          resident_integer_clusters<Tile>};
}

template <bool kOutliers>
constexpr std::array<IntegerKernel, 14> kernels_with() {
  return {{
      kernel_of<kOutliers, 256, 2, 1>(),
      kernel_of<kOutliers, 128, 2, 1>(),
      kernel_of<kOutliers, 128, 1, 2>(),
      kernel_of<kOutliers, 128, 1, 3>(),
      kernel_of<kOutliers, 128, 1, 4>(),
      kernel_of<kOutliers, 64, 1, 1>(),
      kernel_of<kOutliers, 64, 1, 1, 2>(),
      kernel_of<kOutliers, 64, 1, 2>(),
      kernel_of<kOutliers, 64, 1, 3>(),
      kernel_of<kOutliers, 64, 1, 4>(),
      kernel_of<kOutliers, 64, 1, 8>(),
      kernel_of<kOutliers, 16, 1, 1>(),
      kernel_of<kOutliers, 16, 1, 2>(),
      kernel_of<kOutliers, 16, 1, 4>(),
  }};
}

constexpr auto kPlain = kernels_with<false>();
constexpr auto kWithOutliers = kernels_with<true>();
constexpr auto kKernels = [] {
  std::array<IntegerKernel, kPlain.size() + kWithOutliers.size()> all{};
  std::ranges::copy(kPlain, all.begin());
  std::ranges::copy(kWithOutliers, all.begin() + kPlain.size());
  return all;
}();

}  // namespace

std::span<const IntegerKernel> integer_kernels() {
  return kKernels;
}

int resident_clusters(const IntegerKernel& kernel, const DeviceFacts& device) {
  static std::mutex mutex;
  static std::map<std::pair<const IntegerKernel*, int>, int> known;
  const std::scoped_lock lock(mutex);
  const auto found = known.find({&kernel, device.index});
  if (found != known.end()) return found->second;
  return known.emplace(std::pair(&kernel, device.index), std::max(kernel.resident(device), 1)).first->second;
}

namespace {

// Microseconds as measured on an H200 (bench_integers --tiles): a block of 128 columns, and a tile besides.
struct TileCost {
  IntegerShape shape;
  double block = 0;
  double tile = 0;
};
constexpr std::array<TileCost, 2> kCosts = {{
    {{256, 2, 1}, 0.72, 1.5},
    {{128, 2, 1}, 0.38, 2},
}};

TileCost cost_of(const IntegerShape& shape, int64_t blocks_running) {
  for (const TileCost& cost : kCosts) {
    if (cost.shape == shape) return cost;
  }
  // Few tokens: what arrives, alone (bound by latency) or where many fetch.
  constexpr double kFetched = 10.4e6;  // bytes that the L2 cache gives in a microsecond
  const double alone = shape.tokens == 128 ? 0.34 : shape.tokens == 64 ? 0.26 : 0.4;
  const double bytes = 128.0 * (128.0 / shape.tiles + shape.tokens) * static_cast<double>(blocks_running);
  const double tile = shape.parts == 1      ? 1.0
                      : shape.tokens == 128 ? 4.6
                      : shape.tokens == 64  ? 0.5 + 0.8 * shape.parts
                                            : 0.5 * shape.parts * shape.parts;
  // Clusters of four leave processors idle, so that more than fit at one to a processor meet on some.
  const double crowded = shape.parts == 4 && blocks_running > 120 ? 3.5 : 0;
  return {shape, std::max(alone, bytes / kFetched), tile + crowded};
}

}  // namespace

int64_t halved_tiles(const IntegerShape& shape, int64_t tiles, int64_t resident) {
  const int64_t last = tiles % resident;
  return shape.tokens == 256 && tiles > resident && 2 * last <= resident ? last : 0;
}

IntegerShape choose_integer_shape(int64_t m, int64_t n, int64_t k, const DeviceFacts& device) {
  constexpr double kFromMemory = 4.2e6;  // bytes in a microsecond
  const double memory = static_cast<double>(n) * static_cast<double>(k) / kFromMemory;
  IntegerShape best;
  double least = std::numeric_limits<double>::infinity();
  for (const IntegerKernel& kernel : kPlain) {
    const IntegerShape& shape = kernel.shape;
    if (!shape.takes(k)) continue;
    const int64_t clusters = ceil_div(ceil_div(n, int64_t{kTileRows}), int64_t{shape.rows}) *
                             ceil_div(m, int64_t{shape.cluster_tokens()});
    const int64_t resident = resident_clusters(kernel, device);
    const int64_t waves = ceil_div(clusters, resident);
    const int64_t blocks = ceil_div(ceil_div(k, int64_t{128}), int64_t{shape.parts});
    const TileCost cost = cost_of(shape, std::min(clusters, resident) * shape.cluster());
    double time = static_cast<double>(waves) * (static_cast<double>(blocks) * cost.block + cost.tile);
    if (halved_tiles(shape, clusters, resident) > 0) time -= 0.45 * static_cast<double>(blocks) * cost.block;
    // Neither bound hides the other entirely.
    const double all = std::cbrt(time * time * time + memory * memory * memory);
    if (all < least) {
      least = all;
      best = shape;
    }
  }
  return best;
}

}  // namespace quantloom::cuda
