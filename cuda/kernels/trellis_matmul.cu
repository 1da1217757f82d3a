// Products with trellis codes: which kernel, how its work is dealt, and its launch.
#include <algorithm>
#include <array>
#include <limits>

#include "formats/trellis_codes.hpp"
#include "kernels/dense_product.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/trellis_choice.hpp"
#include "kernels/trellis_launch.hpp"
#include "kernels/trellis_panel_launch.hpp"
#include "kernels/trellis_product.hpp"
#include "kernels/trellis_tiles.cuh"

namespace quantloom::cuda {
namespace {

constexpr std::string_view kExact = "trellis_exact";
constexpr std::string_view kPanels = "trellis_panels";
constexpr std::string_view kTiles = "trellis_tiles";
constexpr std::string_view kDense = "trellis_dense";
constexpr int kMostClusterBlocks = 8;
// Then decoding the matrix once is faster; of small ones earlier. Measured on an H200.
constexpr int64_t kMostTileTokens = 192;
constexpr int64_t kMostSmallTokens = 64;
constexpr int64_t kSmallMatrix = int64_t{1} << 25;  // weights

constexpr std::array<CudaProduct, 6> kProducts = {{
    {.name = "trellis_stream",
     .description = "hash words through the tensor cores, rotations in the same launch",
     .max_tokens = kMostTrellisTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = kExact,
     .description = "the same with the weights decoded to float16 as the format defines them",
     .max_tokens = kMostTrellisTokens,
     .min_architecture = 90,
     .needs_clusters = true},
    {.name = kPanels,
     .description = "rotated, weights decoded to float16 once in registers, and rotated back",
     .max_tokens = kMostPanelTokens,
     .min_architecture = 90,
     .workspace = true,
     .trellis_bits = "2-4"},
    {.name = kTiles,
     .description = "rotated, tiles through shared memory, wgmma, and rotated back",
     .max_tokens = kMostTileTokens,
     .min_architecture = 90,
     .workspace = true,
     .needs_wgmma = true,
     .trellis_bits = "2-4"},
    {.name = kDense,
     .description = "weights decoded and rotated on the tensor cores once, multiplied by cuBLASLt",
     .workspace = true},
    {.name = "decode",
     .description = "decoded once, multiplied by cuBLASLt",
     .float32 = true,
     .workspace = true},
}};

TrellisWords words_of(const TrellisLayout& layout, bool exact) {
  switch (*trellis_hash(layout)) {
    case TrellisHash::halves:
      return exact ? TrellisWords::exact_halves : TrellisWords::halves;
    case TrellisHash::octagon:
      if (exact) return TrellisWords::exact_octagon;
      return layout.multiplier == trellis::kOctagonMultiplier ? TrellisWords::own_octagon
                                                              : TrellisWords::octagon;
    default:
      if (exact) return TrellisWords::exact_bytes;
      return layout.code == TrellisCode::mul1 && layout.multiplier == trellis::kExl3Mul1
                 ? TrellisWords::exl3_bytes
                 : TrellisWords::bytes;
  }
}

TrellisLauncher launcher_of(const TrellisLayout& layout, bool exact) {
  const TrellisWords words = words_of(layout, exact);
  switch (layout.bits()) {
    case 1:
      return trellis_launcher<1>(words);
    case 2:
      return trellis_launcher<2>(words);
    case 3:
      return trellis_launcher<3>(words);
    case 4:
      return trellis_launcher<4>(words);
    case 5:
      return trellis_launcher<5>(words);
    case 6:
      return trellis_launcher<6>(words);
    case 7:
      return trellis_launcher<7>(words);
    default:
      return trellis_launcher<8>(words);
  }
}

// The most warps of a block that meet one row of its pieces.
int parts_of(const TrellisDeal& deal, int warps) {
  int most = 1;
  for (const int rows : {2 * deal.bands, 2 * deal.most_bands()}) {
    for (const int columns : {2 * deal.spans, 2 * deal.most_spans()}) {
      most = std::max(most, most_parts(rows, columns, warps));
    }
  }
  return most;
}

struct StreamedDeal {
  TrellisDeal deal;
  bool in_memory = false;  // teams are no clusters
};

// Deals the work to clusters of each size (or of the given one), or to teams of any size whose sums meet in
// memory, and takes the deal of least estimated time; teams = 0 if none has room. How many clusters run at a
// time depends on how many processors each part of the device has left.
StreamedDeal deal_of(const TrellisLayout& layout, int m, const DeviceFacts& device, int blocks,
                     int (*memory)(const TrellisDeal&)) {
  const int bands = static_cast<int>(layout.row_blocks / 2);
  const int spans = static_cast<int>(layout.column_blocks / 2);
  StreamedDeal best;
  best.deal.teams = 0;
  double least = std::numeric_limits<double>::infinity();
  // Microseconds, fitted to an H200. For sums of one block of threads, those that meet in a cluster and those
  // that meet in memory, and for each block of a team; for a piece of 16 warps; for the digits of a chunk of
  // each warp, and each of its spans.
  constexpr double kAlone = 0.4;
  constexpr double kMeeting = 0.9;
  constexpr double kMeetingInMemory = 1.9;
  constexpr double kBlock = 0.1;
  constexpr double kChunk = 0.35;
  constexpr double kSpan = 0.1;
  const double piece = layout.ring.weights_per_step == 2 ? 0.85 : 1.35;
  // True if the deal has room.
  const auto consider = [&](int size, int teams, int resident, double meeting, bool in_memory) {
    TrellisDeal deal(bands, spans, teams, size, 4);
    if (deal.most_chunks() * m < kTrellisWarps) deal.chunk = 1;
    deal.parts = parts_of(deal, kTrellisWarps);
    if (memory(deal) > device.shared_memory) return false;
    const auto rounds = static_cast<double>(ceil_div(teams, resident));
    const auto longest =
        static_cast<double>(ceil_div(4 * deal.most_bands() * deal.most_spans(), kTrellisWarps));
    const auto chunks = static_cast<double>(ceil_div(deal.most_chunks() * m, kTrellisWarps));
    const double time = rounds * (longest * piece + chunks * (kChunk + kSpan * deal.chunk) + meeting);
    if (time < least) {
      least = time;
      best = {deal, in_memory};
    }
    return true;
  };
  for (int size = 1; size <= kMostClusterBlocks; ++size) {
    if (blocks > 0 && size != blocks) continue;
    const int resident = resident_clusters(device, size);
    const double meeting = size == 1 ? kAlone : kMeeting + kBlock * size;
    int teams = std::min(resident, bands);
    while (!consider(size, teams, resident, meeting, false) && teams < bands) {
      teams = std::min(2 * teams, bands);
    }
  }
  for (int size = 2; blocks == 0 && size <= std::min(spans, device.processors); ++size) {
    const int resident = device.processors / size;
    const double meeting = kMeetingInMemory + kBlock * size;
    static_cast<void>(consider(size, std::min(resident, bands), resident, meeting, true));
  }
  return best;
}

// Why the kernels that stream cannot run, beside the shape, or nothing.
std::optional<std::string> why_no_stream(const CudaProduct& product, const TrellisLayout& layout, int64_t m,
                                         DType dtype, const DeviceFacts& device,
                                         const CudaMatmulOptions& options) {
  if (!trellis_hash(layout)) {
    return text_of("kernel ", product.name,
                   " takes 3inst, mcg, mul1, 1mad and octagon of whole bits with windows of 16");
  }
  if (product.name == kExact && layout.code == TrellisCode::one_mad) {
    return text_of("kernel ", product.name, " takes no 1mad, whose weights are no float16 sums");
  }
  if (dtype != DType::f16 && dtype != DType::bf16) {
    return text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
  }
  if (m > product.max_tokens) {
    return text_of("kernel ", product.name, " takes 1 to ", product.max_tokens, " tokens, not ", m);
  }
  if (device.code < 90 || !device.clusters) {
    return text_of("kernel ", product.name,
                   " needs compute capability 9.0 and code built for it; this device, of ",
                   device.architecture / 10, ".", device.architecture % 10, ", runs what was built for ",
                   device.code / 10, ".", device.code % 10);
  }
  if (options.splits > kMostClusterBlocks) {
    return text_of("kernel ", product.name, " takes teams of 1 to ", kMostClusterBlocks,
                   " blocks of threads, not ", options.splits);
  }
  return std::nullopt;
}

// Why the kernels for more tokens cannot run, or nothing.
std::optional<std::string> why_no_tiles(const CudaProduct& product, const TrellisLayout& layout, int64_t m,
                                        DType dtype, const DeviceFacts& device) {
  if (product.name != kDense && (!has_exact_words(layout) || layout.bits() < 2 || layout.bits() > 4)) {
    return text_of("kernel ", product.name,
                   " takes 3inst, mcg, mul1 and octagon of 2, 3 or 4 bits with windows of 16");
  }
  if (dtype != DType::f16 && dtype != DType::bf16) {
    return text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
  }
  if (product.max_tokens > 0 && m > product.max_tokens) {
    return text_of("kernel ", product.name, " takes 1 to ", product.max_tokens, " tokens, not ", m);
  }
  if (product.name == kTiles && layout.column_blocks > 1024) {
    return text_of("kernel ", product.name, " takes up to 65536 columns, not ", layout.k);
  }
  if (product.needs_wgmma ? !runs_wgmma() : device.code < product.min_architecture) {
    return text_of("kernel ", product.name, " needs a device of compute capability 9.0 and a build for it");
  }
  return std::nullopt;
}

// Deals the work of the panels to teams of any size; teams = 0 if none has room.
TrellisDeal panel_deal(const TrellisLayout& layout, int m, const DeviceFacts& device) {
  const int groups = m <= 8 ? 1 : 2;
  const int warps = panel_warps(groups);
  const int bands = static_cast<int>(layout.row_blocks / 2);
  const int spans = static_cast<int>(layout.column_blocks / 2);
  TrellisDeal best;
  best.teams = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int blocks = 1; blocks <= std::min(spans, device.processors); ++blocks) {
    const TrellisDeal deal(bands, spans, std::clamp(device.processors / blocks, 1, bands), blocks, 4);
    if (panel_memory(deal, groups) > device.shared_memory) continue;
    const auto pieces = ceil_div(4 * deal.most_bands() * deal.most_spans(), warps);
    // In pieces of a warp: the parts of more blocks take longer to add.
    const double time = static_cast<double>(pieces) + 0.2 * blocks;
    if (time < least) {
      least = time;
      best = deal;
    }
  }
  if (best.teams > 0) best.parts = parts_of(best, warps);
  return best;
}

// Where things lie in the workspace of the panels, from `memory` on, and its bytes.
int64_t panel_workspace(const TrellisLayout& layout, const TrellisDeal& deal, int m, unsigned char* memory,
                        TrellisPanelWork& work) {
  const int64_t tokens = m <= 8 ? 8 : 16;
  const int64_t units = aligned_bytes(layout.column_blocks * tokens * 128);
  const int64_t parts = units + aligned_bytes(int64_t{deal.blocks} * deal.most_chunks() * tokens * 4);
  work.activations = memory;
  work.units = reinterpret_cast<float*>(memory + units);
  work.parts = reinterpret_cast<float*>(memory + parts);
  return parts + checked_mul(layout.row_blocks * deal.blocks * deal.parts, tokens * 256);
}

// The matrix as the tile loop sees it: sums of all rows, also those of padding.
FragmentMatrix tile_matrix(const TrellisLayout& layout) {
  FragmentMatrix w;
  w.n = 64 * layout.row_blocks;
  w.k = 64 * layout.column_blocks;
  w.row_blocks = static_cast<int>(layout.row_blocks);
  w.column_blocks = static_cast<int>(layout.column_blocks);
  w.group_steps = 4 * w.column_blocks;
  w.table_entries =
      static_cast<int>(layout.code == TrellisCode::lcg ? trellis::kLcgMultiplier : layout.multiplier);
  return w;
}

// What of cuBLASLt's product does not depend on the order of the weights.
FragmentMatrix dense_matrix(const TrellisLayout& layout) {
  FragmentMatrix w;
  w.n = layout.n;
  w.k = layout.k;
  w.row_blocks = static_cast<int>(layout.row_blocks);
  w.column_blocks = static_cast<int>(layout.column_blocks);
  return w;
}

// Where things lie in the workspace of the tile loop, from `memory` on, and its bytes.
int64_t tile_workspace(const TrellisLayout& layout, int m, unsigned char* memory, TrellisTileWork& work) {
  const FragmentMatrix w = tile_matrix(layout);
  const int64_t factors = aligned_bytes(checked_mul(int64_t{2} * m, w.n));
  const int64_t tiles = factors + aligned_bytes(int64_t{4} * m);
  work.sums = reinterpret_cast<__half*>(memory);
  work.factors = reinterpret_cast<float*>(memory + factors);
  work.row_blocks = w.row_blocks;
  ProductLaunch launch;
  launch.arguments.w = w;
  launch.arguments.m = m;
  launch.splits = 0;
  work.tiles = tile_work(launch, memory + tiles);
  return tiles + tiles_workspace(w, m, 0);
}

// As many bands of 128 rows at a time as decoded_plan() has blocks of 64, or one more.
DecodedPlan dense_plan(const TrellisLayout& layout, int m, DType dtype) {
  DecodedPlan plan = decoded_plan(dense_matrix(layout), m, dtype, 0);
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  plan.rows = checked_pad(plan.rows, kTrellisBand);
  plan.bias = aligned_bytes(plan.rows * layout.column_blocks * 64 * size);
  plan.gathered = plan.bias + aligned_bytes(plan.rows * size);
  plan.library = plan.gathered;
  plan.bytes = plan.library + kLibraryBytes;
  return plan;
}

// decode(first row, rows) makes those rows in the workspace.
template <class Decode>
void multiply_rows(const TrellisLayout& layout, const CudaMatmulArguments& a, const Decode& decode) {
  ProductLaunch launch;
  ProductArguments& p = launch.arguments;
  p.w = dense_matrix(layout);
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.bias = a.bias;
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.m = static_cast<int>(a.m);
  launch.dtype = a.dtype;
  launch.stream = static_cast<cudaStream_t>(a.stream);
  if (layout.k == 0) return launch_bias_alone(launch);
  const DecodedPlan plan = dense_plan(layout, p.m, a.dtype);
  for (int64_t first = 0; first < layout.n; first += plan.rows) {
    const ProductLaunch part = part_of_rows(launch, first, plan.rows, layout.bits());
    decode(first, plan.rows);
    multiply_decoded(part, plan, first == 0, a.workspace);
  }
}

void run_panels(const TrellisLayout& layout, const TrellisLaunch& launch, unsigned char* workspace) {
  TrellisPanelLaunch panels{launch.product, launch.deal, {}, launch.stream};
  static_cast<void>(panel_workspace(layout, launch.deal, launch.product.m, workspace, panels.work));
  launch_panel_activations(panels);
  with_trellis_code<2, 4>(
      layout, [&]<int kBits, TrellisHash kHash>() { launch_trellis_panels<kBits, kHash>(panels); });
  launch_panel_sums(panels);
}

void run_tiles(const TrellisLayout& layout, const TrellisLaunch& launch, unsigned char* workspace) {
  const TrellisProduct& p = launch.product;
  TrellisTileWork work;
  static_cast<void>(tile_workspace(layout, p.m, workspace, work));
  ProductLaunch tiles;
  tiles.arguments.w = tile_matrix(layout);
  tiles.arguments.w.codes = p.codes;
  tiles.arguments.y = work.sums;
  tiles.arguments.y_stride = tiles.arguments.w.n;
  tiles.arguments.m = p.m;
  tiles.stream = launch.stream;
  launch_trellis_rotate_in(p, work, launch.overlap, launch.stream);
  with_trellis_code<2, 4>(
      layout, [&]<int kBits, TrellisHash kHash>() { launch_trellis_tiles<kBits, kHash>(tiles, work.tiles); });
  launch_trellis_rotate_out(p, work, launch.stream);
}

}  // namespace

