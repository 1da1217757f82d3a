// The forward search of trellis_ring_pairs.cuh and trellis_state_pairs.cuh: a block for one ring or two.
#include <limits>

#include "common/check.cuh"
#include "common/shared_memory.cuh"
#include "formats/trellis_ring_pairs.cuh"
#include "formats/trellis_state_pairs.cuh"
#include "formats/trellis_walk.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kWarps = kSearchThreads / 32;
constexpr uint16_t kInfinity = 0x7C00;

template <class Scheme>
struct PairMemory {
  alignas(16) uint32_t even[Scheme::cost_words(0)];  // costs before even steps
  alignas(16) uint32_t odd[Scheme::cost_words(1)];
  alignas(16) uint32_t targets[kLongestSearch / Scheme::kWeights][Scheme::kTargetWords];
  uint32_t least[Scheme::kRings][kWarps];
  alignas(16) uint4 table[Scheme::kTableFours * kSearchThreads + 1];
};

__device__ __forceinline__ int64_t tile_at(const SearchTask& task, int index) {
  return task.list == nullptr ? index : task.list[index];
}

// Targets and first costs of the rings whose first is `first` of `count`; a missing second repeats it.
template <class Scheme>
__device__ void prepare(const SearchTask& task, int first, int count, PairMemory<Scheme>& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const costs = reinterpret_cast<uint16_t*>(memory.even);
  constexpr int kEdges = 2 * Scheme::cost_words(0) / Scheme::kRings;
#pragma unroll
  for (int ring = 0; ring < Scheme::kRings; ++ring) {
    const int64_t tile = tile_at(task, min(first + ring, count - 1));
    for (int i = thread; i < task.steps * Scheme::kWeights; i += kSearchThreads) {
      const int place = (task.first_position * Scheme::kWeights + i) % kRingPositions;
      const float target = bounded_target(task.targets[tile * kRingPositions + place]);
      const __half high = __float2half_rn(target);
      const __half low = __float2half_rn(target - __half2float(high));
      Scheme::put_target(memory.targets[i / Scheme::kWeights], ring, i % Scheme::kWeights,
                         __half_as_ushort(high), __half_as_ushort(low));
    }
    const int pin = task.pins == nullptr ? -1 : task.pins[tile];
    for (int edge = thread; edge < kEdges; edge += kSearchThreads) {
      costs[Scheme::cost_place(edge, ring)] = pin < 0 || pin == edge ? 0 : kInfinity;
    }
  }
  __syncthreads();
}

// The edges of least cost, of equal ones the first.
template <class Scheme>
__device__ void find_ends(const SearchTask& task, int first, int count, PairMemory<Scheme>& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto* const costs = reinterpret_cast<const uint16_t*>(memory.even);
  constexpr int kEdges = 2 * Scheme::cost_words(0) / Scheme::kRings;
#pragma unroll
  for (int ring = 0; ring < Scheme::kRings; ++ring) {
    uint32_t best = 0xFFFFFFFFU;
    for (int edge = thread; edge < kEdges; edge += kSearchThreads) {
      const uint32_t cost = costs[Scheme::cost_place(edge, ring)];
      best = min(best, cost << 16 | static_cast<uint32_t>(edge));
    }
    best = __reduce_min_sync(kAllLanes, best);
    if (thread % 32 == 0) memory.least[ring][thread / 32] = best;
  }
  __syncthreads();
  if (thread < 32 * Scheme::kRings) {
    const int ring = thread / 32;
    const uint32_t best = __reduce_min_sync(kAllLanes, memory.least[ring][thread % 32]);
    if (thread % 32 == 0 && first + ring < count) {
      task.ends[tile_at(task, first + ring)] = static_cast<uint16_t>(best & 0xFFFFU);
    }
  }
}

