// The forward search: blocks of 1024 threads hold the codebook in registers and the costs of two rings in
// shared memory, and only costs are computed.
#include "common/bulk_copies.cuh"
#include "common/check.cuh"
#include "common/shared_memory.cuh"
#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr uint32_t kInfinities = 0x7C007C00U;
constexpr int kWarps = kSearchThreads / 32;
constexpr int64_t kFewCopies = int64_t{320} << 20;  // bytes

template <int kBits, int kRings>
struct SearchMemory {
  using Shape = SearchShape<kBits, kRings>;
  alignas(16) uint32_t costs[2][Shape::kCostWords];
  alignas(16) uint32_t high[kLongestSearch][Shape::kRings];  // targets, in the order of the steps
  alignas(16) uint32_t low[Shape::kExactTargets ? kLongestSearch : 1][Shape::kRings];
  uint32_t least[Shape::kRings][kWarps];
  uint32_t staging[kSearchThreads];
};

__device__ __forceinline__ uint32_t in_both_halves(__half value) {
  return static_cast<uint32_t>(__half_as_ushort(value)) * 0x10001U;
}

__device__ __forceinline__ int tile_of(const SearchTask& task, int index) {
  return task.list == nullptr ? index : task.list[index];
}

template <int kBits, int kRings>
__device__ __forceinline__ Targets targets_at(const SearchMemory<kBits, kRings>& memory, int step) {
  using Shape = SearchShape<kBits, kRings>;
  Targets targets{};
  if constexpr (Shape::kRings == 2) {
    const uint2 high = *reinterpret_cast<const uint2*>(memory.high[step]);
    targets.high[0] = high.x;
    targets.high[1] = high.y;
    if constexpr (Shape::kExactTargets) {
      const uint2 low = *reinterpret_cast<const uint2*>(memory.low[step]);
      targets.low[0] = low.x;
      targets.low[1] = low.y;
    }
  } else {
    targets.high[0] = memory.high[step][0];
  }
  return targets;
}

// Targets and first costs of the rings whose first is `first` of `count`; a missing second repeats the last.
template <int kBits, int kRings>
__device__ void prepare(const SearchTask& task, int first, int count, SearchMemory<kBits, kRings>& memory) {
  using Shape = SearchShape<kBits, kRings>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < Shape::kRings * task.steps; i += kSearchThreads) {
    const int ring = i % Shape::kRings;
    const int step = i / Shape::kRings;
    const int position = (task.first_position + step) % kRingPositions;
    const int64_t tile = tile_of(task, min(first + ring, count - 1));
    const float target = bounded_target(task.targets[tile * kRingPositions + position]);
    const __half high = __float2half_rn(target);
    memory.high[step][ring] = in_both_halves(high);
    if constexpr (Shape::kExactTargets) {
      memory.low[step][ring] = in_both_halves(__float2half_rn(target - __half2float(high)));
    }
  }
  const uint32_t fill = task.pins == nullptr ? 0 : kInfinities;
  for (int i = thread; i < Shape::kCostWords; i += kSearchThreads) memory.costs[0][i] = fill;
  __syncthreads();
  if (task.pins != nullptr && thread < Shape::kRings) {
    const int edge = task.pins[tile_of(task, min(first + thread, count - 1))];
    reinterpret_cast<uint16_t*>(memory.costs[0])[Shape::cost_place(edge, thread)] = 0;
  }
  __syncthreads();
}

// The edge of the least cost, of equal ones the first.
template <int kBits, int kRings>
__device__ void find_ends(const SearchTask& task, int first, int count, const uint32_t* costs,
                          SearchMemory<kBits, kRings>& memory) {
  using Shape = SearchShape<kBits, kRings>;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* const halves = reinterpret_cast<const uint16_t*>(costs);
#pragma unroll
  for (int ring = 0; ring < Shape::kRings; ++ring) {
    uint32_t least = 0xFFFFFFFFU;
    for (int edge = thread; edge < Shape::kEdges; edge += kSearchThreads) {
      const uint32_t cost = halves[Shape::cost_place(edge, ring)];
      least = min(least, cost << 16 | static_cast<uint32_t>(edge));
    }
    least = __reduce_min_sync(0xFFFFFFFFU, least);
    if (thread % 32 == 0) memory.least[ring][thread / 32] = least;
  }
  __syncthreads();
  if (thread / 32 < Shape::kRings) {
    const int ring = thread / 32;
    const uint32_t least = __reduce_min_sync(0xFFFFFFFFU, memory.least[ring][thread % 32]);
    if (thread % 32 == 0 && first + ring < count) {
      task.ends[tile_of(task, first + ring)] = static_cast<uint16_t>(least & 0xFFFFU);
    }
  }
}