std::span<const CudaProduct> trellis_products() {
  return kProducts;
}

TrellisPlan trellis_plan(const TrellisLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                         const CudaMatmulOptions& options) {
  TrellisPlan plan;
  bool known = options.kernel.empty();
  for (const CudaProduct& product : kProducts) {
    if (options.kernel.empty() ? product.name == kExact : product.name != options.kernel) continue;
    known = true;
    if (options.kernel.empty() && product.name == kTiles && m > kMostSmallTokens &&
        layout.n * layout.k <= kSmallMatrix) {
      continue;
    }
    std::optional<std::string> reason;
    if (product.needs_clusters) {
      reason = why_no_stream(product, layout, m, dtype, device, options);
      if (!reason && layout.n > 0 && layout.k > 0) {
        const TrellisLauncher launcher = launcher_of(layout, product.name == kExact);
        const StreamedDeal dealt = deal_of(layout, static_cast<int>(std::max<int64_t>(m, 1)), device,
                                           options.splits, launcher.memory[m > 1 ? 1 : 0]);
        plan.deal = dealt.deal;
        plan.workspace = 0;
        if (dealt.in_memory) {
          plan.workspace = checked_mul(layout.row_blocks / 2 * dealt.deal.blocks,
                                       int64_t{512} * (m > 1 ? kMostTrellisTokens : 1));
        }
        if (plan.deal.teams == 0) {
          reason = text_of("kernel ", product.name, " has no room for the activations of ", m, " tokens of ",
                           layout.k, " columns in shared memory");
        }
      }
    } else if (product.name == kPanels) {
      reason = why_no_tiles(product, layout, m, dtype, device);
      if (!reason && m > 0 && layout.n > 0 && layout.k > 0) {
        plan.deal = panel_deal(layout, static_cast<int>(m), device);
        if (plan.deal.teams == 0) {
          reason = text_of("kernel ", product.name, " has no room for activations of ", layout.k, " columns");
        } else {
          TrellisPanelWork work;
          plan.workspace = panel_workspace(layout, plan.deal, static_cast<int>(m), nullptr, work);
        }
      }
    } else if (product.name == kTiles || product.name == kDense) {
      reason = why_no_tiles(product, layout, m, dtype, device);
      if (!reason && m > 0 && layout.n > 0 && layout.k > 0) {
        TrellisTileWork work;
        plan.workspace = product.name == kTiles ? tile_workspace(layout, static_cast<int>(m), nullptr, work)
                                                : dense_plan(layout, static_cast<int>(m), dtype).bytes;
      }
    } else if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
      reason = text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
    } else if (m > 0 && layout.n > 0 && layout.k > 0) {
      plan.workspace = dense_plan(layout, static_cast<int>(m), dtype).bytes;
    }
    if (!reason) {
      plan.product = &product;
      return plan;
    }
    plan.reason += (plan.reason.empty() ? "" : "; ") + *reason;
  }
  if (!known)
    throw InvalidArgument("kernel", options.kernel, "a kernel of trellis codes of the kernel table");
  return plan;
}

