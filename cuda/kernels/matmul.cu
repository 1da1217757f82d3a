// matmul_cuda(): checks the arguments, picks a kernel, launches it.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "common/device.hpp"
#include "formats/sum_order.hpp"
#include "kernels/additive_product.hpp"
#include "kernels/bit_plane_product.hpp"
#include "kernels/cuda_products.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/launchers.hpp"
#include "kernels/lookups.hpp"
#include "kernels/outlier_rows.cuh"
#include "kernels/overlap.cuh"
#include "kernels/product_memory.hpp"
#include "kernels/products.cuh"
#include "kernels/spqr_fragments.hpp"
#include "kernels/spqr_product.hpp"
#include "kernels/stream_plan.hpp"
#include "kernels/tile_support.cuh"
#include "kernels/trellis_product.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {
namespace {

// Fills a processor.
__global__ void __launch_bounds__(512, 1) occupy() {}

}  // namespace

namespace cuda {

int resident_clusters(const DeviceFacts& device, int size) {
  if (size == 1) return device.processors;
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const std::scoped_lock lock(mutex);
  const auto [place, is_new] = known.try_emplace({device.index, size}, 0);
  if (is_new) {
    check_cuda(
        cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory),
        "shared memory of a processor");
    const auto blocks = static_cast<unsigned>(device.processors / size * size);
    LaunchSettings settings(dim3(std::max(blocks, static_cast<unsigned>(size))), dim3(512), nullptr, false,
                            size);
    settings.config.dynamicSmemBytes = static_cast<size_t>(device.shared_memory);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&place->second, occupy, &settings.config);
    if (error != cudaSuccess) known.erase(place);
    check_cuda(error, "clusters that run at the same time");
  }
  return std::max(place->second, 1);
}

}  // namespace cuda

