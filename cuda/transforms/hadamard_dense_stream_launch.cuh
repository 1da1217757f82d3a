// The launch of one kernel of hadamard_dense_stream.cuh.
#pragma once

#include <algorithm>

#include "transforms/hadamard_dense_stream.cuh"
#include "transforms/hadamard_launch.cuh"

namespace quantloom::cuda {

// False if its shared memory is more than the device has. stages: 0 chooses.
template <class T, int kHalves, int kPower, int kChosenGroups = 0>
bool launch_dense_stream_kernel(int64_t order, const HadamardArguments& a, const DeviceFacts& device,
                                cudaStream_t stream, int stages = 0) {
  using S = DenseStream<T, kHalves, kPower, kChosenGroups>;
  const auto rows = static_cast<int>(order);
  if (S::bytes(rows, std::max(stages, 1)) > device.shared_memory) return false;
  const auto kernel = dense_stream_kernel<T, kHalves, kPower, kChosenGroups>;
  const auto resident = [&](int count) {
    const int bytes = S::bytes(rows, count);
    if (bytes > device.shared_memory) return 0;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "hadamard_cuda: shared memory");
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, S::kThreads,
                                                             static_cast<size_t>(bytes)),
               "hadamard_cuda: occupancy");
    return blocks;
  };
  int blocks = resident(std::max(stages, 1));
  if (stages == 0) {
    // Another block ahead, where that costs no block on a processor.
    const int two = a.units > int64_t{blocks} * device.processors ? resident(2) : 0;
    stages = two >= blocks ? 2 : 1;
  }
  int64_t grid = std::min<int64_t>(a.units, int64_t{std::max(blocks, 1)} * device.processors);
  // Blocks of threads that stay in their columns keep the signs of those.
  if (a.signs != nullptr && grid > a.per_row) grid -= grid % a.per_row;
  launch_hadamard(kernel, grid, S::kThreads, S::bytes(rows, stages), stream, a, rows, stages,
                  kept_signs<S::kTiles>(order, a.inverse));
  return true;
}

}  // namespace quantloom::cuda