void run_trellis(const TrellisLayout& layout, const TrellisPlan& plan, const PreparedPlanes& w,
                 const CudaMatmulArguments& a, const CudaMatmulOptions& options, const DeviceFacts& device) {
  const bool dense = plan.product->name == kDense;
  if ((plan.product->max_tokens == 0 && !dense) || layout.k == 0) {
    return multiply_rows(layout, a, [&](int64_t first, int64_t rows) {
      decode_trellis(layout, w, first, rows, a.workspace, a.dtype, layout.column_blocks * 64,
                     static_cast<cudaStream_t>(a.stream));
    });
  }
  const bool tiles = plan.product->name == kTiles;
  const bool panels = plan.product->name == kPanels;
  const bool exact = tiles || panels || dense || plan.product->name == kExact;
  TrellisLaunch launch;
  TrellisProduct& p = launch.product;
  p.codes = reinterpret_cast<const uint4*>(w.plane("codes").bytes());
  p.input_scales = reinterpret_cast<const __half*>(w.plane("input_scales").bytes());
  p.output_scales = reinterpret_cast<const __half*>(w.plane("output_scales").bytes());
  p.map = trellis_map(layout, exact);
  p.rotated = layout.rotated;
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.column_pieces = static_cast<int>(layout.column_blocks);
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.bias = a.bias;
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.m = static_cast<int>(a.m);
  p.bfloat16 = a.dtype == DType::bf16;
  p.x_in_fours = reinterpret_cast<uintptr_t>(a.x) % 8 == 0 && (a.m == 1 || a.x_stride % 4 == 0);
  launch.stream = static_cast<cudaStream_t>(a.stream);
  if (dense) {
    return multiply_rows(layout, a, [&](int64_t first, int64_t rows) {
      decode_trellis_rounded(layout, w, first, rows, a.workspace, a.dtype, layout.column_blocks * 64,
                             launch.stream);
    });
  }
  launch.overlap = options.overlap && device.code >= 90;
  if (tiles) return run_tiles(layout, launch, static_cast<unsigned char*>(a.workspace));
  launch.deal = plan.deal;
  if (panels) return run_panels(layout, launch, static_cast<unsigned char*>(a.workspace));
  if (plan.workspace > 0) p.partial = static_cast<float*>(a.workspace);
  p.overlap = launch.overlap;
  launcher_of(layout, exact).launch[a.m > 1 ? 1 : 0](launch);
}

}  // namespace quantloom::cuda
