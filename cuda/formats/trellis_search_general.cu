// The forward search of trellis_general.cuh: a block for two rings, an edge at a time with each thread.
#include "common/check.cuh"
#include "common/shared_memory.cuh"
#include "formats/trellis_general.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr uint32_t kInfinities = 0x7C007C00U;
constexpr int kWarps = kSearchThreads / 32;

__device__ __forceinline__ int64_t tile_at(const SearchTask& task, int index) {
  return task.list == nullptr ? index : task.list[index];
}

__global__ void __launch_bounds__(kSearchThreads, 1) search(const SearchTask task, int64_t history_words) {
  __shared__ uint32_t least[2][kWarps];
  const TrellisShape shape = task.shape;
  const int ring_steps = shape.steps();
  const int thread = static_cast<int>(threadIdx.x);
  const int count = task.list == nullptr ? task.count : *task.list_size;
  // Costs before even steps, before odd steps, and the targets.
  uint32_t* const costs[2] = {dynamic_shared_memory<uint32_t>(),
                              dynamic_shared_memory<uint32_t>() + (kStates >> shape.step_bits(0))};
  auto* const targets = reinterpret_cast<PairTarget*>(costs[1] + (kStates >> shape.step_bits(1)));

  for (int group = static_cast<int>(blockIdx.x); 2 * group < count; group += static_cast<int>(gridDim.x)) {
    // A missing second ring repeats the last.
    const int64_t tiles[2] = {tile_at(task, 2 * group), tile_at(task, min(2 * group + 1, count - 1))};
    for (int i = thread; i < task.steps; i += kSearchThreads) {
      const int place = (task.first_position + i) % kRingPositions;
      PairTarget target{};
#pragma unroll
      for (int ring = 0; ring < 2; ++ring) {
        const float value = bounded_target(task.targets[tiles[ring] * kRingPositions + place]);
        const __half high = __float2half_rn(value);
        const __half low = __float2half_rn(value - __half2float(high));
        target.high |= static_cast<uint32_t>(__half_as_ushort(high)) << (16 * ring);
        target.low |= static_cast<uint32_t>(__half_as_ushort(low)) << (16 * ring);
      }
      targets[i] = target;
    }
    uint32_t* const first_costs = costs[task.first_position % 2];
    const int first_edges = kStates >> shape.step_bits(task.first_position);
    for (int edge = thread; edge < first_edges; edge += kSearchThreads) {
      uint32_t cost = 0;
      if (task.pins != nullptr) {
        if (task.pins[tiles[0]] != edge) cost |= kInfinities & 0xFFFFU;
        if (task.pins[tiles[1]] != edge) cost |= kInfinities & 0xFFFF0000U;
      }
      first_costs[edge] = cost;
    }
    __syncthreads();

    uint32_t* history = task.history + group * history_words;
    int position = task.first_position;
    for (int step = 0; step < task.steps; ++step) {
      const int next = position + 1 < ring_steps ? position + 1 : 0;
      const int fresh_bits = shape.step_bits(position);
      const int next_bits = shape.step_bits(next);
      const bool kept = step + 1 >= task.stop && step + 1 < task.steps;
      for (int edge = thread; edge < kStates >> next_bits; edge += kSearchThreads) {
        const uint32_t cost = least_cost(task.table, fresh_bits, next_bits, static_cast<uint32_t>(edge),
                                         costs[position % 2], targets[step]);
        costs[next % 2][edge] = cost;
        if (kept) history[edge] = cost;
      }
      if (kept) history += task.copy_words();
      position = next;
      __syncthreads();
    }

    if (task.pins == nullptr) {
      const auto* const halves = reinterpret_cast<const uint16_t*>(costs[position % 2]);
      const int edges = kStates >> shape.step_bits(position);
#pragma unroll
      for (int ring = 0; ring < 2; ++ring) {
        uint32_t best = 0xFFFFFFFFU;
        for (int edge = thread; edge < edges; edge += kSearchThreads) {
          best =
              min(best, static_cast<uint32_t>(halves[2 * edge + ring]) << 16 | static_cast<uint32_t>(edge));
        }
        best = __reduce_min_sync(kAllLanes, best);
        if (thread % 32 == 0) least[ring][thread / 32] = best;
      }
      __syncthreads();
      if (thread < 64) {
        const int ring = thread / 32;
        const uint32_t best = __reduce_min_sync(kAllLanes, least[ring][thread % 32]);
        if (thread % 32 == 0 && 2 * group + ring < count) {
          task.ends[tiles[ring]] = static_cast<uint16_t>(best & 0xFFFFU);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

int64_t general_search_memory(const SearchTask& task) {
  const int64_t edges = (kStates >> task.shape.step_bits(0)) + (kStates >> task.shape.step_bits(1));
  return edges * static_cast<int64_t>(sizeof(uint32_t)) +
         task.steps * static_cast<int64_t>(sizeof(PairTarget));
}

void search_general(const SearchTask& task, int processors, cudaStream_t stream) {
  const int64_t bytes = general_search_memory(task);
  check_cuda(
      cudaFuncSetAttribute(search, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "shared memory of the trellis search");
  const auto groups = static_cast<int>(ceil_div(task.count, 2));
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kSearchThreads);
  config.gridDim = dim3(static_cast<unsigned>(groups < processors ? groups : processors));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, search, task, task.history_words()), "launch of the trellis search");
}

}  // namespace quantloom::cuda
