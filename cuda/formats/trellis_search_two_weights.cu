// The forward search of trellis_two_weights.cuh: a block for one, two or four pairs of rings.
#include "common/check.cuh"
#include "common/shared_memory.cuh"
#include "formats/trellis_two_weights.cuh"
#include "formats/trellis_walk.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr uint32_t kInfinities = 0x7C007C00U;
constexpr int kWarps = kSearchThreads / 32;
constexpr int kMostSteps = kLongestSearch / 2;

__device__ __forceinline__ int64_t tile_at(const SearchTask& task, int index) {
  return task.list == nullptr ? index : task.list[index];
}

// Shared memory, in words.
template <int kWords>
struct Layout {
  QuadPlan plan;
  QUANTLOOM_TRELLIS int costs() const { return plan.edges() * kWords; }  // each of two
  QUANTLOOM_TRELLIS int partial() const { return plan.slices() > 1 ? kSearchThreads * kQuad * kWords : 0; }
  QUANTLOOM_TRELLIS int targets() const { return kMostSteps * 2 * kWords; }
  QUANTLOOM_TRELLIS int least() const { return 2 * kWords * kWarps; }
  QUANTLOOM_TRELLIS int64_t bytes() const {
    return int64_t{4} * (2 * costs() + partial() + targets() + least());
  }
};

// The rings of a block, from pair `first` on; what is missing repeats the last.
template <int kWords>
struct Rings {
  int64_t tiles[2 * kWords];
  int pairs;  // that exist

  __device__ Rings(const SearchTask& task, int first, int count)
      : pairs(min(kWords, (count + 1) / 2 - first)) {
#pragma unroll
    for (int r = 0; r < 2 * kWords; ++r) tiles[r] = tile_at(task, min(2 * first + r, count - 1));
  }
};

template <int kWords>
__device__ void load_targets(const SearchTask& task, const Rings<kWords>& rings, uint32_t* targets) {
  for (int i = static_cast<int>(threadIdx.x); i < task.steps * 2; i += kSearchThreads) {
    const int place = (task.first_position * 2 + i) % kRingPositions;
    // [step][first, second weight][word]
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t both = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float value = bounded_target(task.targets[rings.tiles[2 * w + r] * kRingPositions + place]);
        both |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(value))) << (16 * r);
      }
      targets[i * kWords + w] = both;
    }
  }
}

// The best last edges.
template <int kWords>
__device__ void find_ends(const SearchTask& task, const Rings<kWords>& rings, int first, int count, int edges,
                          const uint32_t* costs, uint32_t* least) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto* const halves = reinterpret_cast<const uint16_t*>(costs);
#pragma unroll
  for (int r = 0; r < 2 * kWords; ++r) {
    uint32_t best = 0xFFFFFFFFU;
    for (int edge = thread; edge < edges; edge += kSearchThreads) {
      const uint32_t cost = halves[2 * (cost_place<kWords>(edge) * kWords + r / 2) + r % 2];
      best = min(best, cost << 16 | static_cast<uint32_t>(edge));
    }
    best = __reduce_min_sync(kAllLanes, best);
    if (thread % 32 == 0) least[r * kWarps + thread / 32] = best;
  }
  __syncthreads();
  if (thread < 2 * kWords * 32) {
    const int r = thread / 32;
    const uint32_t best = __reduce_min_sync(kAllLanes, least[r * kWarps + thread % 32]);
    const int index = 2 * first + r;
    if (thread % 32 == 0 && index < count) {
      task.ends[tile_at(task, index)] = static_cast<uint16_t>(best & 0xFFFFU);
    }
  }
}

