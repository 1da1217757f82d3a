// matmul_integers_cuda(): checks the arguments, rounds the activations, picks a kernel, launches it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "activations/batch_facts.hpp"
#include "activations/token_rounding.hpp"
#include "common/device.hpp"
#include "kernels/integer_layout.hpp"
#include "kernels/integer_mma.hpp"
#include "kernels/integer_product.hpp"
#include "kernels/integer_registers.hpp"
#include "kernels/overlap.cuh"
#include "kernels/product_memory.hpp"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom {
namespace {

using cuda::IntegerArguments;
using cuda::IntegerKernel;
using cuda::IntegerShape;
using integers::TokenTerms;

std::string name_of_shape(const IntegerShape& shape) {
  const std::string name = text_of(shape.tokens, "x", shape.rows, "x", shape.parts);
  return shape.tiles == 1 ? name : text_of(name, "x", shape.tiles);
}

const IntegerKernel& kernel_for(const IntegerShape& shape, bool outliers) {
  for (const IntegerKernel& kernel : cuda::integer_kernels()) {
    if (kernel.shape == shape && kernel.outliers == outliers) return kernel;
  }
  throw Error("matmul_integers_cuda: no kernel of tiles " + name_of_shape(shape));
}

IntegerShape shape_of(const std::string& name, int64_t m, int64_t n, int64_t k, const DeviceFacts& device) {
  if (name.empty()) return cuda::choose_integer_shape(m, n, k, device);
  for (const IntegerKernel& kernel : cuda::integer_kernels()) {
    if (name_of_shape(kernel.shape) == name && kernel.shape.takes(k)) return kernel.shape;
  }
  throw InvalidArgument("tile", name, text_of("one of integer_tiles(", k, ")"));
}

// Where the rounded activations lie in the workspace.
struct TokenSpace {
  int64_t terms = 0;
  int64_t range = 0;
  int64_t outliers = 0;
  int64_t sums = 0;
  int64_t bytes = 0;
};

TokenSpace token_space(const IntegerLayout& layout, int64_t m, bool outliers) {
  constexpr int64_t kAlignment = 1024;  // of slabs, as they lie in shared memory
  TokenSpace space;
  space.terms = checked_pad(integers::order_bytes(m, layout.k), kAlignment);
  space.range = checked_pad(space.terms + checked_mul(m, sizeof(TokenTerms)), kAlignment);
  space.outliers = checked_pad(space.range + 4 * cuda::kRangeWords, kAlignment);
  space.bytes = space.outliers;
  if (outliers) space.bytes += integers::order_bytes(m, 2 * layout.outliers);
  space.sums = checked_pad(space.bytes, kAlignment);
  if (const int64_t sums = cuda::register_sum_bytes(layout, m); sums > 0) {
    space.bytes = checked_add(space.sums, sums);
  }
  return space;
}

// Of code - zero of activations: the largest magnitude.
int64_t largest_code(const ActivationFormat& format) {
  if (format.has_shifts()) return 128;
  return format.symmetric ? int64_t{1} << (format.bits - 1) : (int64_t{1} << format.bits) - 1;
}

std::optional<std::string> why_not_activations(const ActivationFormat& format) {
  if (format.has_outliers() && !format.static_outliers) {
    return text_of("integer products take outliers that are static, not ", format.spec());
  }
  if (const auto expected = cuda::why_not_integer_order(format)) {
    return text_of("integer products take ", *expected, ", not ", format.spec());
  }
  return std::nullopt;
}

// One scale for all tokens, which is found first.
bool shares_dynamic_scale(const ActivationFormat& format) {
  return format.scope == ActivationScope::tensor && !format.is_static;
}

bool has_warpgroup_products(const DeviceFacts& device) {
  return device.architecture == 90 && device.code == 90 && cuda::runs_wgmma();
}

std::optional<std::string> why_not_device(const DeviceFacts& device, const ActivationFormat& activations) {
  if (has_warpgroup_products(device)) return std::nullopt;
  if (device.code < 80) {
    return text_of(
        "integer products need a device of compute capability 8.0 or later and a build for it, this device"
        " has ",
        device.architecture / 10, ".", device.architecture % 10);
  }
  if (!activations.has_outliers()) return std::nullopt;
  return text_of(
      "integer products with outliers need a device of compute capability 9.0 and a build for sm_90a, this"
      " device has ",
      device.architecture / 10, ".", device.architecture % 10);
}

std::optional<std::string> why_not_sums(const IntegerLayout& layout, const ActivationFormat& format) {
  // Sums of groups are of 128 columns at most.
  if (layout.grouped()) return std::nullopt;
  // In registers, 4 bits become 8.
  const int64_t largest = layout.in_registers ? int64_t{128} : layout.largest();
  const int64_t product = largest * largest_code(format);
  const int64_t most = std::numeric_limits<int32_t>::max() / product;
  if (layout.k <= most) return std::nullopt;
  return text_of("integer products of ", format.spec(), " take at most ", most,
                 " inputs, whose sums int32 holds, not ", layout.k);
}

// The layout, once nothing speaks against the product.
IntegerLayout layout_for(const IntegerPlanes& w, const ActivationFormat& activations, DType dtype) {
  require_valid(activations);
  if (const auto reason = why_not_matmul_integers_cuda(*w.format, activations, w.k, dtype)) {
    throw Unsupported("matmul_integers_cuda: " + *reason);
  }
  if (activations.static_outliers && !activations.outlier_columns) {
    throw InvalidArgument("activations", activations.spec(),
                          "static outliers with their columns, as calibration gives");
  }
  if (activations.outlier_columns.value_or(std::vector<int32_t>()) != w.outlier_columns) {
    throw InvalidArgument("activations", activations.spec(),
                          text_of("one with the outlier columns of the weights, ", w.outlier_columns.size()));
  }
  const IntegerLayout layout = integer_layout(*w.format, w.n, w.k, std::ssize(w.outlier_columns));
  if (activations.is_static && !activations.grid) {
    throw InvalidArgument("activations", activations.spec(),
                          "a static format with its scale, as calibration gives");
  }
  return layout;
}

const unsigned char* bytes_of(const IntegerPlanes& w, const char* name) {
  return reinterpret_cast<const unsigned char*>(w.plane(name).bytes());
}

}  // namespace

