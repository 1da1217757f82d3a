// The kernels of integer products, and which of them suits.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "kernels/integer_product.cuh"

namespace quantloom::cuda {
namespace {

template <int kTokens, int kRows, int kColumns, int kParts, bool kOutliers>
constexpr IntegerKernel kernel_of() {
  using Tile = IntegerTile<kTokens, kRows, kColumns, kParts, kOutliers>;
  return {{kTokens, kRows, kColumns, kParts},
          kOutliers,
          launch_integer_tiles<Tile>,
          resident_integer_clusters<Tile>};
}

template <bool kOutliers>
constexpr std::array<IntegerKernel, 14> kernels_with() {
  return {{
      kernel_of<256, 2, 1, 1, kOutliers>(),
      kernel_of<256, 2, 2, 1, kOutliers>(),
      kernel_of<128, 2, 2, 1, kOutliers>(),
      kernel_of<128, 2, 1, 1, kOutliers>(),
      kernel_of<128, 1, 1, 2, kOutliers>(),
      kernel_of<128, 1, 1, 4, kOutliers>(),
      kernel_of<64, 1, 1, 1, kOutliers>(),
      kernel_of<64, 1, 1, 2, kOutliers>(),
      kernel_of<64, 1, 1, 4, kOutliers>(),
      kernel_of<64, 1, 1, 8, kOutliers>(),
      kernel_of<16, 1, 1, 1, kOutliers>(),
      kernel_of<16, 1, 1, 2, kOutliers>(),
      kernel_of<16, 1, 1, 4, kOutliers>(),
      kernel_of<16, 1, 1, 8, kOutliers>(),
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

// Cycles of a processor, from what bounds each tile: its products, or what it fetches.
IntegerShape choose_integer_shape(int64_t m, int64_t n, int64_t k, const DeviceFacts& device) {
  constexpr double kProducts = 4096;        // multiplications of a processor in a cycle
  constexpr double kFetched = 32;           // bytes that reach it from the L2 cache in a cycle
  constexpr double kFromMemory = 20;        // and from memory, where all fetch
  constexpr double kTileCycles = 1500;      // to begin and to finish a tile
  constexpr double kExchangeCycles = 1500;  // to add up parts
  IntegerShape best;
  double least = std::numeric_limits<double>::infinity();
  for (const IntegerKernel& kernel : kPlain) {
    const IntegerShape& shape = kernel.shape;
    const int64_t clusters = ceil_div(ceil_div(n, int64_t{kTileRows}), int64_t{shape.rows}) *
                             ceil_div(m, int64_t{shape.tokens} * shape.columns);
    const int64_t resident = device.processors / shape.cluster() * (shape.tokens == 16 ? 2 : 1);
    const double waves = static_cast<double>(ceil_div(clusters, std::max<int64_t>(resident, 1)));
    const double blocks = static_cast<double>(ceil_div(ceil_div(k, int64_t{128}), int64_t{shape.parts}));
    const double share = shape.tokens == 16 && clusters > resident / 2 ? 2 : 1;  // of a processor
    const double products = 128.0 * 128 * shape.tokens / kProducts;
    const double bytes = 128.0 * (128.0 / shape.columns + static_cast<double>(shape.tokens) / shape.rows);
    const double cycles = waves * (blocks * share * std::max(products, bytes / kFetched) + kTileCycles +
                                   8.0 * shape.tokens + (shape.parts > 1 ? kExchangeCycles : 0));
    const double memory = static_cast<double>(n) * static_cast<double>(k) / (kFromMemory * device.processors);
    const double all = std::max(cycles, memory + kTileCycles);
    if (all < least) {
      least = all;
      best = shape;
    }
  }
  return best;
}

}  // namespace quantloom::cuda
