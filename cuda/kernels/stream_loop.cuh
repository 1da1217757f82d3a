// The product loop for few tokens: each code passes once from memory, through registers, to the tensor cores.
//
// Blocks of threads form teams. A team has some row blocks to itself and walks through their blocks of
// 64 x 64 codes in order, each of its warps a run of equal length (src/kernels/stream_deal.hpp). A warp has
// the codes of its next blocks on their way to registers; its lanes decode them and multiply on the tensor
// cores, 8 tokens at a time. Scales are applied to the float32 sums. One token may be multiplied on integers,
// with its activations as digits: that takes half the operations at 2 bits, and some preparation. A row
// block's sum comes in parts, one of each warp that met it: they are left in the shared memory of the team's
// cluster, or in memory, and added in the order of the warps.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/cluster.cuh"
#include "kernels/digit_walk.cuh"
#include "kernels/outlier_rows.cuh"
#include "kernels/overlap.cuh"
#include "kernels/products.cuh"
#include "kernels/stream_walk.cuh"

namespace quantloom::cuda {

template <class T>
__device__ __forceinline__ void store_sum(const ProductArguments& p, int row_block, int token, int place,
                                          float sum) {
  const int64_t row =
      static_cast<int64_t>(row_block) * fragments::kBlockRows + fragments::block_row_of(place);
  if (row >= p.w.n) return;
  if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
  static_cast<T*>(p.y)[token * p.y_stride + row] = HalfPair<T>::from_float(sum);
}

// Adds the parts of a block's own row blocks, every deal.blocks-th of the team from `rank` on. kSharers lanes
// share the parts of a sum.
template <class T, int kSharers>
__device__ __forceinline__ void add_parts(const ProductArguments& p, const StreamDeal& deal, int first_row,
                                          int rank, int own_rows, const float* parts,
                                          const StreamParts* parts_of_rows) {
  constexpr int kVectors = 32 / kSharers;  // of four sums, of a warp at a time
  const int part_size = stream_part_size(p.m);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int sharer = lane / kVectors;
  const int warps_of_row = (p.m * fragments::kBlockRows / 4 + kVectors - 1) / kVectors;
  int row = 0;
  int chunk = static_cast<int>(threadIdx.x / 32);
  for (;;) {
    for (; chunk >= warps_of_row; chunk -= warps_of_row) ++row;
    if (row >= own_rows) return;
    const int at = (chunk * kVectors + lane % kVectors) * 4;
    const bool inside = at < p.m * fragments::kBlockRows;
    const StreamParts met = parts_of_rows[row];
    const float* const from = parts + static_cast<int64_t>(row) * deal.parts * part_size + at;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 4
    for (int part = sharer; inside && part < met.count; part += kSharers) {
      const int place = (met.first + part) & (deal.parts - 1);
      const float4 four = *reinterpret_cast<const float4*>(from + place * part_size);
      sum.x += four.x;
      sum.y += four.y;
      sum.z += four.z;
      sum.w += four.w;
    }
#pragma unroll
    for (int distance = kVectors; distance < 32; distance *= 2) {
      sum.x += __shfl_xor_sync(~0U, sum.x, distance);
      sum.y += __shfl_xor_sync(~0U, sum.y, distance);
      sum.z += __shfl_xor_sync(~0U, sum.z, distance);
      sum.w += __shfl_xor_sync(~0U, sum.w, distance);
    }
    if (sharer == 0 && inside) {
      const int row_block = first_row + row * deal.blocks + rank;
      const int token = at / fragments::kBlockRows;
      const int place = at % fragments::kBlockRows;
      store_sum<T>(p, row_block, token, place, sum.x);
      store_sum<T>(p, row_block, token, place + 1, sum.y);
      store_sum<T>(p, row_block, token, place + 2, sum.z);
      store_sum<T>(p, row_block, token, place + 3, sum.w);
    }
    chunk += static_cast<int>(blockDim.x / 32);
  }
}

// Grid: [deal.teams * deal.blocks]; the blocks of a team are a cluster, unless p.partial is given.
template <class Decoder, class T, int kTokens, bool kZeros, bool kFine, bool kDigits>
__global__ void __launch_bounds__(32 * stream_warps(kTokens, kFine), 1)
    multiply_stream(const __grid_constant__ ProductArguments p, const __grid_constant__ StreamDeal deal) {
  static_assert(!kDigits || (Decoder::kQuads && kTokens == 1 && !kFine));
  using Walk = std::conditional_t<kDigits, DigitWalk<Decoder, T, kZeros>,
                                  WarpWalk<Decoder, T, kTokens, kZeros, kFine>>;
  // The decoder's table, the digits, the parts, and what parts_of() says of each own row block.
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t delivery;
  __shared__ __align__(16)
      T gathered[kDigits ? 1 : stream_warps(kTokens, kFine)][kTokens * fragments::kBlockColumns];
  auto* const parts = reinterpret_cast<float*>(memory + Decoder::kSharedBytes +
                                               (kDigits ? stream_digit_bytes(deal.stretches) : 0));
  const int part_size = stream_part_size(p.m);
  const bool in_cluster = deal.blocks > 1 && p.partial == nullptr;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int columns = p.w.column_blocks;
  const int team = static_cast<int>(deal.by_blocks.divide(blockIdx.x));
  const int rank = static_cast<int>(blockIdx.x) - team * deal.blocks;
  const int warp = (rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) / 32;
  const int first_row = deal.first_row(team);
  const StreamRuns& runs = deal.runs_of(team);

  let_next_begin();
  if (in_cluster) {
    if (kTokens == 1 && threadIdx.x == 0) Delivery::prepare(&delivery);
    cluster_begin();
  }
  const ActivationDigits digits = [&] {
    if constexpr (!kDigits) return ActivationDigits();
    const int warps = static_cast<int>(blockDim.x / 32);
    const int begin = runs.begin(min(rank * warps, deal.warps));
    const int count = runs.begin(min((rank + 1) * warps, deal.warps)) - begin;
    const auto row = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(begin)));
    return ActivationDigits(memory + Decoder::kSharedBytes, begin - row * columns, count, columns);
  }();
  Decoder decoder;
  Walk walk = [&] {
    if constexpr (kDigits) {
      return Walk(p);
    } else {
      return Walk(p, decoder, gathered[threadIdx.x / 32]);
    }
  }();
  const bool takes_part = warp < deal.warps;
  const int begin = takes_part ? runs.begin(warp) : 0;
  const int end = takes_part ? runs.begin(warp + 1) : 0;
  if constexpr (kDigits) {
    // Activations are needed first, and loads return in order; but they must not be read before the
    // previous kernel has ended, as codes may.
    ActivationDigits::Batch batch;
    if (!p.overlap) batch = digits.template load_first<T>(p);
    walk.begin(deal, first_row, begin, end);
    wait_for_previous();
    if (p.overlap) batch = digits.template load_first<T>(p);
    digits.template fill<Decoder, T>(p, batch);
  } else {
    walk.begin(deal, first_row, begin, end);
    decoder.template prepare<T>(p.w.table, p.w.table_entries, memory);
    if constexpr (Decoder::kSharedBytes > 0) __syncthreads();
    wait_for_previous();
    walk.load_first_activations();
  }
  const int own_rows = p.partial != nullptr ? 0 : (deal.rows_of(team) - rank + deal.blocks - 1) / deal.blocks;
  auto* const parts_of_rows =
      reinterpret_cast<StreamParts*>(parts + static_cast<int64_t>(own_rows) * deal.parts * part_size);
  if (threadIdx.x < 32) {
    __syncwarp();  // the first lane has prepared the delivery
#pragma unroll 1
    for (int row = lane; row < own_rows; row += 32) {
      const StreamParts met = parts_of(runs, row * deal.blocks + rank, columns);
      parts_of_rows[row] = met;
      if (kTokens == 1 && in_cluster)
        Delivery::expect(&delivery, met.count * p.m * fragments::kBlockRows * 4);
    }
    __syncwarp();
    if (kTokens == 1 && in_cluster && lane == 0) Delivery::all_expected(&delivery);
  }
  if (in_cluster) cluster_wait();
  auto* const staged = reinterpret_cast<T*>(memory + deal.staged_at);
  if (p.w.outliers.offsets != nullptr) {
    prefetch_outliers(p, first_row, rank, deal.blocks, own_rows);
    if (deal.staged_at > 0) stage_activations(p, staged, 0, min(deal.staged, p.m));
  }
  if constexpr (kDigits) __syncthreads();

  const auto leave = [&](int row, const auto& sums) {
    const int place = warp & (deal.parts - 1);
    const auto own_row = static_cast<int>(deal.by_blocks.divide(static_cast<uint32_t>(row)));
    const int owner = row - own_row * deal.blocks;
    float* to = p.partial != nullptr
                    ? p.partial + (static_cast<int64_t>(first_row + row) * deal.parts + place) * part_size
                    : parts + (own_row * deal.parts + place) * part_size;
    if (kTokens > 1 && in_cluster) to = cluster_place(to, owner);
#pragma unroll
    for (int tile = 0; tile < Walk::kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < Walk::kColumns; ++c) {
        const int token = 8 * tile + lane % 4 * 2 + c;
        if (token >= p.m) continue;
        float* const eight = to + token * fragments::kBlockRows + lane / 4 * 8;
        const auto& s = sums[tile];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four = make_float4(s[i][c], s[i + 1][c], s[i + 2][c], s[i + 3][c]);
          if (kTokens == 1 && in_cluster) {
            Delivery::send(eight + i, &delivery, owner, four);
          } else {
            *reinterpret_cast<float4*>(eight + i) = four;
          }
        }
      }
    }
  };
  if constexpr (kDigits) {
    walk.run(digits, leave);
  } else {
    walk.run(leave);
  }
  if (p.partial != nullptr) return;

  // parts_of_rows comes from the first warp: with the delivery, or before a barrier.
  if (in_cluster) {
    if constexpr (kTokens == 1) {
      Delivery::wait(&delivery);
    } else {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    __syncthreads();
  }
  if (p.w.outliers.offsets != nullptr) {
    // Into the first part of each sum; its row blocks are the block's own.
    const auto add = [&](int row, int place, int token, float sum) {
      const int part = parts_of_rows[row].first & (deal.parts - 1);
      parts[(row * deal.parts + part) * part_size + token * fragments::kBlockRows + place] += sum;
    };
    constexpr int kBatch = kTokens == 1 ? 1 : 4;
    if (deal.staged_at == 0) {
      const OutlierTokens<T, false> tokens{static_cast<const T*>(p.x), p.x_stride, 0, p.m};
      for_each_outlier_sum<kBatch>(p, tokens, first_row, rank, deal.blocks, own_rows, add);
    }
    for (int token = 0; deal.staged_at > 0 && token < p.m; token += deal.staged) {
      const OutlierTokens<T, true> tokens{staged, staged_stride(p.w.k), token, min(deal.staged, p.m - token)};
      if (token > 0) {
        __syncthreads();
        stage_activations(p, staged, token, tokens.count);
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      if (kBatch == 1 || tokens.count == 1) {
        for_each_outlier_sum<1>(p, tokens, first_row, rank, deal.blocks, own_rows, add);
      } else {
        for_each_outlier_sum<kBatch>(p, tokens, first_row, rank, deal.blocks, own_rows, add);
      }
    }
    __syncthreads();
  }
  constexpr int kSharers = kTokens == 1 ? 8 : kTokens == 8 ? 4 : 1;
  add_parts<T, kSharers>(p, deal, first_row, rank, own_rows, parts, parts_of_rows);
}

// Adds the parts that multiply_stream left in memory.
template <class T>
__global__ void add_partials(const __grid_constant__ ProductArguments p,
                             const __grid_constant__ StreamDeal deal) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int size = p.m * fragments::kBlockRows;
  const auto row_block = static_cast<int>(i / size);
  if (row_block >= p.w.row_blocks) return;
  const int longer = deal.extra * (deal.rows + 1);
  const int team =
      row_block < longer ? row_block / (deal.rows + 1) : deal.extra + (row_block - longer) / deal.rows;
  const StreamParts met = parts_of(deal.runs_of(team), row_block - deal.first_row(team), p.w.column_blocks);
  const int at = static_cast<int>(i % size);
  const int64_t part_size = stream_part_size(p.m);
  const float* const from = p.partial + static_cast<int64_t>(row_block) * deal.parts * part_size + at;
  float sum = 0.0F;
  for (int part = 0; part < met.count; ++part) {
    sum += from[((met.first + part) & (deal.parts - 1)) * part_size];
  }
  const int64_t row = static_cast<int64_t>(row_block) * fragments::kBlockRows +
                      fragments::block_row_of(at % fragments::kBlockRows);
  if (p.w.outliers.offsets != nullptr && row < p.w.n) {
    float outliers[1] = {};
    const OutlierTokens<T, false> tokens{static_cast<const T*>(p.x), p.x_stride, 0, p.m};
    multiply_outliers<1>(p.w.outliers, tokens, __ldg(p.w.outliers.offsets + row),
                         __ldg(p.w.outliers.offsets + row + 1), 0, at / fragments::kBlockRows, outliers);
    sum += outliers[0];
  }
  store_sum<T>(p, row_block, at / fragments::kBlockRows, at % fragments::kBlockRows, sum);
}

