// The forward search of trellis_ring_pairs.cuh: a block, or a cluster of two or four, for two rings.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/check.cuh"
#include "common/cluster.cuh"
#include "common/shared_memory.cuh"
#include "formats/trellis_ring_pairs.cuh"
#include "formats/trellis_walk.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr uint32_t kInfinities = 0x7C007C00U;
constexpr int kWarps = kSearchThreads / 32;

// Steps of kEven and of kOdd fresh bits, in turn.
template <int kWeights, int kEven, int kOdd, int kBlocks>
struct PairKernel {
  using Shape = PairShape<kWeights, (kEven > kOdd ? kEven : kOdd), kBlocks>;
  using Values = PairValues<Shape, kWeights>;
  static constexpr int kSteps = kLongestSearch / kWeights;
  static constexpr int kStride = kWeights == 2 ? 1 : half_copy_stride(kEven);
  static constexpr int kCopyWords = kStates >> (kEven < kOdd ? kEven : kOdd);

  struct Memory {
    alignas(16) uint32_t even[kStates >> kEven];  // costs before even steps
    alignas(16) uint32_t odd[kStates >> kOdd];
    alignas(16) uint32_t targets[kSteps][Shape::kTargetWords];
    uint32_t least[2][kWarps];
  };
  static constexpr int64_t kBytes = sizeof(Memory) + Shape::kMemoryFours * kSearchThreads * sizeof(uint4);
};

__device__ __forceinline__ int64_t tile_at(const SearchTask& task, int index) {
  return task.list == nullptr ? index : task.list[index];
}

template <int kBlocks>
__device__ __forceinline__ void meet() {
  if constexpr (kBlocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// Targets and first costs of a pair of rings; a missing second repeats the first.
template <class Kernel, int kWeights>
__device__ void prepare(const SearchTask& task, const int64_t (&tiles)[2], typename Kernel::Memory& memory) {
  using Shape = typename Kernel::Shape;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < task.steps * kWeights; i += kSearchThreads) {
    const int place = (task.first_position * kWeights + i) % kRingPositions;
    uint32_t high = 0;
    uint32_t low = 0;
#pragma unroll
    for (int ring = 0; ring < 2; ++ring) {
      const float value = bounded_target(task.targets[tiles[ring] * kRingPositions + place]);
      const __half near = __float2half_rn(value);
      high |= static_cast<uint32_t>(__half_as_ushort(near)) << (16 * ring);
      low |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(value - __half2float(near))))
             << (16 * ring);
    }
    if constexpr (kWeights == 2) {
      memory.targets[i / 2][i % 2] = high;
    } else {
      memory.targets[i][0] = high;
      if constexpr (Shape::kExactTargets) memory.targets[i][1] = low;
    }
  }
  const int edges = static_cast<int>(sizeof(memory.even) / sizeof(uint32_t));
  for (int edge = thread; edge < edges; edge += kSearchThreads) {
    uint32_t cost = 0;
    if (task.pins != nullptr) {
      if (task.pins[tiles[0]] != edge) cost |= kInfinities & 0xFFFFU;
      if (task.pins[tiles[1]] != edge) cost |= kInfinities & 0xFFFF0000U;
    }
    memory.even[pair_place(edge)] = cost;
  }
  __syncthreads();
}

// The edges of least cost, of equal ones the first.
template <class Memory>
__device__ void find_ends(const SearchTask& task, const int64_t (&tiles)[2], bool both, Memory& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto* const halves = reinterpret_cast<const uint16_t*>(memory.even);
  const int edges = static_cast<int>(sizeof(memory.even) / sizeof(uint32_t));
#pragma unroll
  for (int ring = 0; ring < 2; ++ring) {
    uint32_t best = 0xFFFFFFFFU;
    for (int edge = thread; edge < edges; edge += kSearchThreads) {
      const uint32_t cost = halves[2 * pair_place(edge) + ring];
      best = min(best, cost << 16 | static_cast<uint32_t>(edge));
    }
    best = __reduce_min_sync(kAllLanes, best);
    if (thread % 32 == 0) memory.least[ring][thread / 32] = best;
  }
  __syncthreads();
  if (thread < 64) {
    const int ring = thread / 32;
    const uint32_t best = __reduce_min_sync(kAllLanes, memory.least[ring][thread % 32]);
    if (thread % 32 == 0 && (ring == 0 || both)) {
      task.ends[tiles[ring]] = static_cast<uint16_t>(best & 0xFFFFU);
    }
  }
}

