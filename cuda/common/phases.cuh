// A barrier in shared memory whose phases threads end by arriving, and wait for later.
#pragma once

#include "common/shared_memory.cuh"

namespace quantloom::cuda {

// By one thread; the others use the barrier after a __syncthreads(). A phase ends when `arrivals` threads
// have arrived.
__device__ __forceinline__ void start_phases(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What the thread did before is seen by those that wait for the phase.
__device__ __forceinline__ void arrive_at_phase(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended: 0 for the first, then 1, 0, ...
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define QUANTLOOM_WAIT "try_wait"
#else
#define QUANTLOOM_WAIT "test_wait"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier." QUANTLOOM_WAIT
      ".parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef QUANTLOOM_WAIT
}

}  // namespace quantloom::cuda