template <class Decoder, class T, int kTokens, bool kZeros, bool kFine, bool kDigits = false>
void launch_stream_kernel(const ProductLaunch& launch) {
  const ProductArguments& p = launch.arguments;
  StreamDeal deal = launch.deal;
  const bool in_memory = p.partial != nullptr;
  auto shared = Decoder::kSharedBytes + static_cast<int>(stream_digit_bytes(deal.stretches)) +
                (in_memory ? 0 : static_cast<int>(stream_parts_bytes(deal, p.m)));
  // Outliers meet activations anywhere: those of as many tokens as fit are brought to shared memory.
  const int64_t token_bytes = staged_stride(p.w.k) * 2;
  const bool aligned = (reinterpret_cast<uintptr_t>(p.x) | (p.m > 1 ? p.x_stride * 2 : 0)) % 16 == 0;
  deal.staged_at = 0;
  if (p.w.outliers.offsets != nullptr && !in_memory && aligned && token_bytes + 16 <= deal.spare) {
    deal.staged = static_cast<int>(std::min<int64_t>((deal.spare - 16) / token_bytes, p.m));
    deal.staged_at = (shared + 15) / 16 * 16;
    shared = deal.staged_at + deal.staged * static_cast<int>(token_bytes);
  }
  LaunchSettings settings(dim3(static_cast<unsigned>(deal.teams * deal.blocks)),
                          dim3(32 * stream_warps(kTokens, kFine)), launch.stream, launch.overlap,
                          in_memory ? 1 : deal.blocks);
  const auto kernel = multiply_stream<Decoder, T, kTokens, kZeros, kFine, kDigits>;
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_stream");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p, deal), "matmul_cuda: launch of multiply_stream");
  if (!in_memory) return;
  const int64_t count = static_cast<int64_t>(p.m) * p.w.row_blocks * fragments::kBlockRows;
  LaunchSettings add(dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), launch.stream,
                     launch.overlap, 1);
  check_cuda(cudaLaunchKernelEx(&add.config, add_partials<T>, p, deal),
             "matmul_cuda: launch of add_partials");
}