std::optional<std::string> why_not_matmul_integers_cuda(const Format& format,
                                                        const ActivationFormat& activations, int64_t k,
                                                        DType dtype) {
  if (const auto reason = why_not_integers(format)) return reason;
  if (const auto reason = why_not_activations(activations)) return reason;
  const IntegerLayout layout = integer_layout(format, 0, k, 0);
  if (layout.grouped() && activations.has_outliers()) {
    return text_of("integer products take outliers with one scale for each output, not ", format.spec());
  }
  if (const auto reason = why_not_sums(layout, activations)) return reason;
  if (dtype != DType::f16 && dtype != DType::bf16) {
    return text_of("integer products take no ", name_of(dtype), " activations");
  }
  return why_not_device(current_device(), activations);
}

std::string integer_tile(int64_t m, int64_t n, int64_t k) {
  return name_of_shape(cuda::choose_integer_shape(m, n, k, current_device()));
}

std::vector<std::string> integer_tiles(int64_t k) {
  std::vector<std::string> names;
  for (const IntegerKernel& kernel : cuda::integer_kernels()) {
    if (!kernel.outliers && kernel.shape.takes(k)) names.push_back(name_of_shape(kernel.shape));
  }
  return names;
}

std::string integer_tile(const IntegerPlanes& w, int64_t m) {
  const IntegerLayout layout = integer_layout(*w.format, w.n, w.k, std::ssize(w.outlier_columns));
  if (!has_warpgroup_products(current_device())) return cuda::kMmaTile;
  if (!layout.in_registers) return integer_tile(m, w.n, w.k);
  return cuda::name_of_shape(
      cuda::register_kernel(layout, "", std::max<int64_t>(m, 1), current_device()).shape);
}

std::vector<std::string> integer_tiles(const IntegerPlanes& w) {
  const IntegerLayout layout = integer_layout(*w.format, w.n, w.k, std::ssize(w.outlier_columns));
  std::vector<std::string> names;
  if (has_warpgroup_products(current_device())) {
    names = layout.in_registers ? cuda::register_tiles(layout) : integer_tiles(w.k);
  }
  if (layout.outliers == 0) names.push_back(cuda::kMmaTile);
  return names;
}

int64_t matmul_integers_cuda_workspace(const IntegerPlanes& w, int64_t m, DType dtype,
                                       const ActivationFormat& activations) {
  validate_integers(w);
  const IntegerLayout layout = layout_for(w, activations, dtype);
  if (m < 0) throw InvalidArgument("m", text_of(m), "0 or more tokens");
  return token_space(layout, m, layout.outliers > 0).bytes;
}

