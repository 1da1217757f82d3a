// Products with planes of bits: which kernel, how its work is dealt, and its launch.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/bit_plane_launch.hpp"
#include "kernels/bit_plane_product.hpp"
#include "kernels/dense_product.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/trellis_product.hpp"

namespace quantloom::cuda {
namespace {

constexpr std::string_view kStream = "bit_planes";
constexpr std::string_view kRepeated = "bit_planes_repeated";
constexpr int64_t kMostRepeatedTokens = 64;
// Up to so many tokens 16 at a time are faster than decoding first. Measured on an H200.
constexpr int64_t repeated_tokens(int planes) {
  return planes <= 2 ? 48 : planes <= 4 ? 32 : 16;
}
constexpr int kMostClusterBlocks = 8;

constexpr std::array<CudaProduct, 3> kProducts = {{
    {.name = kStream,
     .description = "signs straight to the tensor cores: single bits for one token, else +-1",
     .max_tokens = kMostBitPlaneTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = kRepeated,
     .description = "the same, 16 tokens at a time",
     .min_tokens = kMostBitPlaneTokens + 1,
     .max_tokens = kMostRepeatedTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = "decode",
     .description = "decoded once, multiplied by cuBLASLt",
     .float32 = true,
     .workspace = true},
}};

// What of cuBLASLt's product does not depend on the order of the weights; blocks of 64 columns.
FragmentMatrix dense_matrix(const BitPlaneLayout& layout, const int32_t* source) {
  FragmentMatrix w;
  w.n = layout.n;
  w.k = layout.k;
  w.row_blocks = static_cast<int>(layout.row_blocks);
  w.column_blocks = static_cast<int>(2 * layout.column_blocks);
  w.source = source;
  return w;
}

const int32_t* source_of(const BitPlaneLayout& layout, const PreparedPlanes& w) {
  return layout.gathered ? reinterpret_cast<const int32_t*>(w.plane("source").bytes()) : nullptr;
}

// The least estimated time of teams of 1, 2, 4 and 8 blocks of threads (or of the given number); teams = 0 if
// none has room.
StreamDeal deal_of(const BitPlaneLayout& layout, int m, const DeviceFacts& device, int blocks) {
  // Microseconds, fitted to an H200: of a block of 64 x 128 of each of 16 warps, of a stretch of activations
  // for each of their half warps, and of a team's meeting.
  const double block_time = 0.15 + 0.45 * layout.planes;
  constexpr double kStretch = 0.12;
  constexpr double kMeeting[4] = {0.0, 0.5, 0.7, 0.9};
  const auto group_words = static_cast<int>(layout.group_columns / bit_planes::kWordColumns);
  const bool fine = group_words % 4 != 0 || layout.scale_dtype == DType::f32;
  const int warps = bit_plane_warps(layout.planes, m, fine);
  const int row_blocks = static_cast<int>(layout.row_blocks);
  const int column_blocks = static_cast<int>(layout.column_blocks);
  StreamDeal best;
  best.teams = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 4; ++i) {
    const int size = 1 << i;
    if (blocks > 0 && size != blocks) continue;
    const int resident = resident_clusters(device, size);
    int teams = resident;
    int team_warps = size * warps;
    StreamDeal deal;
    bool fits = false;
    while (!fits) {
      deal = stream_deal(row_blocks, column_blocks, 4, teams, size, team_warps);
      if (m == 1) {
        const StreamRuns& runs = deal.runs[deal.extra > 0 ? 1 : 0];
        const int64_t met = int64_t{std::min(warps, deal.warps)} * (runs.share + (runs.extra > 0 ? 1 : 0));
        deal.stretches = static_cast<int>(std::min<int64_t>(met, column_blocks));
      }
      // The barrier of the parts takes some bytes as well.
      fits = int64_t{deal.stretches} * kBitStretchBytes + stream_parts_bytes(deal, m) + 256 <=
             device.shared_memory;
      if (fits) break;
      if (deal.most_rows() > 1) {
        teams = 2 * deal.teams;
      } else if (team_warps > 1 && m > 1) {
        team_warps /= 2;
      } else {
        break;
      }
    }
    if (!fits) continue;
    const double rounds = std::ceil(static_cast<double>(deal.teams) / resident);
    const auto longest =
        static_cast<double>(ceil_div(int64_t{deal.most_rows()} * column_blocks, int64_t{deal.warps}));
    const double fill = static_cast<double>(ceil_div(deal.stretches, 2 * warps)) * kStretch;
    const double time = rounds * (longest * block_time * warps / 16 + fill + kMeeting[i]);
    if (time < least) {
      least = time;
      best = deal;
    }
  }
  best.by_group = Divider(static_cast<uint32_t>(fine ? group_words : group_words / 4));
  return best;
}

// Why the kernels that stream cannot run, beside the shape, or nothing.
std::optional<std::string> why_no_stream(const CudaProduct& product, int64_t m, DType dtype,
                                         const DeviceFacts& device, const CudaMatmulOptions& options) {
  if (dtype != DType::f16 && dtype != DType::bf16) {
    return text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
  }
  if (m < product.min_tokens || m > product.max_tokens) {
    return text_of("kernel ", product.name, " takes ", product.min_tokens, " to ", product.max_tokens,
                   " tokens, not ", m);
  }
  if (device.code < 90 || !device.clusters) {
    return text_of("kernel ", product.name,
                   " needs compute capability 9.0 and code built for it; this device, of ",
                   device.architecture / 10, ".", device.architecture % 10, ", runs what was built for ",
                   device.code / 10, ".", device.code % 10);
  }
  if (options.splits > kMostClusterBlocks || (options.splits & (options.splits - 1)) != 0) {
    return text_of("kernel ", product.name, " takes teams of 1, 2, 4 or 8 blocks of threads, not ",
                   options.splits);
  }
  return std::nullopt;
}

ProductArguments arguments_of(const CudaMatmulArguments& a) {
  ProductArguments p;
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.bias = a.bias;
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.m = static_cast<int>(a.m);
  return p;
}

void launch_planes(int planes, const BitPlaneLaunch& launch) {
  static constexpr std::array<void (*)(const BitPlaneLaunch&), 8> kLaunchers = {
      launch_bit_planes<1>, launch_bit_planes<2>, launch_bit_planes<3>, launch_bit_planes<4>,
      launch_bit_planes<5>, launch_bit_planes<6>, launch_bit_planes<7>, launch_bit_planes<8>};
  kLaunchers[static_cast<size_t>(planes - 1)](launch);
}

void run_decoded(const BitPlaneLayout& layout, const PreparedPlanes& w, const CudaMatmulArguments& a) {
  ProductLaunch launch;
  launch.arguments = arguments_of(a);
  launch.arguments.w = dense_matrix(layout, source_of(layout, w));
  launch.dtype = a.dtype;
  launch.stream = static_cast<cudaStream_t>(a.stream);
  if (layout.k == 0) return launch_bias_alone(launch);
  const DecodedPlan plan = decoded_plan(launch.arguments.w, launch.arguments.m, a.dtype, 0);
  for (int64_t first = 0; first < layout.n; first += plan.rows) {
    const ProductLaunch part = part_of_rows(launch, first, plan.rows, layout.planes);
    decode_bit_planes(layout, w, first, plan.rows, a.workspace, a.dtype, layout.padded_k(), launch.stream);
    multiply_decoded(part, plan, first == 0, a.workspace);
  }
}

}  // namespace

