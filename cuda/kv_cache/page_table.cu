#include <algorithm>

#include "common/check.cuh"
#include "common/store_float.cuh"
#include "kv_cache/page_table.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 64;  // of an entry or a row

template <class T>
struct Batch {
  static constexpr int kMost = 120;  // within the 4 KB of a launch
  T items[kMost];
  int count;
};

__global__ void entries_kernel(const __grid_constant__ Batch<KVEntry> batch, int64_t page_bytes) {
  const KVEntry& it = batch.items[blockIdx.y];
  if (blockIdx.x == 0 && threadIdx.x == 0) *it.entry = it.to;
  if (it.from == it.to) return;
  auto* to = reinterpret_cast<uint4*>(it.to);
  const auto* from = reinterpret_cast<const uint4*>(it.from);
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < page_bytes / 16; i += gridDim.x * kThreads) {
    to[i] = from == nullptr ? uint4{} : from[i];
  }
}

__global__ void numbers_kernel(const __grid_constant__ Batch<KVNumber> batch) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < batch.count) *batch.items[i].to = batch.items[i].value;
}

__global__ void gather_kernel(const uint2* from, uint2* to, int64_t row_units,
                              const __grid_constant__ Batch<int64_t> sources) {
  const uint2* source = from + sources.items[blockIdx.y] * row_units;
  uint2* row = to + blockIdx.y * row_units;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < row_units; i += gridDim.x * kThreads) {
    row[i] = source[i];
  }
}

__global__ void round_kernel(const float* from, void* to, bool bfloat, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) cuda::store_float(to, bfloat ? DType::bf16 : DType::f16, i, from[i]);
}

// Calls launch(batch, index of its first item) for all items.
template <class T, class Launch>
void in_batches(std::span<const T> items, const Launch& launch) {
  for (size_t first = 0; first < items.size(); first += Batch<T>::kMost) {
    const auto some = items.subspan(first, std::min<size_t>(items.size() - first, Batch<T>::kMost));
    Batch<T> batch{};
    std::copy(some.begin(), some.end(), batch.items);
    batch.count = static_cast<int>(some.size());
    launch(batch, static_cast<int64_t>(first));
    check_cuda(cudaGetLastError(), "pages of a cache");
  }
}

unsigned blocks_of(int64_t units) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(units, kThreads), 1, kMostBlocks));
}

}  // namespace

void launch_entries(std::span<const KVEntry> entries, int64_t page_bytes, cudaStream_t stream) {
  in_batches(entries, [&](const Batch<KVEntry>& batch, int64_t) {
    const dim3 blocks(blocks_of(page_bytes / 16), static_cast<unsigned>(batch.count));
    entries_kernel<<<blocks, kThreads, 0, stream>>>(batch, page_bytes);
  });
}

void launch_numbers(std::span<const KVNumber> numbers, cudaStream_t stream) {
  in_batches(numbers, [&](const Batch<KVNumber>& batch, int64_t) {
    numbers_kernel<<<1, Batch<KVNumber>::kMost, 0, stream>>>(batch);
  });
}

void launch_gather(const std::byte* from, std::byte* to, int64_t row_bytes, std::span<const int64_t> sources,
                   cudaStream_t stream) {
  if (row_bytes == 0) return;
  in_batches(sources, [&](const Batch<int64_t>& batch, int64_t first) {
    const dim3 blocks(blocks_of(row_bytes / 8), static_cast<unsigned>(batch.count));
    gather_kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const uint2*>(from),
                                                   reinterpret_cast<uint2*>(to + first * row_bytes),
                                                   row_bytes / 8, batch);
  });
}

void launch_round(const float* from, void* to, bool bfloat, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  round_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(from, to, bfloat,
                                                                                          count);
  check_cuda(cudaGetLastError(), "results of attention");
}

}  // namespace quantloom::kv_cache
