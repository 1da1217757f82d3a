// Bulk copies into shared memory (cp.async.bulk, sm_90 and later), whose arrival a barrier in shared memory
// counts in bytes.
#pragma once

#include <cstdint>

namespace quantloom::cuda {

// A barrier whose phase ends when `arrivals` threads have announced bytes and all those have arrived. By one
// thread; the others use it after publish_barriers() by that thread and a __syncthreads().
__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Announces bytes of copies that this thread begins before or after.
__device__ __forceinline__ void announce_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives without bytes.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Multiples of 16 bytes, at such addresses.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// From shared to global memory: what threads wrote before order_for_bulk_copies() and a barrier. Multiples of
// 16 bytes, at such addresses. The thread's copies since its last call are then waited for together.
__device__ __forceinline__ void order_for_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void copy_bulk_out(void* global, uint32_t shared, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}
// Until shared memory has been read, and until global memory has been written.
__device__ __forceinline__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_for_writes() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Until the phase of this parity has ended: 0 for the first, then 1, 0, ... Before the first has ended, that
// of parity 1 counts as ended.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace quantloom::cuda