template <int kWords>
__global__ void __launch_bounds__(kSearchThreads, 1) search(const SearchTask task, int64_t history_words) {
  const int thread = static_cast<int>(threadIdx.x);
  const QuadPlan plan(task.shape.step_bits(0));
  const Layout<kWords> layout{plan};
  const int edges = plan.edges();
  const int quads = plan.quads();
  const int slices = plan.slices();
  uint32_t* costs = dynamic_shared_memory<uint32_t>();
  uint32_t* next = costs + layout.costs();
  uint32_t* const partial = next + layout.costs();
  uint32_t* const targets = partial + layout.partial();
  uint32_t* const least = targets + layout.targets();
  const int count = task.list == nullptr ? task.count : *task.list_size;

  for (int first = static_cast<int>(blockIdx.x) * kWords; 2 * first < count;
       first += static_cast<int>(gridDim.x) * kWords) {
    const Rings<kWords> rings(task, first, count);
    load_targets(task, rings, targets);
    for (int i = thread; i < edges * kWords; i += kSearchThreads) {
      uint32_t cost = 0;
      if (task.pins != nullptr) {
        const int edge = i / kWords;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          if (w != i % kWords) continue;
          if (task.pins[rings.tiles[2 * w]] != edge) cost |= kInfinities & 0xFFFFU;
          if (task.pins[rings.tiles[2 * w + 1]] != edge) cost |= kInfinities & 0xFFFF0000U;
        }
      }
      costs[cost_place<kWords>(i / kWords) * kWords + i % kWords] = cost;
    }
    __syncthreads();

    uint32_t* history = task.history + first * history_words;
    for (int step = 0; step < task.steps; ++step) {
      const bool kept = step + 1 >= task.stop && step + 1 < task.steps;
      StepTargets<kWords> wanted;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        wanted.first[w] = targets[2 * step * kWords + w];
        wanted.second[w] = targets[(2 * step + 1) * kWords + w];
      }
      for (int item = thread; item < quads * slices; item += kSearchThreads) {
        const int quad = item & (quads - 1);
        const int slice = item >> plan.quad_bits();
        QuadCosts<kWords> found;
        found.find(task.table, plan, quad, slice, costs, wanted);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint4 four =
              make_uint4(found.least[w][0], found.least[w][1], found.least[w][2], found.least[w][3]);
          if (slices > 1) {
            // [slice][word][quad]: neighbouring lanes write next to each other.
            reinterpret_cast<uint4*>(partial)[(slice * kWords + w) * quads + quad] = four;
            continue;
          }
          if (kept && w < rings.pairs) {
            reinterpret_cast<uint4*>(history + w * history_words)[quad] = four;
          }
        }
        if (slices == 1) found.store(quad, next);
      }
      if (slices > 1) {
        __syncthreads();
        for (int i = thread; i < edges * kWords; i += kSearchThreads) {
          uint32_t cost = partial[i];
          for (int s = 1; s < slices; ++s) {
            cost = pair_min(cost, partial[s * edges * kWords + i]);
          }
          const int word = i >> (plan.quad_bits() + 2);
          const int edge = i & (edges - 1);
          next[cost_place<kWords>(edge) * kWords + word] = cost;
          if (kept && word < rings.pairs) history[word * history_words + edge] = cost;
        }
      }
      if (kept) history += task.copy_words();
      uint32_t* const swap = costs;
      costs = next;
      next = swap;
      __syncthreads();
    }
    if (task.pins == nullptr) find_ends(task, rings, first, count, edges, costs, least);
    __syncthreads();
  }
}

template <int kWords>
void launch(const SearchTask& task, int processors, cudaStream_t stream) {
  const int64_t bytes = Layout<kWords>{QuadPlan(task.shape.step_bits(0))}.bytes();
  check_cuda(cudaFuncSetAttribute(search<kWords>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "shared memory of the trellis search");
  const int64_t blocks = ceil_div(task.count, int64_t{2} * kWords);
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kSearchThreads);
  config.gridDim = dim3(static_cast<unsigned>(blocks < processors ? blocks : processors));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, search<kWords>, task, task.history_words()),
             "launch of the trellis search");
}

}  // namespace

int64_t two_weights_search_memory(const SearchTask& task) {
  return Layout<1>{QuadPlan(task.shape.step_bits(0))}.bytes();
}

void search_two_weights(const SearchTask& task, int processors, cudaStream_t stream) {
  int device = 0;
  int shared = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory of the device");
  const QuadPlan plan(task.shape.step_bits(0));
  // Rounds over the processors, times what a block of so many rings takes.
  const auto cost = [&](int words, int64_t bytes, double block) {
    const int64_t blocks = ceil_div(task.count, int64_t{2} * words);
    return bytes > shared ? 1e30 : static_cast<double>(ceil_div(blocks, processors)) * block;
  };
  if (task.pairs != 0) {
    return task.pairs == 1   ? launch<1>(task, processors, stream)
           : task.pairs == 2 ? launch<2>(task, processors, stream)
                             : launch<4>(task, processors, stream);
  }
  const double one = cost(1, Layout<1>{plan}.bytes(), 1);
  const double two = cost(2, Layout<2>{plan}.bytes(), 1.5);
  const double four = cost(4, Layout<4>{plan}.bytes(), 2.4);
  if (four < two && four < one) return launch<4>(task, processors, stream);
  if (two < one) return launch<2>(task, processors, stream);
  launch<1>(task, processors, stream);
}

}  // namespace quantloom::cuda