namespace {

using cuda::ProductArguments;
using cuda::ProductLaunch;

constexpr int kMaxCluster = 8;
constexpr int kMaxSplits = 64;
// From so many tokens on, decoding the matrix once and multiplying with cuBLASLt is faster than the tile
// loop: measured, see bench/RESULTS.md. Small matrices do not fill the tile loop.
constexpr int64_t kDecodeFromTokens = 256;
constexpr int64_t kDecodeFromTokensIfSmall = 64;
constexpr int64_t kSmallWeights = int64_t{1} << 25;

constexpr std::string_view kRepeated = "stream_repeated";

constexpr std::array<CudaProduct, 7> kProducts = {{
    {.name = cuda::kLookups,
     .description = "products of inputs and table entries, looked up by codes",
     .max_tokens = 1,
     .workspace = true,
     .all_formats = true,
     .plain = false},
    {.name = "stream",
     .description = "streaming loop, parts added in a cluster",
     .max_tokens = cuda::kMaxStreamTokens,
     .min_architecture = 90,
     .needs_clusters = true,
     .all_formats = true},
    {.name = "stream_partials",
     .description = "streaming loop, parts added in memory",
     .max_tokens = cuda::kMaxStreamTokens,
     .workspace = true,
     .all_formats = true},
    {.name = "tiles_wgmma",
     .description = "tiles through shared memory, wgmma",
     .min_architecture = 90,
     .workspace = true,
     .needs_wgmma = true},
    {.name = "tiles", .description = "tiles through shared memory, mma.sync", .workspace = true},
    {.name = kRepeated,
     .description = "streaming loop, 16 tokens at a time",
     .min_tokens = cuda::kMaxStreamTokens + 1,
     .max_tokens = cuda::kMostRepeatedTokens,
     .min_architecture = 90,
     .needs_clusters = true,
     .all_formats = true,
     .plain = false},
    {.name = "decode",
     .description = "decoded once, multiplied by cuBLASLt",
     .float32 = true,
     .workspace = true,
     .all_formats = true},
}};

// What kernels ask of a format.
struct Kind {
  bool plain = true;     // scalar codes without outliers
  bool tiled = true;     // the tile loops have a decoder
  bool streamed = true;  // the streaming loop has one
  int repeated_tokens = 0;
  bool looked_up = false;  // "lookups" takes it
  int lookup_bytes = 0;    // of shared memory
};

// Why `product` cannot run, or nothing.
std::optional<std::string> why_not(const CudaProduct& product, Kind kind, int64_t m, DType dtype,
                                   const DeviceFacts& device, const CudaMatmulOptions& options) {
  const std::string name(product.name);
  if (product.name == cuda::kLookups) {
    if (!kind.looked_up) {
      return text_of(
          "kernel ", name,
          " takes vectors of 4 or 8 weights with codes of 8 bits, one scale for a row, and no outliers");
    }
    if (kind.lookup_bytes > device.shared_memory) {
      return text_of("kernel ", name, " needs ", kind.lookup_bytes,
                     " bytes of shared memory, this device has ", device.shared_memory);
    }
  }
  if (!kind.tiled && !product.all_formats) {
    return text_of("kernel ", name, " takes no outliers, and of vectors those with codes of 8 bits");
  }
  if (kind.plain && !product.plain) {
    return text_of("kernel ", name, " takes vector codebooks and outliers alone");
  }
  if (!kind.streamed && product.max_tokens > 0) {
    return text_of("kernel ", name, " takes no vector codebooks of so many or so large tables");
  }
  if (dtype != DType::f16 && dtype != DType::bf16 && !(product.float32 && dtype == DType::f32)) {
    return text_of("kernel ", name, " takes no ", name_of(dtype), " activations");
  }
  if (m < product.min_tokens || (product.max_tokens > 0 && m > product.max_tokens)) {
    return text_of("kernel ", name, " takes ", product.min_tokens, " to ", product.max_tokens,
                   " tokens, not ", m);
  }
  if (product.min_architecture > 80 && device.code < product.min_architecture) {
    return text_of("kernel ", name, " needs code for compute capability ", product.min_architecture / 10, ".",
                   product.min_architecture % 10, "; this device, of ", device.architecture / 10, ".",
                   device.architecture % 10, ", runs what was built for ", device.code / 10, ".",
                   device.code % 10);
  }
  if (device.architecture < product.min_architecture || (product.needs_clusters && !device.clusters)) {
    return text_of("kernel ", name, " needs compute capability ", product.min_architecture / 10, ".",
                   product.min_architecture % 10, ", this device has ", device.architecture / 10, ".",
                   device.architecture % 10);
  }
  if (product.needs_wgmma && !cuda::runs_wgmma()) {
    return text_of("kernel ", name, " needs a device of compute capability 9.0 and a build for sm_90a");
  }
  if (product.needs_clusters && options.splits > kMaxCluster) {
    return text_of("kernel ", name, " takes teams of ", kMaxCluster, " blocks of threads at most, not ",
                   options.splits);
  }
  return std::nullopt;
}

Kind kind_of(const FragmentLayout& layout) {
  return {.plain = layout.dim == 1 && !layout.outliers,
          .tiled = cuda::is_tiled(layout),
          .streamed = cuda::is_streamed(layout),
          .repeated_tokens = cuda::repeated_tokens(layout),
          .looked_up = cuda::is_looked_up(layout),
          .lookup_bytes = cuda::is_looked_up(layout) ? cuda::lookup_bytes(layout) : 0};
}

struct Choice {
  const CudaProduct* product = nullptr;
  std::string reason;  // why none
};

// `weights`: n * k.
Choice choose(int64_t weights, Kind kind, int64_t m, DType dtype, const DeviceFacts& device,
              const CudaMatmulOptions& options) {
  const int64_t decode_from = weights < kSmallWeights ? kDecodeFromTokensIfSmall : kDecodeFromTokens;
  if (options.splits < 0 || options.splits > kMaxSplits) {
    throw InvalidArgument("splits", text_of(options.splits), text_of("0 to ", kMaxSplits));
  }
  Choice choice;
  bool known = options.kernel.empty();
  for (const CudaProduct& product : kProducts) {
    if (!options.kernel.empty() && product.name != options.kernel) continue;
    known = true;
    if (options.kernel.empty() && m >= decode_from && !product.float32) continue;
    if (options.kernel.empty() && product.name == kRepeated && m > kind.repeated_tokens) continue;
    const auto reason = why_not(product, kind, std::max<int64_t>(m, 1), dtype, device, options);
    if (!reason) {
      choice.product = &product;
      return choice;
    }
    choice.reason += (choice.reason.empty() ? "" : "; ") + *reason;
  }
  if (!known) throw InvalidArgument("kernel", options.kernel, "a name of the kernel table");
  return choice;
}

// What a product is launched with, beyond its arguments.
struct Plan {
  int splits = 0;  // of the tile loops
  cuda::StreamDeal deal;
  int64_t workspace = 0;
};

Plan plan_of(const CudaProduct& product, const FragmentLayout& layout, const cuda::FragmentMatrix& w,
             int64_t m, DType dtype, const DeviceFacts& device, const CudaMatmulOptions& options,
             const cuda::Launchers& launchers) {
  Plan plan;
  plan.splits = options.splits;
  if (product.name == "tiles" || product.name == "tiles_wgmma") {
    plan.workspace = cuda::tiles_workspace(w, static_cast<int>(m), plan.splits);
  } else if (product.name == "decode") {
    plan.workspace = cuda::decoded_workspace(w, static_cast<int>(m), dtype);
  } else if (product.name == cuda::kLookups) {
    plan.workspace = cuda::lookup_workspace(layout, device, options.splits);
  } else if (product.name != kRepeated) {
    const int tokens = std::max(static_cast<int>(m), 1);
    const auto plan_with = [&](bool digits) {
      return cuda::stream_plan(layout, device, tokens, launchers.table_bytes, options.splits,
                               product.needs_clusters, digits);
    };
    cuda::StreamPlan stream;
    if (tokens == 1 && launchers.quads && options.digits.value_or(true) && layout.column_blocks > 0 &&
        layout.column_blocks % 2 == 0 && layout.group_columns % fragments::kBlockColumns == 0) {
      stream = plan_with(true);
    }
    const int wanted = options.digits.value_or(false) ? 1 : cuda::kDigitsFromBlocks;
    if (stream.longest < wanted) stream = plan_with(false);
    plan.deal = stream.deal;
    if (!product.needs_clusters && plan.deal.blocks > 1) {
      plan.workspace = checked_mul(checked_mul(layout.row_blocks, plan.deal.parts),
                                   int64_t{cuda::stream_part_size(tokens)} * 4);
    }
  }
  return plan;
}

const uint8_t* plane_or_null(const PreparedPlanes& w, const char* name) {
  return w.has(name) ? reinterpret_cast<const uint8_t*>(w.plane(name).bytes()) : nullptr;
}

cuda::TrellisPlan plan_trellis(const TrellisLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                               const CudaMatmulOptions& options) {
  cuda::TrellisPlan plan = cuda::trellis_plan(layout, m, dtype, device, options);
  if (plan.product == nullptr) throw Unsupported("matmul_cuda: " + plan.reason);
  return plan;
}

cuda::AdditivePlan plan_additive(const AdditiveLayout& layout, int64_t m, DType dtype,
                                 const DeviceFacts& device, const CudaMatmulOptions& options) {
  cuda::AdditivePlan plan = cuda::additive_plan(layout, m, dtype, device, options);
  if (plan.product == nullptr) throw Unsupported("matmul_cuda: " + plan.reason);
  return plan;
}

cuda::BitPlanePlan plan_bit_planes(const BitPlaneLayout& layout, int64_t m, DType dtype,
                                   const DeviceFacts& device, const CudaMatmulOptions& options) {
  cuda::BitPlanePlan plan = cuda::bit_plane_plan(layout, m, dtype, device, options);
  if (plan.product == nullptr) throw Unsupported("matmul_cuda: " + plan.reason);
  return plan;
}

// The sizes, without the planes.
cuda::FragmentMatrix matrix_of(const FragmentLayout& layout) {
  cuda::FragmentMatrix w;
  w.n = layout.n;
  w.k = layout.k;
  w.row_blocks = static_cast<int>(layout.row_blocks);
  w.column_blocks = static_cast<int>(layout.column_blocks);
  w.group_count = static_cast<int>(layout.group_count);
  w.group_steps = static_cast<int>(layout.group_columns / 16);
  w.table_entries = static_cast<int>(layout.table_entries);
  if (layout.tables > 1) {
    const fragments::TableSizes sizes{layout.tables, w.table_entries, layout.code_bits / layout.tables};
    w.table_entries = sizes.packed();
  }
  w.scale_dtype = layout.scale_dtype;
  w.grid_rows = static_cast<int>(std::min<int64_t>(layout.grid_rows, std::numeric_limits<int32_t>::max()));
  return w;
}

void set_planes(cuda::FragmentMatrix& matrix, const PreparedPlanes& w) {
  matrix.codes = reinterpret_cast<const uint4*>(w.plane("codes").bytes());
  const bool bilevel = matrix.grid_rows > 0;
  matrix.scales = w.plane(bilevel ? "parameters" : "scales").bytes();
  matrix.zeros = plane_or_null(w, "zeros");
  matrix.table = plane_or_null(w, bilevel ? "grids" : "codebook");
  matrix.source = reinterpret_cast<const int32_t*>(plane_or_null(w, "source"));
  if (!w.has("outlier_offsets") || w.plane("outlier_values").element_count() == 0) return;
  matrix.outliers.offsets = reinterpret_cast<const int32_t*>(w.plane("outlier_offsets").bytes());
  matrix.outliers.columns = w.plane("outlier_columns").bytes();
  matrix.outliers.values = w.plane("outlier_values").bytes();
  matrix.outliers.places = reinterpret_cast<const int32_t*>(plane_or_null(w, "place"));
  matrix.outliers.wide_columns = w.plane("outlier_columns").dtype() == DType::i32;
}

cuda::SpqrPlan plan_spqr(const FragmentLayout& layout, const PreparedPlanes& w, int64_t m, DType dtype,
                         const DeviceFacts& device, const CudaMatmulOptions& options) {
  cuda::FragmentMatrix matrix = matrix_of(layout);
  matrix.source = reinterpret_cast<const int32_t*>(plane_or_null(w, "source"));
  cuda::SpqrPlan plan = cuda::spqr_plan(layout, matrix, m, dtype, device, options);
  if (plan.product == nullptr) throw Unsupported("matmul_cuda: " + plan.reason);
  return plan;
}

}  // namespace