template <class Decoder, class T, bool kZeros>
void launch_stream_with(const ProductLaunch& launch) {
  const int m = launch.arguments.m;
  if (launch.arguments.w.group_steps % 4 != 0) {
    m <= 8 ? launch_stream_kernel<Decoder, T, 8, kZeros, true>(launch)
           : launch_stream_kernel<Decoder, T, 16, kZeros, true>(launch);
  } else if (m == 1) {
    if constexpr (Decoder::kQuads) {
      if (launch.deal.stretches > 0) return launch_stream_kernel<Decoder, T, 1, kZeros, false, true>(launch);
    }
    launch_stream_kernel<Decoder, T, 1, kZeros, false>(launch);
  } else {
    m <= 8 ? launch_stream_kernel<Decoder, T, 8, kZeros, false>(launch)
           : launch_stream_kernel<Decoder, T, 16, kZeros, false>(launch);
  }
}

template <class Decoder, class T>
void launch_stream_of(const ProductLaunch& launch) {
  if constexpr (Decoder::kHasZeros) {
    if (launch.arguments.w.zeros != nullptr) return launch_stream_with<Decoder, T, true>(launch);
  }
  launch_stream_with<Decoder, T, false>(launch);
}

// m up to 16. Defined for each decoder in a translation unit of its own.
template <class Decoder>
void launch_stream(const ProductLaunch& launch) {
  launch.dtype == DType::f16 ? launch_stream_of<Decoder, __half>(launch)
                             : launch_stream_of<Decoder, __nv_bfloat16>(launch);
}

}  // namespace quantloom::cuda
