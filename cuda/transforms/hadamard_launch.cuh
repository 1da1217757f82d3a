// What the launches of the Hadamard kernels share.
#pragma once

#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "common/check.cuh"
#include "common/device.hpp"
#include "transforms/hadamard_dense.cuh"

namespace quantloom::cuda {

inline unsigned grid_size(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw Unsupported(text_of("hadamard_cuda: no kernel for ", blocks, " blocks of threads in one launch"));
  }
  return static_cast<unsigned>(blocks);
}

template <class Kernel, class... Arguments>
void launch_hadamard(Kernel kernel, int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
                     const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "hadamard_cuda: shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "hadamard_cuda: launch");
}

// Kept for the life of the process: building them takes longer than a launch.
template <int kTiles>
const DenseSigns<kTiles>& kept_signs(int64_t order, bool transposed) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, bool>, DenseSigns<kTiles>> kept;
  const std::scoped_lock lock(mutex);
  const std::pair<int64_t, bool> key{order, transposed};
  auto found = kept.find(key);
  if (found == kept.end()) found = kept.emplace(key, cuda::dense_signs<kTiles>(order, transposed)).first;
  return found->second;
}

}  // namespace quantloom::cuda
