// Thread blocks of a cluster that leave sums in each other's shared memory. Only code for compute capability
// 9.0 and later has clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quantloom::cuda {

// A barrier in shared memory that opens once a block of threads has been sent all that it expects.
class Delivery {
 public:
  // By one thread of each block, before cluster_begin().
  static __device__ __forceinline__ void prepare(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // By threads of the receiving block, as often as it takes to name all bytes.
  static __device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
  }
  // By one thread, after all bytes have been named.
  static __device__ __forceinline__ void all_expected(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(address(barrier))
                 : "memory");
#endif
  }

  // Sends 16 bytes to `there`, as seen in this block, of the block of number `rank`.
  static __device__ __forceinline__ void send(float* there, uint64_t* barrier, int rank, float4 value) {
#if __CUDA_ARCH__ >= 900
    uint32_t to;
    uint32_t signal;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address(there)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(address(barrier)), "r"(rank));
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(to),
        "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(signal)
        : "memory");
#endif
  }

  // By every thread that reads what was sent.
  static __device__ __forceinline__ void wait(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again; }" ::"r"(address(barrier))
        : "memory");
#endif
  }

 private:
  static __device__ __forceinline__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
};

// The place of `here`, in shared memory, in the block of number `rank`.
__device__ __forceinline__ float* cluster_place(float* here, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
  return reinterpret_cast<float*>(there);
#else
  return rank == 0 ? here : nullptr;
#endif
}

// The barrier of a cluster. cluster_begin() tells the others that this block has begun; after the wait their
// shared memory is there. What is written before cluster_arrive() is seen after the wait.
__device__ __forceinline__ void cluster_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

}  // namespace quantloom::cuda