std::span<const CudaProduct> cuda_products() {
  return kProducts;
}

std::optional<std::string> why_not_matmul_cuda(const Format& format, int64_t m, DType dtype,
                                               const CudaMatmulOptions& options) {
  try {
    if (const Trellis* trellis = as_trellis(format)) {
      cuda::TrellisPlan plan =
          cuda::trellis_plan(trellis_layout(*trellis, 1, 1), m, dtype, current_device(), options);
      if (plan.product == nullptr) return std::move(plan.reason);
      return std::nullopt;
    }
    if (const Bcq* bcq = as_bcq(format)) {
      const int64_t k = bcq->group_size > 0 ? 2 * bcq->group_size : 128;
      cuda::BitPlanePlan plan =
          cuda::bit_plane_plan(bit_plane_layout(*bcq, 1, k, false), m, dtype, current_device(), options);
      if (plan.product == nullptr) return std::move(plan.reason);
      return std::nullopt;
    }
    if (const Additive* additive = as_additive(format)) {
      cuda::AdditivePlan plan =
          cuda::additive_plan(additive_layout(*additive, 1, 1), m, dtype, current_device(), options);
      if (plan.product == nullptr) return std::move(plan.reason);
      return std::nullopt;
    }
    const FragmentLayout layout = fragment_layout(format, 1, 1, false);
    if (layout.bilevel()) {
      // Of more rows than lie on a grid.
      const FragmentLayout many =
          fragment_layout(format, layout.grid_rows < (1 << 30) ? layout.grid_rows + 1 : 1, 1, false);
      cuda::SpqrPlan plan = cuda::spqr_plan(many, matrix_of(many), m, dtype, current_device(), options);
      if (plan.product == nullptr) return std::move(plan.reason);
      return std::nullopt;
    }
    Kind kind = kind_of(layout);
    // Of more columns than share a scale, where several may.
    kind.looked_up = cuda::is_looked_up(fragment_layout(format, 1, int64_t{1} << 20, false));
    Choice choice = choose(0, kind, m, dtype, current_device(), options);
    if (choice.product == nullptr) return std::move(choice.reason);
    return std::nullopt;
  } catch (const Error& error) {
    return error.what();
  }
}

