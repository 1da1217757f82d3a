#include "common/check.cuh"
#include "formats/trellis_general.cuh"
#include "formats/trellis_walk.cuh"

namespace quantloom::cuda {
namespace {

template <class Copies>
__global__ void __launch_bounds__(32)
    walk(const SearchTask task, const TracebackResult result, int64_t history_words) {
  __shared__ PathMemory memory;
  walk_back<Copies>(task, result, history_words, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x),
                    memory);
}

__global__ void __launch_bounds__(32)
    walk_general(const SearchTask task, const TracebackResult result, int64_t history_words) {
  __shared__ PathMemory memory;
  walk_back_general(task, result, history_words, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x),
                    memory);
}

}  // namespace

void trace_back(const SearchTask& task, const TracebackResult& result, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(32);
  config.gridDim = dim3(static_cast<unsigned>(task.count));
  config.stream = stream;
  auto* kernel = &walk_general;
  if (task.plain()) {
    with_bits(task.bits(), [&]<int kBits>() {
      kernel = &walk<PlainCopies<kBits>>;
      if constexpr (SearchShape<kBits>::kPairsOfGroups) {
        if (task.alone) kernel = &walk<PlainCopies<kBits, 1>>;
      }
    });
  } else if (task.shape.weights_per_step == 1) {
    if (task.bits() == 1) kernel = &walk<HalfCopies<1>>;
    if (task.bits() == 2) kernel = &walk<HalfCopies<2>>;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, task, result, task.history_words()),
             "launch of the way back");
}

}  // namespace quantloom::cuda
