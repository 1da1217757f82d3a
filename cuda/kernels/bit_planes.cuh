// The streaming product with planes of bits: teams of thread blocks walk through the row blocks as
// stream_loop.cuh describes.
#pragma once

#include "kernels/bit_plane_walk.cuh"
#include "kernels/stream_sums.cuh"

namespace quantloom::cuda {

// Grid: [deal.teams * deal.blocks]; the blocks of a team are a cluster. kTokens: 1, 8 or 16.
template <class T, int kPlanes, int kTokens, bool kFine>
__global__ void __launch_bounds__(32 * bit_plane_warps(kPlanes, kTokens, kFine), 1)
    multiply_bit_planes(const __grid_constant__ BitPlaneLaunch launch) {
  // The bits of the activations, and the parts of the sums.
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t delivery;
  const ProductArguments& p = launch.arguments;
  const StreamDeal& deal = launch.deal;
  const int warps = static_cast<int>(blockDim.x / 32);
  let_next_begin();
  const StreamSums<T, kTokens> team(
      p, deal, reinterpret_cast<float*>(memory + int64_t{deal.stretches} * kBitStretchBytes), &delivery);
  const StreamRuns& runs = team.runs();
  const int warp = team.rank() * warps + static_cast<int>(threadIdx.x / 32);
  const bool takes_part = warp < deal.warps;
  const int begin = takes_part ? runs.begin(warp) : 0;
  const int end = takes_part ? runs.begin(warp + 1) : 0;
  const auto leave = [&](int row, const auto& sums) { team.leave(warp, row, sums); };
  if constexpr (kTokens == 1) {
    BitPlaneCounts<kPlanes, kFine> walk(launch);
    const int first = runs.begin(min(team.rank() * warps, deal.warps));
    const int count = runs.begin(min((team.rank() + 1) * warps, deal.warps)) - first;
    const auto row = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(first)));
    const BitDigits digits(memory, first - row * p.w.column_blocks, count, p.w.column_blocks);
    // Activations are needed first, and loads return in order; but they must not be read before the
    // previous kernel has ended, as signs may.
    uint4 raw{};
    if (!p.overlap) raw = digits.load_first<T>(p);
    walk.begin(deal, team.first_row(), begin, end);
    wait_for_previous();
    if (p.overlap) raw = digits.load_first<T>(p);
    digits.fill<T>(p, raw);
    team.expect();
    __syncthreads();
    walk.run(digits, leave);
  } else {
    BitPlaneHalves<T, kPlanes, kTokens / 8, kFine> walk(launch);
    walk.begin(deal, team.first_row(), begin, end);
    wait_for_previous();
    team.expect();
    walk.run(leave);
  }
  team.finish();
}

template <class T, int kPlanes, int kTokens, bool kFine>
void launch_bit_plane_kernel(const BitPlaneLaunch& launch) {
  const StreamDeal& deal = launch.deal;
  const auto shared = static_cast<int>(int64_t{deal.stretches} * kBitStretchBytes +
                                       stream_parts_bytes(deal, launch.arguments.m));
  LaunchSettings settings(dim3(static_cast<unsigned>(deal.teams * deal.blocks)),
                          dim3(32 * bit_plane_warps(kPlanes, kTokens, kFine)), launch.stream, launch.overlap,
                          deal.blocks);
  const auto kernel = multiply_bit_planes<T, kPlanes, kTokens, kFine>;
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_bit_planes");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, launch),
             "matmul_cuda: launch of multiply_bit_planes");
}

template <class T, int kPlanes, bool kFine>
void launch_bit_planes_of(const BitPlaneLaunch& launch) {
  const int m = launch.arguments.m;
  if (m == 1) return launch_bit_plane_kernel<T, kPlanes, 1, kFine>(launch);
  m <= 8 ? launch_bit_plane_kernel<T, kPlanes, 8, kFine>(launch)
         : launch_bit_plane_kernel<T, kPlanes, 16, kFine>(launch);
}

template <class T, int kPlanes>
void launch_bit_planes_with(const BitPlaneLaunch& launch) {
  launch.fine() ? launch_bit_planes_of<T, kPlanes, true>(launch)
                : launch_bit_planes_of<T, kPlanes, false>(launch);
}

template <int kPlanes>
void launch_bit_planes(const BitPlaneLaunch& launch) {
  launch.dtype == DType::f16 ? launch_bit_planes_with<__half, kPlanes>(launch)
                             : launch_bit_planes_with<__nv_bfloat16, kPlanes>(launch);
}

}  // namespace quantloom::cuda