std::string matmul_cuda_kernel(const PreparedPlanes& w, int64_t m, DType dtype,
                               const CudaMatmulOptions& options) {
  if (w.format == nullptr) throw InvalidArgument("w", "no format", "prepared planes");
  if (const Trellis* trellis = as_trellis(*w.format)) {
    const TrellisLayout layout = trellis_layout(*trellis, w.n, w.k);
    return std::string(plan_trellis(layout, m, dtype, current_device(), options).product->name);
  }
  if (const Bcq* bcq = as_bcq(*w.format)) {
    const BitPlaneLayout layout = bit_plane_layout(*bcq, w.n, w.k, w.has("group_index"));
    return std::string(plan_bit_planes(layout, m, dtype, current_device(), options).product->name);
  }
  if (const Additive* additive = as_additive(*w.format)) {
    const AdditiveLayout layout = additive_layout(*additive, w.n, w.k);
    return std::string(plan_additive(layout, m, dtype, current_device(), options).product->name);
  }
  const FragmentLayout layout = fragment_layout(*w.format, w.n, w.k, w.has("group_index"));
  if (layout.bilevel()) {
    return std::string(plan_spqr(layout, w, m, dtype, current_device(), options).product->name);
  }
  const Choice choice = choose(w.n * w.k, kind_of(layout), m, dtype, current_device(), options);
  if (choice.product == nullptr) throw Unsupported("matmul_cuda: " + choice.reason);
  return std::string(choice.product->name);
}