std::span<const CudaProduct> bit_plane_products() {
  return kProducts;
}

BitPlanePlan bit_plane_plan(const BitPlaneLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                            const CudaMatmulOptions& options) {
  BitPlanePlan plan;
  bool known = options.kernel.empty();
  const bool empty = m == 0 || layout.n == 0 || layout.k == 0;
  for (const CudaProduct& product : kProducts) {
    if (!options.kernel.empty() && product.name != options.kernel) continue;
    known = true;
    if (options.kernel.empty() && product.name == kRepeated && m > repeated_tokens(layout.planes)) continue;
    std::optional<std::string> reason;
    if (product.needs_clusters) {
      reason = why_no_stream(product, std::max<int64_t>(m, 1), dtype, device, options);
      if (!reason && !empty) {
        const auto tokens = static_cast<int>(std::min<int64_t>(m, kMostBitPlaneTokens));
        plan.deal = deal_of(layout, tokens, device, options.splits);
        if (plan.deal.teams == 0) {
          reason = text_of("kernel ", product.name, " has no room for activations of ", layout.k,
                           " columns in shared memory");
        }
      }
    } else if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
      reason = text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
    } else if (!empty) {
      // Gathered activations take memory of their own.
      static constexpr int32_t kSome = 0;
      const FragmentMatrix w = dense_matrix(layout, layout.gathered ? &kSome : nullptr);
      plan.workspace = decoded_workspace(w, static_cast<int>(m), dtype);
    }
    if (!reason) {
      plan.product = &product;
      return plan;
    }
    plan.reason += (plan.reason.empty() ? "" : "; ") + *reason;
  }
  if (!known) {
    throw InvalidArgument("kernel", options.kernel, "a kernel of binary coding of the kernel table");
  }
  return plan;
}

void run_bit_planes(const BitPlaneLayout& layout, const BitPlanePlan& plan, const PreparedPlanes& w,
                    const CudaMatmulArguments& a, const CudaMatmulOptions& options,
                    const DeviceFacts& device) {
  if (layout.k == 0 || plan.product->max_tokens == 0) return run_decoded(layout, w, a);
  BitPlaneLaunch launch;
  ProductArguments& p = launch.arguments;
  p = arguments_of(a);
  p.w.codes = reinterpret_cast<const uint4*>(w.plane("signs").bytes());
  p.w.scales = w.plane("scales").bytes();
  p.w.source = source_of(layout, w);
  p.w.n = layout.n;
  p.w.k = layout.k;
  p.w.row_blocks = static_cast<int>(layout.row_blocks);
  p.w.column_blocks = static_cast<int>(layout.column_blocks);
  p.w.group_count = static_cast<int>(layout.group_count);
  p.w.scale_dtype = layout.scale_dtype;
  p.x_in_pieces = !layout.gathered && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && layout.k % 8 == 0 &&
                  (a.m == 1 || a.x_stride % 8 == 0);
  launch.parameters = layout.parameters();
  launch.group_words = static_cast<int>(layout.group_columns / bit_planes::kWordColumns);
  launch.dtype = a.dtype;
  launch.deal = plan.deal;
  launch.overlap = options.overlap && device.code >= 90;
  p.overlap = launch.overlap;
  launch.stream = static_cast<cudaStream_t>(a.stream);
  const int64_t row_bytes = size_of(a.dtype);
  for (int64_t first = 0; first < a.m; first += kMostBitPlaneTokens) {
    p.m = static_cast<int>(std::min<int64_t>(kMostBitPlaneTokens, a.m - first));
    if (p.m < a.m) launch.deal = deal_of(layout, p.m, device, options.splits);
    p.x = static_cast<const std::byte*>(a.x) + first * a.x_stride * row_bytes;
    p.y = static_cast<std::byte*>(a.y) + first * a.y_stride * row_bytes;
    launch_planes(layout.planes, launch);
  }
}

}  // namespace quantloom::cuda