// Step number `step`, of kNow fresh bits, from costs[kNow's] to the others.
template <class Kernel, int kWeights, int kNow, int kNext, int kBlocks>
__device__ __forceinline__ void advance(const SearchTask& task, const typename Kernel::Values& values,
                                        const uint4* table, const uint32_t* from, uint32_t* to,
                                        const typename Kernel::Memory& memory, int step, int rank,
                                        uint32_t*& history) {
  using Shape = typename Kernel::Shape;
  using Step = RingPairStep<kWeights, kNow, kNext, kBlocks>;
  static_assert(std::is_same_v<typename Step::Shape, Shape>);
  const int thread = static_cast<int>(threadIdx.x);
  const int middle = Shape::middle_of(thread, rank);
  PairTargets targets{};
  if constexpr (Shape::kTargetWords == 2) {
    const uint2 words = *reinterpret_cast<const uint2*>(memory.targets[step]);
    targets = {words.x, words.y};
  } else {
    targets.first = memory.targets[step][0];
  }
  Step found;
  found.find(values, table, from, targets, middle, thread);
  found.share(thread);

  const int past_stop = step + 1 - task.stop;
  const bool kept = past_stop >= 0 && step + 1 < task.steps && past_stop % Kernel::kStride == 0;
  const int first = Step::first_edge(middle, thread);
  if (Step::writes(thread)) {
    const int place = pair_place(first);
#pragma unroll
    for (int run = 0; run < Step::kRuns; ++run) {
      if constexpr (kBlocks == 1) {
        found.write(run, to + place + (run << 12));
      } else {
        // The edges that lead to another block's states are its to have; of the last step block 0 has all.
        constexpr int kOwnerBit = 8 - Shape::kBlockBits - kNext;
        const bool all = kOwnerBit <= 0 || step + 1 == task.steps;
        const int owner = kOwnerBit <= 0 ? 0 : first >> (kOwnerBit > 0 ? kOwnerBit : 0) & (kBlocks - 1);
        auto* const here = reinterpret_cast<float*>(to + place + (run << 12));
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if (!all && block > 0) break;
          found.write(run, reinterpret_cast<uint32_t*>(cluster_place(here, all ? block : owner)));
        }
      }
      if (kept) found.write(run, history + first + (run << 12));
    }
  }
  if (kept) history += Kernel::kCopyWords;
  meet<kBlocks>();
}