int64_t matmul_cuda_workspace(const PreparedPlanes& w, int64_t m, DType dtype,
                              const CudaMatmulOptions& options) {
  if (w.format == nullptr) throw InvalidArgument("w", "no format", "prepared planes");
  const DeviceFacts device = current_device();
  if (const Trellis* trellis = as_trellis(*w.format)) {
    return plan_trellis(trellis_layout(*trellis, w.n, w.k), m, dtype, device, options).workspace;
  }
  if (const Bcq* bcq = as_bcq(*w.format)) {
    const BitPlaneLayout layout = bit_plane_layout(*bcq, w.n, w.k, w.has("group_index"));
    return plan_bit_planes(layout, m, dtype, device, options).workspace;
  }
  if (const Additive* additive = as_additive(*w.format)) {
    return plan_additive(additive_layout(*additive, w.n, w.k), m, dtype, device, options).workspace;
  }
  const FragmentLayout layout = fragment_layout(*w.format, w.n, w.k, w.has("group_index"));
  if (layout.bilevel()) return plan_spqr(layout, w, m, dtype, device, options).workspace;
  const Choice choice = choose(w.n * w.k, kind_of(layout), m, dtype, device, options);
  if (choice.product == nullptr) throw Unsupported("matmul_cuda: " + choice.reason);
  cuda::FragmentMatrix matrix = matrix_of(layout);
  matrix.source = reinterpret_cast<const int32_t*>(plane_or_null(w, "source"));
  return plan_of(*choice.product, layout, matrix, m, dtype, device, options, cuda::launchers_of(layout))
      .workspace;
}

