// The functions of cuda/common/shared_memory.cuh on the CPU.
#pragma once

#include "emulated_device.hpp"

namespace quantloom::cuda {

template <class T>
T* dynamic_shared_memory() {
  return reinterpret_cast<T*>(emulated::block->memory.data());
}

inline void copy_async(void* shared, const void* global) {
  std::memcpy(shared, global, 16);
}
inline void wait_for_copies() {}
inline void commit_copies() {}
template <int kGroups>
void wait_for_copies_but() {}

inline void load_transposed(uint32_t (&words)[4], const void* row) {
  const unsigned warp = threadIdx.x & ~31U;
  const unsigned lane = threadIdx.x & 31U;
  emulated::block->rows[threadIdx.x] = row;
  __syncwarp();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    words[matrix] = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const auto* from =
          static_cast<const char*>(emulated::block->rows[warp + 8 * matrix + 2 * (lane % 4) + half]);
      uint16_t element = 0;
      std::memcpy(&element, from + 2 * (lane / 4), 2);
      words[matrix] |= static_cast<uint32_t>(element) << (16 * half);
    }
  }
  __syncwarp();
}

}  // namespace quantloom::cuda