template <int kWeights, int kEven, int kOdd, int kBlocks>
__global__ void __launch_bounds__(kSearchThreads, 1) search(const SearchTask task, int64_t history_words) {
  using Kernel = PairKernel<kWeights, kEven, kOdd, kBlocks>;
  auto& memory = *dynamic_shared_memory<typename Kernel::Memory>();
  auto* const table = reinterpret_cast<uint4*>(&memory + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(blockIdx.x) % kBlocks;
  const int count = task.list == nullptr ? task.count : *task.list_size;
  if constexpr (kBlocks > 1) cluster_begin();
  typename Kernel::Values values;
  values.load(task.table, Kernel::Shape::middle_of(thread, rank), thread, table);
  if constexpr (kBlocks > 1) cluster_wait();

  const int stride = static_cast<int>(gridDim.x) / kBlocks;
  for (int pair = static_cast<int>(blockIdx.x) / kBlocks; 2 * pair < count; pair += stride) {
    const bool both = 2 * pair + 1 < count;
    const int64_t tiles[2] = {tile_at(task, 2 * pair), tile_at(task, 2 * pair + (both ? 1 : 0))};
    prepare<Kernel, kWeights>(task, tiles, memory);
    uint32_t* history = task.history + pair * history_words;
    for (int step = 0; step < task.steps; step += 2) {
      advance<Kernel, kWeights, kEven, kOdd, kBlocks>(task, values, table, memory.even, memory.odd, memory,
                                                      step, rank, history);
      advance<Kernel, kWeights, kOdd, kEven, kBlocks>(task, values, table, memory.odd, memory.even, memory,
                                                      step + 1, rank, history);
    }
    if (task.pins == nullptr && rank == 0) find_ends(task, tiles, both, memory);
    __syncthreads();
  }
}

// A kernel and how it is launched.
struct Choice {
  void (*kernel)(SearchTask, int64_t) = nullptr;
  int blocks = 1;
  int64_t bytes = 0;
};

template <int kWeights, int kEven, int kOdd, int kBlocks>
Choice make_choice() {
  using Kernel = PairKernel<kWeights, kEven, kOdd, kBlocks>;
  return {&search<kWeights, kEven, kOdd, kBlocks>, kBlocks, Kernel::kBytes};
}

template <int kBlocks>
Choice two_weights(int bits) {
  switch (bits) {
    case 2:
      // In one block the costs and half of the codebook are more than any device has.
      if constexpr (kBlocks == 1) {
        return {};
      } else {
        return make_choice<2, 2, 2, kBlocks>();
      }
    case 3:
      return make_choice<2, 3, 3, kBlocks>();
    case 4:
      return make_choice<2, 4, 4, kBlocks>();
    case 5:
      return make_choice<2, 5, 5, kBlocks>();
    case 6:
      return make_choice<2, 6, 6, kBlocks>();
    case 7:
      return make_choice<2, 7, 7, kBlocks>();
    default:
      return make_choice<2, 8, 8, kBlocks>();
  }
}

Choice half_bits(int bits) {
  switch (bits) {
    case 1:
      return make_choice<1, 1, 2, 1>();
    case 2:
      return make_choice<1, 2, 3, 1>();
    case 3:
      return make_choice<1, 3, 4, 1>();
    case 4:
      return make_choice<1, 4, 5, 1>();
    case 5:
      return make_choice<1, 5, 6, 1>();
    case 6:
      return make_choice<1, 6, 7, 1>();
    default:
      return make_choice<1, 7, 8, 1>();
  }
}

Choice choice_for(const SearchTask& task, int blocks) {
  const int bits = task.shape.step_bits(0);
  if (task.shape.weights_per_step == 1) return half_bits(bits);
  return blocks == 1 ? two_weights<1>(bits) : blocks == 2 ? two_weights<2>(bits) : two_weights<4>(bits);
}

// The settings of a launch.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster;

  Launch(const Choice& choice, int64_t blocks, cudaStream_t stream) {
    check_cuda(cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(choice.bytes)),
               "shared memory of the trellis search");
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kSearchThreads);
    config.dynamicSmemBytes = static_cast<size_t>(choice.bytes);
    config.stream = stream;
    if (choice.blocks > 1) {
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(choice.blocks), 1, 1};
      config.attrs = &cluster;
      config.numAttrs = 1;
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

}  // namespace

int64_t pair_search_memory(const SearchTask& task, int blocks) {
  const Choice choice = choice_for(task, blocks);
  return choice.kernel == nullptr ? std::numeric_limits<int64_t>::max() : choice.bytes;
}

int pairs_at_once(const SearchTask& task, int blocks, int processors) {
  if (blocks == 1) return processors;
  const Choice choice = choice_for(task, blocks);
  const Launch launch(choice, int64_t{processors} / blocks * blocks, nullptr);
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, choice.kernel, &launch.config),
             "clusters that run at the same time");
  return clusters;
}

void search_pairs(const SearchTask& task, int blocks, int processors, cudaStream_t stream) {
  const Choice choice = choice_for(task, blocks);
  const int64_t pairs = ceil_div(task.count, 2);
  const int64_t most = std::max(pairs_at_once(task, blocks, processors), 1);
  const Launch launch(choice, std::min(pairs, most) * blocks, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, choice.kernel, task, task.history_words()),
             "launch of the trellis search");
}

}  // namespace quantloom::cuda
