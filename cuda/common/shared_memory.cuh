// Shared memory of a thread block: its dynamic part, copies into it, and matrices out of it.
#pragma once

#include <cstdint>

namespace quantloom::cuda {

// The dynamic shared memory, aligned to a line of all banks.
template <class T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ __align__(128) float4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

// An address in shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Sixteen bytes, without passing through registers; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The same where `copies` is true, without a branch, of memory that is not read again soon: L2 drops it
// first.
__device__ __forceinline__ void copy_once_if(bool copies, uint32_t shared, const void* global) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0;"
      "@p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %3; }" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(copies)), "l"(policy)
      : "memory");
}
// Until this thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all groups of this thread but the last kGroups have arrived.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Sixteen bytes.
__device__ __forceinline__ uint4 load_four(uint32_t shared) {
  uint4 four;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "r"(shared)
               : "memory");
  return four;
}

// Four 8 x 8 matrices of 16 bits: lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  load_matrices(words, shared_address(row));
}
// The same, transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  load_transposed(words, shared_address(row));
}

}  // namespace quantloom::cuda
