#include <algorithm>
#include <cmath>

#include "additive/code_walk.cuh"
#include "additive/thread_scores.cuh"
#include "additive/tile_scores.cuh"
#include "common/check.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kPlainThreads = 256;
constexpr int kPlainStates = 16;
constexpr int kFewThreads = 256;  // of tiles, for tables of few entries
constexpr int kManyThreads = 512;
constexpr int kWeighThreads = 256;

// Scores by the definition, in any type.
template <class Real, int kKept>
struct PlainScorer {
  static __device__ __forceinline__ Real factor_of(Real wanted, Real scale, Real /*unit*/) {
    return -2 * scale * wanted;
  }
  static __device__ __forceinline__ Real worth_of(Real /*scale*/, Real /*unit*/) { return 1; }
  static __device__ __forceinline__ Real square_of(Real scale) { return scale * scale; }

  __device__ __forceinline__ Nothing prefetch(const WalkTask<Real>& /*task*/, const WalkMemory& /*memory*/,
                                              const ScoreTask<Real>& /*scores*/, int /*book*/) const {
    return {};
  }

  __device__ __forceinline__ void score(const WalkTask<Real>& task, const WalkMemory& memory,
                                        const WalkState<Real>& state, const ScoreTask<Real>& scores,
                                        const uint16_t* codes, int /*book*/, int states, int live,
                                        Nothing /*first*/) const {
    const int warps = static_cast<int>(blockDim.x / 32);
    for (int s = static_cast<int>(threadIdx.x / 32); s < states; s += warps) {
      if (s % task.beam >= live) continue;
      const Real* const factors = state.factors + s * memory.dim;
      const int present = codes[s * memory.run_codes];
      const Real base = score_of(scores, factors, state.squares[s], present);
      score_all<Real, kKept>(scores, factors, state.squares[s], task.beam, state.scores + s * task.beam,
                             state.found + s * task.beam);
      if (threadIdx.x % 32 == 0) {
        state.bases[s] = base;
        // Of scores that are no numbers none is less.
        for (int i = 0; i < task.beam; ++i) {
          int& code = state.found[s * task.beam + i];
          if (code == kNoCode && task.beam == 1) code = present;
        }
      }
    }
  }
};

template <int kPadded, int kKept>
__global__ void __launch_bounds__(kEntryThreads, 2) thread_kernel(WalkTask<float> task, WalkMemory memory) {
  walk(task, memory, ThreadScorer<kPadded, kKept>());
}

template <class Real, int kKept>
__global__ void __launch_bounds__(kPlainThreads) plain_kernel(WalkTask<Real> task, WalkMemory memory) {
  walk(task, memory, PlainScorer<Real, kKept>());
}

template <int kTiles, int kSteps, int kKept>
__global__ void __launch_bounds__(kManyThreads, 1) tile_kernel(WalkTask<float> task, WalkMemory memory) {
  walk(task, memory, TileScorer<kTiles, kSteps, kKept>());
}

template <class Real>
__global__ void __launch_bounds__(kWeighThreads)
    weigh_kernel(WalkTask<Real> task, Real* norms, Real* units, float reach) {
  const int block = static_cast<int>(blockIdx.y);
  const int book = static_cast<int>(blockIdx.z);
  const int g = task.in_group;
  const int64_t first = (task.first_block + block) * g;
  const Real* const h = task.h + first * task.columns + first;
  Real unit = 1;
  if (reach > 0) {
    Real most = 0;
    for (int i = 0; i < g; ++i) most = max(most, h[i * task.columns + i]);
    // Factors of usual size come near 2^4, so that float16 leaves them room both ways.
    most *= reach;
    if (most > 0 && isfinite(most)) unit = ldexp(static_cast<Real>(1), min(max(4 - ilogb(most), -60), 60));
  }
  if (blockIdx.x == 0 && book == 0 && threadIdx.x == 0) units[block] = unit;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kWeighThreads + threadIdx.x;
  if (entry >= task.padded) return;
  Real sum = static_cast<Real>(INFINITY);
  if (entry < task.entries) {
    sum = 0;
    const Real* const elements =
        task.elements + static_cast<int64_t>(book) * task.out_group * g * task.padded + entry;
    for (int a = 0; a < task.out_group; ++a) {
      for (int i = 0; i < g; ++i) {
        Real inner = 0;
        for (int j = 0; j < i; ++j)
          inner = fma(h[i * task.columns + j], elements[(a * g + j) * task.padded], inner);
        const Real own = elements[(a * g + i) * task.padded];
        inner = fma(h[i * task.columns + i], own, inner + inner);
        sum = fma(own, inner, sum);
      }
    }
    sum *= unit;
  }
  norms[(static_cast<int64_t>(block) * task.codebooks + book) * task.padded + entry] = sum;
}