// Step number `step`, from 0, which reads costs[kFrom]. Copies follow each other in `history`.
template <int kBits, int kRings, bool kBulk, int kFrom>
__device__ __forceinline__ void advance(const SearchTask& task, const uint32_t (&values)[kValueWords],
                                        int step, SearchMemory<kBits, kRings>& memory, uint32_t*& history) {
  using Shape = SearchShape<kBits, kRings>;
  using Step = SearchStep<kBits, kRings>;
  const int thread = static_cast<int>(threadIdx.x);
  typename Step::Outputs outputs;
  Step::run(values, targets_at(memory, step), memory.costs[kFrom], thread, outputs);
  if constexpr (!Shape::kPairsOfGroups) {
#pragma unroll
    for (int other = 1; other < Step::kParts; other *= 2) {
      outputs.words[0] = pair_min(outputs.words[0], __shfl_xor_sync(0xFFFFFFFFU, outputs.words[0], other));
    }
  }
  Step::store(outputs, thread, memory.costs[1 - kFrom]);
  // task.stop and task.steps are multiples of the stride, and even.
  constexpr int kStride = kCopyStride<kBits>;
  bool kept = false;
  if constexpr (kStride == 1 || kFrom == 1) {
    const auto past_stop = static_cast<unsigned>(step + 1 - task.stop);
    if (past_stop < static_cast<unsigned>(task.steps - task.stop) && past_stop % kStride == 0) {
      kept = true;
      if constexpr (!kBulk) {
        Step::copy(outputs, thread, history);
        history += Shape::kCopyWords;
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kBulk) {
    if (kept) order_for_bulk_copies();
    // The next step writes where the last copy reads.
    if (thread == 0) wait_for_reads();
    __syncthreads();
    if (kept) {
      if (thread == 0) {
        const uint32_t* const costs = memory.costs[1 - kFrom];
        copy_bulk_out(history, static_cast<uint32_t>(__cvta_generic_to_shared(costs)), 4 * Shape::kCopyWords);
      }
      history += Shape::kCopyWords;
    }
    return;
  }
#endif
  __syncthreads();
}

template <int kBits, int kRings, bool kBulk>
__global__ void __launch_bounds__(kSearchThreads, 1) search(const SearchTask task, int64_t history_words) {
  using Shape = SearchShape<kBits, kRings>;
  auto& memory = *dynamic_shared_memory<SearchMemory<kBits, kRings>>();
  const int thread = static_cast<int>(threadIdx.x);
  const int count = task.list == nullptr ? task.count : *task.list_size;
  uint32_t values[kValueWords];
  SearchStep<kBits, kRings>::load_values(task.table, thread, memory.staging[thread], values);

  for (int group = static_cast<int>(blockIdx.x); group * Shape::kRings < count;
       group += static_cast<int>(gridDim.x)) {
    const int first = group * Shape::kRings;
    prepare(task, first, count, memory);
    uint32_t* history = task.history + group * history_words;
    for (int step = 0; step < task.steps; step += 2) {
      advance<kBits, kRings, kBulk, 0>(task, values, step, memory, history);
      advance<kBits, kRings, kBulk, 1>(task, values, step + 1, memory, history);
    }
    if (task.pins == nullptr) find_ends(task, first, count, memory.costs[0], memory);
    __syncthreads();
  }
#if __CUDA_ARCH__ >= 900
  if (kBulk && thread == 0) wait_for_writes();
#endif
}

template <int kBits, int kRings, bool kBulk>
void launch(const SearchTask& task, int processors, cudaStream_t stream) {
  const auto bytes = static_cast<int>(sizeof(SearchMemory<kBits, kRings>));
  check_cuda(
      cudaFuncSetAttribute(search<kBits, kRings, kBulk>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "shared memory of the trellis search");
  const auto groups = static_cast<int>(ceil_div(task.count, kRings));
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kSearchThreads);
  config.gridDim = dim3(static_cast<unsigned>(groups < processors ? groups : processors));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, search<kBits, kRings, kBulk>, task, task.history_words()),
             "launch of the trellis search");
}

}  // namespace

int64_t search_memory(const SearchTask& task) {
  if (task.shape.weights_per_step == 2) return two_weights_search_memory(task);
  if (!task.plain()) return pair_search_memory(task);
  int64_t bytes = 0;
  with_bits(task.bits(), [&]<int kBits>() { bytes = sizeof(SearchMemory<kBits, most_rings(kBits)>); });
  return bytes;
}

void plan_search(SearchTask& task, int processors, int shared_memory) {
  const auto fits = [&](bool alone) {
    task.alone = alone;
    return pair_search_memory(task) <= shared_memory;
  };
  task.on_chip = task.shape.weights_per_step == 2 && fits(true);
  // A ring alone takes 0.56 to 0.65 of the time of two.
  const auto rounds = [&](int rings) {
    return static_cast<double>(ceil_div(task.count, rings * processors));
  };
  task.alone = 0.65 * rounds(1) < rounds(2) || (task.on_chip && (task.shape.half_bits == 2 || !fits(false)));
  // The ways back read a few bytes of each copy, one after the other. Whole copies come in less time where
  // they are few.
  const int64_t bytes = ceil_div(task.count, task.group()) * task.history_words() * int64_t{sizeof(uint32_t)};
  task.fetch_ahead = bytes <= kFewCopies;
}

void search_rings(const SearchTask& task, int processors, cudaStream_t stream) {
  if (task.shape.weights_per_step == 2 && !task.on_chip) return search_two_weights(task, processors, stream);
  if (!task.plain()) return search_pairs(task, processors, stream);
  with_bits(task.bits(), [&]<int kBits>() {
    constexpr int kRings = most_rings(kBits);
    if constexpr (SearchShape<kBits>::kPairsOfGroups) {
      if (kRings > 1 && task.alone) {
        return task.bulk ? launch<kBits, 1, true>(task, processors, stream)
                         : launch<kBits, 1, false>(task, processors, stream);
      }
      if (task.bulk) return launch<kBits, kRings, true>(task, processors, stream);
    }
    launch<kBits, kRings, false>(task, processors, stream);
  });
}

}  // namespace quantloom::cuda
