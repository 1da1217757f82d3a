#include "common/check.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "kernels/token_order.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) {
    throw Unsupported(text_of("matmul_cuda: no kernel for ", threads, " pieces of activations at once"));
  }
  return static_cast<unsigned>(blocks);
}

// A thread takes 32 columns of a token: four pieces of 16 bytes, whose words change places. 16-bit values
// of either type.
__global__ void __launch_bounds__(kThreads)
    arrange_tokens(const __grid_constant__ ProductArguments p, uint4* tokens, int64_t padded_tokens) {
  let_next_begin();
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int half = static_cast<int>(i % 2);
  const int64_t row = i / 2;
  const int64_t block = row / padded_tokens;
  const int token = static_cast<int>(row % padded_tokens);
  if (block >= p.w.column_blocks) return;

  const int64_t column = block * fragments::kBlockColumns + 32 * half;
  uint32_t words[4][4] = {};  // columns column + 8 * t + 2 * w and the next
  if (token < p.m) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int64_t from = column + 8 * t;
      if (p.x_in_pieces) {
        if (from >= p.w.k) continue;
        const uint4 piece = *reinterpret_cast<const uint4*>(x + from);
        words[t][0] = piece.x;
        words[t][1] = piece.y;
        words[t][2] = piece.z;
        words[t][3] = piece.w;
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int64_t source = p.w.source == nullptr ? from + c : p.w.source[from + c];
          const uint32_t value = source >= 0 && source < p.w.k ? x[source] : 0U;
          words[t][c / 2] |= value << (c % 2 * 16);
        }
      }
    }
  }
  uint4* const out = tokens + row * fragments::kTokenPieces;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // Constants: columns change places within 32 only, alike in both halves of a block.
    uint32_t piece[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column_of_word = fragments::column_at(8 * w + 2 * i);
      piece[i] = words[column_of_word / 8][column_of_word % 8 / 2];
    }
    out[fragments::place_of_piece(token, 4 * half + w)] = make_uint4(piece[0], piece[1], piece[2], piece[3]);
  }
}

constexpr int kAddTiles = 2;

// A block of threads adds 16 rows of each warp and 8 * kAddTiles tokens of a tile, in the layout of the tile
// loop.
template <class T, int kTiles>
__global__ void __launch_bounds__(kTileThreads)
    add_parts(const __grid_constant__ ProductArguments p, const __grid_constant__ TileWork work) {
  let_next_begin();
  wait_for_previous();
  const int64_t tile = blockIdx.x / (fragments::kUnits * kTiles / kAddTiles);
  const int unit = static_cast<int>(blockIdx.x / (kTiles / kAddTiles) % fragments::kUnits);
  const int begin = static_cast<int>(blockIdx.x % (kTiles / kAddTiles)) * kAddTiles;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_block = static_cast<int>(tile / work.plan.token_tiles) * TilePlan::kWarps + warp;
  const int first = work.plan.first_part(tile);
  const int last = work.plan.last_part(tile);
  if (first == last || row_block >= p.w.row_blocks) return;

  float sums[kAddTiles][4] = {};
#pragma unroll 4
  for (int part = first; part <= last; ++part) {
    const int64_t slot = work.plan.slot(part, tile);
#pragma unroll
    for (int t = 0; t < kAddTiles; ++t) {
      const float4 sum = work.partials[partial_place(slot, warp, unit, begin + t, kTiles, lane)];
      sums[t][0] += sum.x;
      sums[t][1] += sum.y;
      sums[t][2] += sum.z;
      sums[t][3] += sum.w;
    }
  }
  const int64_t row = static_cast<int64_t>(row_block) * fragments::kBlockRows + 16 * unit + lane / 4;
  const int token = static_cast<int>(tile % work.plan.token_tiles) * (8 * kTiles) + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < kAddTiles; ++t) store_sums<T>(p, row, token + 8 * (begin + t), sums[t]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) bias_alone(const __grid_constant__ ProductArguments p) {
  let_next_begin();
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = i / p.w.n;
  const int64_t row = i % p.w.n;
  if (token >= p.m) return;
  static_cast<T*>(p.y)[token * p.y_stride + row] =
      p.bias == nullptr ? T(0.0F) : static_cast<const T*>(p.bias)[row];
}

template <class T, int kTiles>
void launch_add(const ProductLaunch& launch, const TileWork& work) {
  const int64_t blocks = work.plan.tiles() * (fragments::kUnits * kTiles / kAddTiles);
  if (blocks > 2147483647) throw Unsupported(text_of("matmul_cuda: no kernel for ", blocks, " tiles"));
  LaunchSettings settings(dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), launch.stream,
                          overlaps(current_device()), 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, add_parts<T, kTiles>, launch.arguments, work),
             "matmul_cuda: launch of add_parts");
}

}  // namespace

bool runs_wgmma() {
  return current_device().architecture == 90 && cuda_architectures().find("90a") != std::string::npos;
}

TilePlan tile_plan_of(const FragmentMatrix& w, int m, int splits) {
  return fragments::tile_plan(w.row_blocks, w.column_blocks, m, current_device().processors, splits);
}

int64_t tiles_workspace(const FragmentMatrix& w, int m, int splits) {
  if (m == 0 || w.n == 0 || w.column_blocks == 0) return 0;
  const TilePlan plan = tile_plan_of(w, m, splits);
  return aligned_bytes(plan.token_bytes()) + plan.slots() * plan.slot_bytes();
}

TileWork tile_work(const ProductLaunch& launch, void* workspace) {
  TileWork work;
  work.plan = tile_plan_of(launch.arguments.w, launch.arguments.m, launch.splits);
  work.tokens = static_cast<uint4*>(workspace);
  work.partials = reinterpret_cast<float4*>(static_cast<unsigned char*>(workspace) +
                                            aligned_bytes(work.plan.token_bytes()));
  return work;
}

void launch_arrange(const ProductLaunch& launch, const TileWork& work) {
  const int64_t threads = int64_t{2} * work.plan.column_blocks * work.plan.padded_tokens();
  LaunchSettings settings(dim3(blocks_for(threads)), dim3(kThreads), launch.stream, launch.overlap, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, arrange_tokens, launch.arguments, work.tokens,
                                work.plan.padded_tokens()),
             "matmul_cuda: launch of arrange_tokens");
}

void launch_add_parts(const ProductLaunch& launch, const TileWork& work) {
  const bool small = work.plan.tokens == 32;
  if (launch.dtype == DType::f16) {
    small ? launch_add<__half, 4>(launch, work) : launch_add<__half, 8>(launch, work);
  } else {
    small ? launch_add<__nv_bfloat16, 4>(launch, work) : launch_add<__nv_bfloat16, 8>(launch, work);
  }
}

void launch_bias_alone(const ProductLaunch& launch) {
  const ProductArguments& p = launch.arguments;
  LaunchSettings settings(dim3(blocks_for(p.m * p.w.n)), dim3(kThreads), launch.stream, launch.overlap, 1);
  auto* kernel = launch.dtype == DType::f16    ? bias_alone<__half>
                 : launch.dtype == DType::bf16 ? bias_alone<__nv_bfloat16>
                                               : bias_alone<float>;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p), "matmul_cuda: launch of bias_alone");
}

}  // namespace quantloom::cuda