int attribute(cudaDeviceAttr what) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&value, what, device), "attribute of a CUDA device");
  return value;
}

template <class Real>
WalkMemory memory_of(const WalkTask<Real>& task, int states) {
  WalkMemory memory{};
  memory.states = states;
  memory.width = task.run_blocks * task.in_group;
  memory.row = task.out_group * memory.width;
  memory.dim = task.out_group * task.in_group;
  memory.run_codes = task.run_blocks * task.codebooks;
  memory.beam = task.beam;
  return memory;
}

int kept_of(int beam) {
  return beam == 1 ? 1 : (beam <= 4 ? 4 : kMostBeam);
}

// Tiles of 16 states for a thread block: as many as make good use of what each loads of a table, and leave no
// processor without work.
template <class Real>
int tiles_of(const WalkTask<Real>& task) {
  const int kept = kept_of(task.beam);
  const int most = kept == 1 ? 4 : (kept == 4 ? 2 : 1);
  if (task.padded / kEntryTile < kManyThreads / 32) return 1;
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount);
  int best = 1;
  int64_t least = 0;
  for (int tiles = 1; tiles <= most; tiles *= 2) {
    const int64_t waves = ceil_div(ceil_div(task.count, int64_t{16} * tiles / task.beam), processors);
    const int64_t cost = waves * (16 * tiles + 24);
    if (tiles == 1 || cost < least) {
      least = cost;
      best = tiles;
    }
  }
  return best;
}

template <class Real, class Kernel>
void launch(const WalkTask<Real>& task, const WalkMemory& memory, int threads, Kernel kernel,
            cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(memory.bytes<Real>());
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "shared memory of a search");
  const int64_t blocks = ceil_div(task.count, int64_t{memory.states} / memory.beam);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(task, memory);
  check_cuda(cudaGetLastError(), "launch of a search");
}

template <class Real>
void walk_plain(const WalkTask<Real>& task, cudaStream_t stream) {
  const WalkMemory memory = memory_of(task, kPlainStates);
  switch (kept_of(task.beam)) {
    case 1:
      return launch(task, memory, kPlainThreads, plain_kernel<Real, 1>, stream);
    case 4:
      return launch(task, memory, kPlainThreads, plain_kernel<Real, 4>, stream);
    default:
      return launch(task, memory, kPlainThreads, plain_kernel<Real, kMostBeam>, stream);
  }
}

template <int kPadded>
void walk_threads(const WalkTask<float>& task, cudaStream_t stream) {
  WalkMemory memory = memory_of(task, kPlainStates);
  memory.splits = kEntryThreads / 32;
  memory.kept = kept_of(task.beam);
  switch (memory.kept) {
    case 1:
      return launch(task, memory, kEntryThreads, thread_kernel<kPadded, 1>, stream);
    case 4:
      return launch(task, memory, kEntryThreads, thread_kernel<kPadded, 4>, stream);
    default:
      return launch(task, memory, kEntryThreads, thread_kernel<kPadded, kMostBeam>, stream);
  }
}