namespace {

// The streaming loop for kMaxStreamTokens tokens at a time.
void repeat_stream(const PreparedPlanes& w, const CudaMatmulArguments& arguments,
                   const CudaMatmulOptions& options) {
  CudaMatmulOptions of_part = options;
  of_part.kernel = "stream";
  for (int64_t first = 0; first < arguments.m; first += cuda::kMaxStreamTokens) {
    CudaMatmulArguments part = arguments;
    part.m = std::min<int64_t>(cuda::kMaxStreamTokens, arguments.m - first);
    part.x = static_cast<const std::byte*>(arguments.x) + first * arguments.x_stride * size_of(part.dtype);
    part.y = static_cast<std::byte*>(arguments.y) + first * arguments.y_stride * size_of(part.dtype);
    matmul_cuda(w, part, of_part);
  }
}

// "decode" of vectors that have a decoder of their own.
void run_decoded_vectors(const FragmentLayout& layout, const ProductLaunch& launch, void* workspace,
                         const DeviceFacts& device) {
  const ProductArguments& p = launch.arguments;
  if (p.w.column_blocks == 0) return cuda::launch_bias_alone(launch);
  const cuda::DecodedPlan plan = cuda::decoded_plan(p.w, p.m, launch.dtype, launch.splits);
  for (int64_t first = 0; first < p.w.n; first += plan.rows) {
    const ProductLaunch part = cuda::part_of_rows(launch, first, plan.rows, layout.bits);
    cuda::decode_vectors_to(layout, part.arguments.w, workspace, layout.padded_k(), launch.dtype, device,
                            launch.stream);
    cuda::multiply_decoded(part, plan, first == 0, workspace);
  }
}

// Without what depends on the kernel.
ProductLaunch launch_of(const FragmentLayout& layout, const PreparedPlanes& w,
                        const CudaMatmulArguments& arguments, const CudaMatmulOptions& options,
                        const DeviceFacts& device) {
  ProductLaunch launch;
  ProductArguments& p = launch.arguments;
  p.w = matrix_of(layout);
  set_planes(p.w, w);
  p.x = arguments.x;
  p.x_stride = arguments.x_stride;
  p.bias = arguments.bias;
  p.y = arguments.y;
  p.y_stride = arguments.y_stride;
  p.m = static_cast<int>(arguments.m);
  p.x_in_pieces = !layout.gathered && aligned(p.x, 16) && p.w.k % 8 == 0 && (p.m == 1 || p.x_stride % 8 == 0);
  launch.dtype = arguments.dtype;
  launch.overlap = options.overlap && device.code >= 90;
  p.overlap = launch.overlap;
  launch.stream = static_cast<cudaStream_t>(arguments.stream);
  return launch;
}

}  // namespace

void matmul_cuda(const PreparedPlanes& w, const CudaMatmulArguments& arguments,
                 const CudaMatmulOptions& options) {
  validate(w);
  require_arguments(w, arguments);
  const DeviceFacts device = current_device();
  if (const Trellis* trellis = as_trellis(*w.format)) {
    const TrellisLayout layout = trellis_layout(*trellis, w.n, w.k);
    const cuda::TrellisPlan plan = plan_trellis(layout, arguments.m, arguments.dtype, device, options);
    if (arguments.m == 0 || w.n == 0) return;
    require_memory(w, arguments, plan.workspace, device.index);
    return cuda::run_trellis(layout, plan, w, arguments, options, device);
  }
  if (const Bcq* bcq = as_bcq(*w.format)) {
    const BitPlaneLayout layout = bit_plane_layout(*bcq, w.n, w.k, w.has("group_index"));
    const cuda::BitPlanePlan plan = plan_bit_planes(layout, arguments.m, arguments.dtype, device, options);
    if (arguments.m == 0 || w.n == 0) return;
    require_memory(w, arguments, plan.workspace, device.index);
    return cuda::run_bit_planes(layout, plan, w, arguments, options, device);
  }
  if (const Additive* additive = as_additive(*w.format)) {
    const AdditiveLayout layout = additive_layout(*additive, w.n, w.k);
    const cuda::AdditivePlan plan = plan_additive(layout, arguments.m, arguments.dtype, device, options);
    if (arguments.m == 0 || w.n == 0) return;
    require_memory(w, arguments, plan.workspace, device.index);
    return cuda::run_additive(layout, plan, w, arguments, device);
  }
  const FragmentLayout layout = fragment_layout(*w.format, w.n, w.k, w.has("group_index"));
  if (layout.bilevel()) {
    const cuda::SpqrPlan plan = plan_spqr(layout, w, arguments.m, arguments.dtype, device, options);
    if (arguments.m == 0 || w.n == 0) return;
    require_memory(w, arguments, plan.workspace, device.index);
    ProductLaunch launch = launch_of(layout, w, arguments, options, device);
    launch.splits = options.splits;
    return cuda::run_spqr(layout, plan, launch, arguments.workspace);
  }
  const Choice choice = choose(w.n * w.k, kind_of(layout), arguments.m, arguments.dtype, device, options);
  if (choice.product == nullptr) throw Unsupported("matmul_cuda: " + choice.reason);
  if (arguments.m == 0 || w.n == 0) return;
  const CudaProduct& product = *choice.product;
  const cuda::Launchers& launchers = cuda::launchers_of(layout);
  ProductLaunch launch = launch_of(layout, w, arguments, options, device);
  const Plan plan =
      plan_of(product, layout, launch.arguments.w, arguments.m, arguments.dtype, device, options, launchers);
  require_memory(w, arguments, plan.workspace, device.index);
  if (product.name == kRepeated) return repeat_stream(w, arguments, options);

  launch.splits = plan.splits;
  launch.deal = plan.deal;
  if (product.name == "tiles") {
    launchers.tiles(launch, arguments.workspace);
  } else if (product.name == "tiles_wgmma") {
    launchers.tiles_wgmma(launch, arguments.workspace);
  } else if (product.name == "decode") {
    if (cuda::decodes_vectors(layout, device)) {
      run_decoded_vectors(layout, launch, arguments.workspace, device);
    } else {
      launchers.decoded(launch, arguments.workspace);
    }
  } else if (product.name == cuda::kLookups) {
    launch.arguments.partial = static_cast<float*>(arguments.workspace);
    launch.splits = options.splits;
    cuda::launch_lookups(layout, launch, device);
  } else {
    if (plan.workspace > 0) launch.arguments.partial = static_cast<float*>(arguments.workspace);
    launchers.stream(launch);
  }
}