// Step number `step`, which is even or odd as kParity says.
template <class Scheme, int kParity>
__device__ __forceinline__ void advance(const SearchTask& task, const typename Scheme::Values& values,
                                        PairMemory<Scheme>& memory, int step, uint32_t*& history) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t* const from = kParity == 0 ? memory.even : memory.odd;
  uint32_t* const to = kParity == 0 ? memory.odd : memory.even;
  typename Scheme::Step<kParity> found;
  found.find(values, memory.table, from, memory.targets[step], thread);
  const int past_stop = step + 1 - task.stop;
  const bool kept = past_stop >= 0 && step + 1 < task.steps && past_stop % Scheme::kStride == 0;
  if (found.writes(thread)) {
    found.store(thread, to);
    if (kept) found.copy(thread, history);
  }
  if (kept) history += Scheme::kCopyWords;
  __syncthreads();
}

template <class Scheme>
__global__ void __launch_bounds__(kSearchThreads, 1) search(const SearchTask task, int64_t history_words) {
  auto& memory = *dynamic_shared_memory<PairMemory<Scheme>>();
  const int count = task.list == nullptr ? task.count : *task.list_size;
  typename Scheme::Values values;
  values.load(task.table, static_cast<int>(threadIdx.x), memory.table);

  for (int group = static_cast<int>(blockIdx.x); group * Scheme::kRings < count;
       group += static_cast<int>(gridDim.x)) {
    const int first = group * Scheme::kRings;
    prepare(task, first, count, memory);
    uint32_t* history = task.history + group * history_words;
    // All runs have an even number of steps and begin at an even one.
    for (int step = 0; step < task.steps; step += 2) {
      advance<Scheme, 0>(task, values, memory, step, history);
      advance<Scheme, 1>(task, values, memory, step + 1, history);
    }
    if (task.pins == nullptr) find_ends(task, first, count, memory);
    __syncthreads();
  }
}

struct Choice {
  void (*kernel)(SearchTask, int64_t);
  int64_t bytes;
};

template <class Scheme>
Choice choice_of() {
  return {&search<Scheme>, sizeof(PairMemory<Scheme>)};
}
template <int kBits>
Choice two_weights(bool alone) {
  return alone ? choice_of<StatePairs<kBits, 1>>() : choice_of<StatePairs<kBits, 2>>();
}

Choice choice_for(const SearchTask& task) {
  const int bits = task.shape.step_bits(0);
  if (task.shape.weights_per_step == 2) {
    switch (bits) {
      case 2:
        // The costs of two rings and half of the codebook are more than any device has.
        return choice_of<StatePairs<2, 1>>();
      case 3:
        return two_weights<3>(task.alone);
      case 4:
        return two_weights<4>(task.alone);
      case 5:
        return two_weights<5>(task.alone);
      case 6:
        return two_weights<6>(task.alone);
      case 7:
        return two_weights<7>(task.alone);
      default:
        return two_weights<8>(task.alone);
    }
  }
  switch (bits) {
    case 1:
      return choice_of<RingPairs<1>>();
    case 2:
      return choice_of<RingPairs<2>>();
    case 3:
      return choice_of<RingPairs<3>>();
    case 4:
      return choice_of<RingPairs<4>>();
    case 5:
      return choice_of<RingPairs<5>>();
    case 6:
      return choice_of<RingPairs<6>>();
    default:
      return choice_of<RingPairs<7>>();
  }
}

}  // namespace

int64_t pair_search_memory(const SearchTask& task) {
  return choice_for(task).bytes;
}

void search_pairs(const SearchTask& task, int processors, cudaStream_t stream) {
  const Choice choice = choice_for(task);
  check_cuda(cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(choice.bytes)),
             "shared memory of the trellis search");
  const auto groups = static_cast<int>(ceil_div(task.count, task.group()));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(groups < processors ? groups : processors));
  config.blockDim = dim3(kSearchThreads);
  config.dynamicSmemBytes = static_cast<size_t>(choice.bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, choice.kernel, task, task.history_words()),
             "launch of the trellis search");
}

}  // namespace quantloom::cuda