template <int kSteps>
void walk_tiles(const WalkTask<float>& task, cudaStream_t stream) {
  const int tiles = tiles_of(task);
  WalkMemory memory = memory_of(task, 16 * tiles);
  const int threads = task.padded / kEntryTile < kManyThreads / 32 ? kFewThreads : kManyThreads;
  memory.splits = static_cast<int>(std::min<int64_t>(threads / 32, task.padded / kEntryTile));
  memory.kept = kept_of(task.beam);
  switch (memory.kept * 10 + tiles) {
    case 11:
      return launch(task, memory, threads, tile_kernel<1, kSteps, 1>, stream);
    case 12:
      return launch(task, memory, threads, tile_kernel<2, kSteps, 1>, stream);
    case 14:
      return launch(task, memory, threads, tile_kernel<4, kSteps, 1>, stream);
    case 41:
      return launch(task, memory, threads, tile_kernel<1, kSteps, 4>, stream);
    case 42:
      return launch(task, memory, threads, tile_kernel<2, kSteps, 4>, stream);
    default:
      return launch(task, memory, threads, tile_kernel<1, kSteps, kMostBeam>, stream);
  }
}

}  // namespace

template <class Real>
void weigh_entries(const WalkTask<Real>& task, Real* norms, Real* units, float reach, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(task.padded, kWeighThreads)),
                  static_cast<unsigned>(task.run_blocks), static_cast<unsigned>(task.codebooks));
  weigh_kernel<<<grid, kWeighThreads, 0, stream>>>(task, norms, units, reach);
  check_cuda(cudaGetLastError(), "launch of weigh");
}

template <class Real>
Scoring scoring_of(const WalkTask<Real>& task) {
  if (sizeof(Real) == 8) return Scoring::plain;
  if (task.penalties == nullptr) return Scoring::tiles;
  return task.entries <= kMostThreadEntries ? Scoring::threads : Scoring::plain;
}

template <class Real>
void walk_run(const WalkTask<Real>& task, Scoring scoring, cudaStream_t stream) {
  if constexpr (std::is_same_v<Real, float>) {
    const bool small = task.out_group * task.in_group <= 8;
    if (scoring == Scoring::threads)
      return small ? walk_threads<8>(task, stream) : walk_threads<16>(task, stream);
    if (scoring == Scoring::tiles) return small ? walk_tiles<1>(task, stream) : walk_tiles<2>(task, stream);
  }
  walk_plain(task, stream);
}

template <class Real>
int widest_run(const WalkTask<Real>& task) {
  constexpr int kMostColumns = sizeof(Real) == 4 ? 128 : 64;
  const int64_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  WalkTask<Real> run = task;
  run.run_blocks = std::max(kMostColumns / task.in_group, 1);
  run.run_blocks = static_cast<int>(std::min<int64_t>(run.run_blocks, task.blocks));
  const auto fits = [&] {
    WalkMemory memory = memory_of(run, kPlainStates);
    memory.splits = kManyThreads / 32;
    memory.kept = kept_of(task.beam);
    if (sizeof(Real) == 4) memory.states = kept_of(task.beam) == 1 ? 64 : 32;
    return memory.bytes<Real>() <= limit;
  };
  while (run.run_blocks > 1 && !fits()) run.run_blocks = ceil_div(run.run_blocks, 2);
  return run.run_blocks;
}

template void weigh_entries(const WalkTask<float>&, float*, float*, float, cudaStream_t);
template void weigh_entries(const WalkTask<double>&, double*, double*, float, cudaStream_t);
template Scoring scoring_of(const WalkTask<float>&);
template Scoring scoring_of(const WalkTask<double>&);
template void walk_run(const WalkTask<float>&, Scoring, cudaStream_t);
template void walk_run(const WalkTask<double>&, Scoring, cudaStream_t);
template int widest_run(const WalkTask<float>&);
template int widest_run(const WalkTask<double>&);

}  // namespace quantloom::cuda