void matmul_integers_cuda(const IntegerPlanes& w, const CudaMatmulArguments& arguments,
                          const ActivationFormat& activations, const CudaIntegerOptions& options) {
  validate_integers(w);
  const IntegerLayout layout = layout_for(w, activations, arguments.dtype);
  require_arguments(w, arguments);
  const DeviceFacts device = current_device();
  const bool by_mma = options.tile == cuda::kMmaTile || !has_warpgroup_products(device);
  if (by_mma && ((!options.tile.empty() && options.tile != cuda::kMmaTile) || layout.outliers > 0)) {
    throw InvalidArgument("tile", options.tile, "one of integer_tiles(w)");
  }
  const int64_t tokens_at_least = std::max<int64_t>(arguments.m, 1);
  const cuda::RegisterKernel* const in_registers =
      layout.in_registers && !by_mma ? &cuda::register_kernel(layout, options.tile, tokens_at_least, device)
                                     : nullptr;
  const IntegerShape shape = layout.in_registers || by_mma
                                 ? IntegerShape()
                                 : shape_of(options.tile, tokens_at_least, w.n, w.k, device);
  if (arguments.m == 0 || w.n == 0) return;
  const TokenSpace space = token_space(layout, arguments.m, layout.outliers > 0);
  require_memory(w, arguments, space.bytes, device.index);

  auto* const stream = static_cast<cudaStream_t>(arguments.stream);
  if (layout.blocks == 0) {
    cuda::ProductLaunch launch;
    launch.arguments.w.n = w.n;
    launch.arguments.bias = arguments.bias;
    launch.arguments.y = arguments.y;
    launch.arguments.y_stride = arguments.y_stride;
    launch.arguments.m = static_cast<int>(arguments.m);
    launch.dtype = arguments.dtype;
    launch.overlap = false;
    launch.stream = stream;
    return cuda::launch_bias_alone(launch);
  }
  auto* const workspace = static_cast<unsigned char*>(arguments.workspace);
  cuda::IntegerTokens tokens;
  tokens.codes = reinterpret_cast<int8_t*>(workspace);
  tokens.terms = reinterpret_cast<TokenTerms*>(workspace + space.terms);
  if (layout.outliers > 0) {
    tokens.outlier_index = bytes_of(w, "outlier_index");
    tokens.outlier_values = workspace + space.outliers;
    tokens.outliers = layout.outliers;
  }
  tokens.sums = layout.asymmetric && !layout.grouped();
  const CudaMatrix x{arguments.x, arguments.dtype, arguments.m, w.k,
                     arguments.m > 1 ? arguments.x_stride : w.k};
  uint32_t* range = nullptr;
  if (shares_dynamic_scale(activations)) {
    range = reinterpret_cast<uint32_t*>(workspace + space.range);
    cuda::find_range(x, tokens.outlier_index, range, stream);
  }
  cuda::round_tokens(x, activations, tokens, stream, options.overlap, range);

  IntegerArguments p;
  p.weights = bytes_of(w, "integers");
  p.rows = reinterpret_cast<const cuda::RowTerms*>(bytes_of(w, "rows"));
  p.tokens = workspace;
  p.terms = tokens.terms;
  if (layout.outliers > 0) {
    p.outlier_weights = bytes_of(w, "outlier_weights");
    p.outlier_tokens = workspace + space.outliers;
    p.outlier_blocks = static_cast<int>(layout.outlier_blocks());
  }
  p.bias = arguments.bias;
  p.y = arguments.y;
  p.y_stride = arguments.m > 1 ? arguments.y_stride : w.n;
  p.m = arguments.m;
  p.m_padded = checked_pad(arguments.m, cuda::kTokenRows);
  p.n = w.n;
  p.blocks = static_cast<int>(layout.blocks);
  p.has_zeros = (layout.asymmetric && !layout.grouped()) || !activations.symmetric;
  p.bfloat16 = arguments.dtype == DType::bf16;
  p.y_in_pieces = aligned(arguments.y, 16) && (arguments.m == 1 || p.y_stride % 8 == 0);
  if (by_mma) {
    return cuda::multiply_by_mma(layout, p, reinterpret_cast<float*>(workspace + space.sums), device, stream);
  }
  if (in_registers != nullptr) {
    return cuda::multiply_in_registers(layout, *in_registers, p,
                                       reinterpret_cast<float*>(workspace + space.sums), device, stream);
  }
  p.row_tiles = static_cast<int>(layout.row_tiles);
  p.row_groups = static_cast<int>(ceil_div(layout.row_tiles, int64_t{shape.rows}));
  p.token_tiles = static_cast<int>(ceil_div(arguments.m, int64_t{shape.cluster_tokens()}));
  p.band = std::max(1, 2048 / shape.cluster_tokens());
  const IntegerKernel& kernel = kernel_for(shape, layout.outliers > 0);
  const int64_t tiles = checked_mul(p.row_groups, p.token_tiles);
  if (tiles > std::numeric_limits<int32_t>::max() / 16) {
    throw Unsupported(text_of("matmul_integers_cuda: no kernel for ", arguments.m, " tokens"));
  }
  const int64_t resident = cuda::resident_clusters(kernel, device);
  const int64_t halved = cuda::halved_tiles(shape, tiles, resident);
  p.whole_tiles = static_cast<int>(tiles - halved);
  p.tiles = static_cast<int>(tiles + halved);
  const int clusters = static_cast<int>(shape.parts > 1 ? tiles : std::min<int64_t>(p.tiles, resident));
  kernel.launch(p, clusters, true, stream);
}

}  // namespace quantloom
