// Products with the format "spqr": which kernel, how its work is dealt, and the product of decoded rows.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/outlier_rows.cuh"
#include "kernels/overlap.cuh"
#include "kernels/spqr_product.hpp"
#include "kernels/stream_plan.hpp"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/trellis_product.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kMaxCluster = 8;
constexpr int kMaxSplits = 64;

constexpr std::string_view kRepeated = "spqr_repeated";

constexpr std::array<CudaProduct, 4> kProducts = {{
    {.name = "spqr_stream",
     .description = "streaming loop with scales and zero points decoded on the way, parts added in a cluster",
     .max_tokens = kSpqrStreamTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = "spqr_partials",
     .description = "the same, parts added in memory",
     .max_tokens = kSpqrStreamTokens,
     .workspace = true},
    {.name = kRepeated,
     .description = "spqr_stream for some tokens at a time",
     .min_tokens = kSpqrStreamTokens + 1,
     .max_tokens = kSpqrRepeatedTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = "decode",
     .description = "decoded once, multiplied by cuBLASLt",
     .float32 = true,
     .workspace = true},
}};

std::optional<std::string> why_not(const CudaProduct& product, const FragmentLayout& layout, int64_t m,
                                   DType dtype, const DeviceFacts& device, const CudaMatmulOptions& options) {
  const std::string name(product.name);
  if (dtype != DType::f16 && dtype != DType::bf16 && !(product.float32 && dtype == DType::f32)) {
    return text_of("kernel ", name, " takes no ", name_of(dtype), " activations");
  }
  if (m < product.min_tokens || (product.max_tokens > 0 && m > product.max_tokens)) {
    return text_of("kernel ", name, " takes ", product.min_tokens, " to ", product.max_tokens,
                   " tokens, not ", m);
  }
  if (product.float32) return std::nullopt;
  if (layout.grid_rows % 16 != 0 && layout.grid_count > 1) {
    return text_of("kernel ", name, " takes blocks of multiples of 16 rows, not of ", layout.grid_rows);
  }
  if (device.code < product.min_architecture || (product.needs_clusters && !device.clusters)) {
    return text_of("kernel ", name, " needs code for, and a device of, compute capability ",
                   product.min_architecture / 10, ".", product.min_architecture % 10, " or later");
  }
  if (product.needs_clusters && options.splits > kMaxCluster) {
    return text_of("kernel ", name, " takes teams of ", kMaxCluster, " blocks of threads at most, not ",
                   options.splits);
  }
  return std::nullopt;
}

// What the streaming loop's time is estimated from, in us: of a stretch of a warp where all warps of a
// processor are at work, and of teams of 1, 2, 4 and 8 blocks of threads, whose parts of sums meet in a
// cluster, or in memory.
constexpr double kStretchTime = 2.0;
constexpr double kTeamTimes[] = {2.0, 2.6, 3.2, 3.5};
constexpr double kMemoryTime = 5.0;

// Deals stretches of 128 columns. Of the teams' sizes (or the given one, `blocks`) the one with the least
// estimated time wins.
StreamDeal stream_deal_of(const FragmentLayout& layout, const DeviceFacts& device, int m, int blocks,
                          bool in_clusters) {
  const int tokens = m == 1 ? 1 : kSpqrStreamTokens;
  const bool few = spqr_few_warps(layout.bits);
  const int warps = stream_warps(tokens, few);
  const int64_t other_bytes = spqr_shared_bytes(tokens, few) + stream_gathered_bytes(tokens, few) + 256;
  const int row_blocks = static_cast<int>(layout.row_blocks);
  const int stretches = static_cast<int>(layout.column_blocks / 2);
  const int group_steps = static_cast<int>(layout.group_columns / fragments::kStepColumns);
  StreamDeal best;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](int team_blocks, double overhead) {
    const bool in_memory = team_blocks > 1 && !in_clusters;
    const int resident =
        in_memory ? std::max(device.processors / team_blocks, 1) : resident_clusters(device, team_blocks);
    int teams = resident;
    int team_warps = team_blocks * warps;
    auto deal = stream_deal(row_blocks, stretches, group_steps, teams, team_blocks, team_warps);
    const auto spare = [&] {
      return device.shared_memory - other_bytes - (in_memory ? 0 : stream_parts_bytes(deal, m));
    };
    while (spare() < 0) {
      if (deal.most_rows() > 1) {
        teams = 2 * deal.teams;
      } else {
        team_warps = std::max(team_warps / 2, 1);
      }
      deal = stream_deal(row_blocks, stretches, group_steps, teams, team_blocks, team_warps);
    }
    const double rounds = std::ceil(static_cast<double>(deal.teams) / resident);
    const auto longest = static_cast<double>(ceil_div(int64_t{deal.most_rows()} * stretches, deal.warps));
    const double cost = rounds * (longest * kStretchTime * warps / 16 + overhead);
    if (cost < least) {
      least = cost;
      deal.spare = spare_for_outliers(spare() - 16, layout.k, m);
      best = deal;
    }
  };
  if (blocks > 0) {
    consider(blocks, 0);
  } else {
    consider(1, kTeamTimes[0]);
    for (int i = 1; in_clusters && i < 4; ++i) consider(1 << i, kTeamTimes[i]);
    if (!in_clusters) consider(device.processors, kMemoryTime);
  }
  return best;
}

