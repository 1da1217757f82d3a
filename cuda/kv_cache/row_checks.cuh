// Reports of kernels about values that cannot be stored, and sequences without room.
#pragma once

#include "kv_cache/append.hpp"
#include "kv_cache/kv_codes.hpp"

namespace quantloom::kv_cache {

__device__ __forceinline__ bool is_bad(float value) {
  return !(fabsf(value) <= kLargestValue);
}

__device__ __forceinline__ void report(const KVReport& to, uint64_t* fault, uint64_t key) {
  atomicMin(reinterpret_cast<unsigned long long*>(fault), static_cast<unsigned long long>(key));
  // Behind the fault: who sees this one sees that.
  __threadfence_system();
  *static_cast<volatile uint32_t*>(to.raised) = 1;
}

__device__ __forceinline__ void report_value(const KVReport& to, int64_t pair, int64_t token, KVSide side) {
  const uint64_t key = static_cast<uint64_t>(pair) << 33 | static_cast<uint64_t>(token) << 1;
  report(to, &to.faults->value, key | static_cast<uint64_t>(side == KVSide::values));
}

__device__ __forceinline__ void report_room(const KVReport& to, int sequence) {
  report(to, &to.faults->room, static_cast<uint64_t>(sequence));
}

}  // namespace quantloom::kv_cache
