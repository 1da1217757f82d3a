// Kernels that prepare pages and move what belongs to sequences. Numbers travel with the launches: the host
// keeps nothing for the device to read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace quantloom::kv_cache {

// An entry of the table of pages becomes `to`, whose contents become those of `from`: null: zeros; `to`
// itself: they stay.
struct KVEntry {
  std::byte** entry = nullptr;
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
};
void launch_entries(std::span<const KVEntry> entries, int64_t page_bytes, cudaStream_t stream);

struct KVNumber {
  int64_t* to = nullptr;
  int64_t value = 0;
};
void launch_numbers(std::span<const KVNumber> numbers, cudaStream_t stream);

// Row i of `to` becomes row sources[i] of `from`, of other memory; row_bytes: a multiple of 8.
void launch_gather(const std::byte* from, std::byte* to, int64_t row_bytes, std::span<const int64_t> sources,
                   cudaStream_t stream);

// float32 to float16 or bfloat16.
void launch_round(const float* from, void* to, bool bfloat, int64_t count, cudaStream_t stream);

}  // namespace quantloom::kv_cache