using StreamLauncher = void (*)(const ProductLaunch&, bool);
using DecodeLauncher = void (*)(const FragmentMatrix&, bool, int64_t, int64_t, void*, DType, int64_t, bool,
                                cudaStream_t);
constexpr std::array<StreamLauncher, 8> kStreams = {
    &launch_spqr_stream<1>, &launch_spqr_stream<2>, &launch_spqr_stream<3>, &launch_spqr_stream<4>,
    &launch_spqr_stream<5>, &launch_spqr_stream<6>, &launch_spqr_stream<7>, &launch_spqr_stream<8>};
constexpr std::array<DecodeLauncher, 8> kDecoders = {
    &launch_spqr_decode<1>, &launch_spqr_decode<2>, &launch_spqr_decode<3>, &launch_spqr_decode<4>,
    &launch_spqr_decode<5>, &launch_spqr_decode<6>, &launch_spqr_decode<7>, &launch_spqr_decode<8>};

bool wide_parameters(const FragmentLayout& layout) {
  return layout.parameter_bytes > 8;
}

void run_decoded(const FragmentLayout& layout, const ProductLaunch& launch, void* workspace) {
  const FragmentMatrix& w = launch.arguments.w;
  const DecodedPlan plan = decoded_plan(w, launch.arguments.m, launch.dtype, launch.splits);
  const int64_t stride = layout.padded_k();
  for (int64_t first = 0; first < w.n; first += plan.rows) {
    const ProductLaunch part = part_of_rows(launch, first, plan.rows, layout.bits);
    decode_spqr(layout, w, first, part.arguments.w.n, workspace, launch.dtype, stride,
                launch.overlap && first == 0, launch.stream);
    add_outliers_to_decoded(part.arguments.w, workspace, stride, launch.dtype, launch.stream);
    multiply_decoded(part, plan, first == 0, workspace);
  }
}

void run_stream(const FragmentLayout& layout, ProductLaunch launch) {
  launch.arguments.w.column_blocks /= 2;
  kStreams[static_cast<size_t>(layout.bits - 1)](launch, wide_parameters(layout));
}

}  // namespace

std::span<const CudaProduct> spqr_products() {
  return kProducts;
}

SpqrPlan spqr_plan(const FragmentLayout& layout, const FragmentMatrix& w, int64_t m, DType dtype,
                   const DeviceFacts& device, const CudaMatmulOptions& options) {
  if (options.splits < 0 || options.splits > kMaxSplits) {
    throw InvalidArgument("splits", text_of(options.splits), text_of("0 to ", kMaxSplits));
  }
  SpqrPlan plan;
  bool known = options.kernel.empty();
  for (const CudaProduct& product : kProducts) {
    if (!options.kernel.empty() && product.name != options.kernel) continue;
    known = true;
    const auto reason = why_not(product, layout, std::max<int64_t>(m, 1), dtype, device, options);
    if (!reason) {
      plan.product = &product;
      break;
    }
    plan.reason += (plan.reason.empty() ? "" : "; ") + *reason;
  }
  if (!known) throw InvalidArgument("kernel", options.kernel, "a name of the kernel table");
  if (plan.product == nullptr) return plan;
  if (plan.product->float32) {
    plan.workspace = decoded_workspace(w, static_cast<int>(m), dtype);
    return plan;
  }
  const int tokens = static_cast<int>(std::clamp<int64_t>(m, 1, kSpqrStreamTokens));
  plan.deal = stream_deal_of(layout, device, tokens, options.splits, plan.product->needs_clusters);
  if (!plan.product->needs_clusters && plan.deal.blocks > 1) {
    plan.workspace =
        checked_mul(checked_mul(layout.row_blocks, plan.deal.parts), int64_t{stream_part_size(tokens)} * 4);
  }
  return plan;
}

void decode_spqr(const FragmentLayout& layout, const FragmentMatrix& w, int64_t first_row, int64_t rows,
                 void* out, DType dtype, int64_t stride, bool overlap, cudaStream_t stream) {
  kDecoders[static_cast<size_t>(layout.bits - 1)](w, wide_parameters(layout), first_row, rows, out, dtype,
                                                  stride, overlap, stream);
}

void run_spqr(const FragmentLayout& layout, const SpqrPlan& plan, const ProductLaunch& arguments,
              void* workspace) {
  ProductLaunch launch = arguments;
  if (plan.product->float32) {
    return layout.column_blocks == 0 ? launch_bias_alone(launch) : run_decoded(layout, launch, workspace);
  }
  launch.deal = plan.deal;
  if (plan.workspace > 0) launch.arguments.partial = static_cast<float*>(workspace);
  // For kSpqrStreamTokens tokens at a time.
  const ProductArguments& all = arguments.arguments;
  for (int first = 0; first < all.m; first += kSpqrStreamTokens) {
    ProductArguments& p = launch.arguments;
    p.m = std::min(all.m - first, kSpqrStreamTokens);
    p.x = static_cast<const std::byte*>(all.x) + first * all.x_stride * size_of(launch.dtype);
    p.y = static_cast<std::byte*>(all.y) + first * all.y_stride * size_of(launch.dtype);
    run_stream(layout, launch);
  }
}

}  // namespace quantloom::cuda
