// Which kernel multiplies weights in register order, and its launch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "activations/token_rounding.hpp"
#include "common/check.cuh"
#include "kernels/integer_registers.hpp"
#include "kernels/overlap.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

std::span<const RegisterKernel> kernels_of(const IntegerLayout& layout) {
  if (!layout.grouped()) return register_kernels_of_rows();
  const std::span<const RegisterKernel> all =
      layout.nibbles() ? (layout.pairs() ? register_kernels_of_nibble_zeros() : register_kernels_of_nibbles())
                       : (layout.pairs() ? register_kernels_of_byte_zeros() : register_kernels_of_bytes());
  const auto first = std::ranges::find(all, layout.steps(),
                                       [](const RegisterKernel& kernel) { return kernel.weights.steps; });
  const auto last = std::find_if(
      first, all.end(), [&](const RegisterKernel& kernel) { return kernel.weights.steps != layout.steps(); });
  return {first, last};
}

// Clusters of the kernel that run at the same time.
int resident_clusters(const RegisterKernel& kernel, const DeviceFacts& device) {
  static std::mutex mutex;
  static std::map<std::pair<const RegisterKernel*, int>, int> known;
  const std::scoped_lock lock(mutex);
  const auto found = known.find({&kernel, device.index});
  if (found != known.end()) return found->second;
  return known.emplace(std::pair(&kernel, device.index), std::max(kernel.resident(device), 1)).first->second;
}

// Tiles of 64 or 128 outputs that clusters take at a time.
int64_t row_groups(const RegisterShape& shape, int64_t n) {
  return ceil_div(ceil_div(n, int64_t{64} * shape.slabs), int64_t{shape.cluster});
}

// Microseconds for a block of 128 columns, as many tiles running as fit.
double block_time(const RegisterShape& shape, int steps) {
  const bool grouped = steps > 0;
  const double runs = grouped ? 1.0 + 0.3 * (steps - 1) : 1.0;
  if (shape.tokens == 256) return (grouped ? 1.0 : 0.8) * runs;
  if (shape.tokens == 128) return (shape.slabs == 2 ? 0.39 : grouped ? 0.6 : 0.47) * runs;
  if (shape.team == 1) return (shape.tokens == 16 ? 0.28 : grouped ? 0.39 : 0.28) * runs;
  if (shape.tokens == 64) return 0.13;
  if (shape.tokens == 32) return 0.3;
  // Two share a processor, or one has it.
  return (shape.team == 2 ? (grouped ? 0.32 : 0.18) : grouped ? 0.17 : 0.09) * runs;
}

// A thread to a token of a block of columns.
__global__ void __launch_bounds__(kThreads)
    sum_token_codes(const int8_t* __restrict__ codes, int64_t blocks, int steps, int64_t tokens,
                    int64_t padded, float* __restrict__ sums) {
  let_next_begin();
  wait_for_previous();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t block = blockIdx.y;
  const int words = 32 / steps;
  for (int step = 0; step < steps; ++step) {
    int sum = 0;
    for (int word = step * words; token < tokens && word < (step + 1) * words; ++word) {
      const int64_t place = integers::place_of(token, block * integers::kBlockBytes + 4 * word, blocks);
      sum = __dp4a(*reinterpret_cast<const int*>(codes + place), 0x01010101, sum);
    }
    sums[(block * steps + step) * padded + token] = static_cast<float>(sum);
  }
}

}  // namespace

std::string name_of_shape(const RegisterShape& shape) {
  return text_of(shape.tokens, "x", shape.slabs, "x", shape.cluster, "x", shape.team);
}

std::vector<std::string> register_tiles(const IntegerLayout& layout) {
  std::vector<std::string> names;
  for (const RegisterKernel& kernel : kernels_of(layout)) names.push_back(name_of_shape(kernel.shape));
  return names;
}

const RegisterKernel& register_kernel(const IntegerLayout& layout, const std::string& tile, int64_t m,
                                      const DeviceFacts& device) {
  constexpr double kFromMemory = 4.2e6;  // bytes in a microsecond
  const std::span<const RegisterKernel> kernels = kernels_of(layout);
  const double memory =
      static_cast<double>(2 * layout.row_tiles * layout.blocks * layout.record_bytes()) / kFromMemory;
  const RegisterKernel* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const RegisterKernel& kernel : kernels) {
    const RegisterShape& shape = kernel.shape;
    if (name_of_shape(shape) == tile) return kernel;
    const int64_t clusters = row_groups(shape, layout.n) * ceil_div(m, int64_t{shape.tokens});
    const int64_t waves = ceil_div(clusters, int64_t{resident_clusters(kernel, device)});
    const double time = static_cast<double>(waves) *
                        (static_cast<double>(layout.blocks) * block_time(shape, layout.steps()) + 1.5);
    // Neither bound hides the other entirely.
    const double all = std::cbrt(time * time * time + memory * memory * memory);
    if (all < least) {
      least = all;
      best = &kernel;
    }
  }
  if (!tile.empty() || best == nullptr) throw InvalidArgument("tile", tile, "one of integer_tiles(w)");
  return *best;
}

int64_t register_sum_bytes(const IntegerLayout& layout, int64_t m) {
  if (!layout.pairs() || layout.nibbles()) return 0;
  return checked_mul(checked_mul(layout.blocks * layout.steps(), checked_pad(m, kSumsTokens)), 4);
}

void add_token_sums(const IntegerLayout& layout, RegisterArguments& p, float* sums, bool overlap,
                    cudaStream_t stream) {
  if (register_sum_bytes(layout, p.m) == 0) return;
  p.token_sums = sums;
  p.sums_tokens = checked_pad(p.m, kSumsTokens);
  const int64_t groups = p.sums_tokens / kThreads;
  if (groups > std::numeric_limits<int32_t>::max() || layout.blocks > 65535) {
    throw Unsupported(
        text_of("matmul_integers_cuda: no kernel sums codes of ", p.m, " tokens of ", layout.k, " inputs"));
  }
  LaunchSettings settings(dim3(static_cast<unsigned>(groups), static_cast<unsigned>(layout.blocks)),
                          dim3(kThreads), stream, overlap, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, sum_token_codes, reinterpret_cast<const int8_t*>(p.tokens),
                                layout.blocks, layout.steps(), p.m_padded, p.sums_tokens, sums),
             "matmul_integers_cuda: launch of sum_token_codes");
}

void multiply_in_registers(const IntegerLayout& layout, const RegisterKernel& kernel,
                           const IntegerArguments& arguments, float* sums, const DeviceFacts& device,
                           cudaStream_t stream) {
  const RegisterShape& shape = kernel.shape;
  RegisterArguments p{arguments};
  p.row_tiles = static_cast<int>(ceil_div(layout.n, int64_t{64} * shape.slabs));
  p.row_groups = static_cast<int>(row_groups(shape, layout.n));
  p.token_tiles = static_cast<int>(ceil_div(p.m, int64_t{shape.tokens}));
  p.band = std::max(1, 2048 / shape.tokens);
  add_token_sums(layout, p, sums, true, stream);
  const int64_t tiles = checked_mul(p.row_groups, p.token_tiles);
  if (tiles > std::numeric_limits<int32_t>::max() / 16) {
    throw Unsupported(text_of("matmul_integers_cuda: no kernel for ", p.m, " tokens"));
  }
  kernel.launch(p, static_cast<int>(std::min<int64_t>(tiles, resident_clusters(kernel, device))), stream);
}

}  // namespace quantloom::cuda
