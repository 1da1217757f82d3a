// Records of pages on their way into shared memory, by one warp for the others of its block.
#pragma once

#include "common/bulk_copies.cuh"
#include "common/shared_memory.cuh"

namespace quantloom::kv_cache {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// Without bulk copies each lane of the copying warp brings its part.
constexpr int kCopyArrivals = 32;
#else
constexpr int kCopyArrivals = 1;
#endif

__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended (common/bulk_copies.cuh).
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  cuda::wait_for_phase(barrier, parity);
#endif
}

// By a whole warp: copies `bytes` (a multiple of 16) and lets their arrival count at the barrier, which was
// started with kCopyArrivals.
__device__ __forceinline__ void copy_record(std::byte* shared, const std::byte* global, int bytes,
                                            uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) cuda::copy_async(shared + i, global + i);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#else
  if (threadIdx.x % 32 != 0) return;
  uint64_t policy = 0;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  cuda::announce_bytes(barrier, bytes);
  cuda::copy_bulk(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global, bytes, barrier, policy);
#endif
}
// By a whole warp: the phase ends without a copy.
__device__ __forceinline__ void skip_record(uint32_t barrier) {
  if (kCopyArrivals == 32 || threadIdx.x % 32 == 0) arrive(barrier);
}

}  // namespace quantloom::kv_cache