void decode_fragments_cuda(const PreparedPlanes& w, void* out, DType dtype, int64_t stride, void* stream) {
  validate(w);
  if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
    throw TypeMismatch("dtype", name_of(dtype), "float16, bfloat16 or float32");
  }
  const Trellis* const trellis = as_trellis(*w.format);
  const Bcq* const bcq = as_bcq(*w.format);
  const TrellisLayout rings = trellis != nullptr ? trellis_layout(*trellis, w.n, w.k) : TrellisLayout{};
  const BitPlaneLayout bits =
      bcq != nullptr ? bit_plane_layout(*bcq, w.n, w.k, w.has("group_index")) : BitPlaneLayout{};
  const Additive* const additive = as_additive(*w.format);
  const AdditiveLayout rows = additive != nullptr ? additive_layout(*additive, w.n, w.k) : AdditiveLayout{};
  const FragmentLayout layout = trellis != nullptr || bcq != nullptr || additive != nullptr
                                    ? FragmentLayout{}
                                    : fragment_layout(*w.format, w.n, w.k, w.has("group_index"));
  const int64_t padded_k = trellis != nullptr    ? 64 * rings.column_blocks
                           : bcq != nullptr      ? bits.padded_k()
                           : additive != nullptr ? rows.padded_k()
                                                 : layout.padded_k();
  if (stride < padded_k || stride % 8 != 0) {
    throw InvalidArgument("stride", text_of(stride), text_of("a multiple of 8, at least ", padded_k));
  }
  static_cast<void>(checked_mul(checked_mul(w.n, stride), 4));
  if (w.n == 0 || w.k == 0) return;
  const DeviceFacts device = current_device();
  require_planes(w, device.index);
  if (out == nullptr) throw InvalidArgument("out", "a null pointer", "memory of the current CUDA device");
  require_aligned(out, "out", 16);
  require_on_device(out, "out", device.index);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  if (trellis != nullptr) {
    return cuda::decode_trellis(rings, w, 0, w.n, out, dtype, stride, cuda_stream);
  }
  if (bcq != nullptr) return cuda::decode_bit_planes(bits, w, 0, w.n, out, dtype, stride, cuda_stream);
  if (additive != nullptr) {
    return cuda::decode_additive(rows, w, 0, w.n, out, dtype, stride, cuda_stream);
  }
  cuda::FragmentMatrix matrix = matrix_of(layout);
  set_planes(matrix, w);
  if (layout.bilevel()) {
    cuda::decode_spqr(layout, matrix, 0, w.n, out, dtype, stride, false, cuda_stream);
    return cuda::add_outliers_to_decoded(matrix, out, stride, dtype, cuda_stream);
  }
  if (cuda::decodes_vectors(layout, device)) {
    return cuda::decode_vectors_to(layout, matrix, out, stride, dtype, device, cuda_stream);
  }
  cuda::launchers_of(layout).decode(matrix, out, stride, dtype, false, cuda_stream);
}

}  // namespace quantloom
