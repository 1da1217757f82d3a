// What a CudaKVCache consists of.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kv_cache/append.hpp"
#include "kv_cache/device_memory.hpp"
#include "kv_cache/table_memory.hpp"
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

namespace quantloom::kv_cache {

// What kernels know of sequences: the table of pages [count, pages], and for each its length, its room and
// how many blocks of a launch have arrived. All zero at first.
class SequenceRows {
 public:
  SequenceRows() = default;
  SequenceRows(int64_t count, int64_t pages, cudaStream_t stream);

  int64_t count() const { return count_; }
  int64_t pages() const { return pages_; }
  int64_t bytes() const { return memory_.bytes(); }
  std::byte** table() const { return reinterpret_cast<std::byte**>(memory_.data()); }
  int64_t* lengths() const { return reinterpret_cast<int64_t*>(table() + count_ * pages_); }
  int64_t* rooms() const { return lengths() + count_; }
  uint32_t* arrivals() const { return reinterpret_cast<uint32_t*>(rooms() + count_); }
  DeviceMemory take() { return std::move(memory_); }

 private:
  DeviceMemory memory_;
  int64_t count_ = 0;
  int64_t pages_ = 0;
};

}  // namespace quantloom::kv_cache

namespace quantloom {

struct CudaKVCache::State {
  State(KVFormat format, KVShape shape, int64_t capacity, std::shared_ptr<const KVTables> tables,
        cudaStream_t stream);

  // Throws InvalidArgument if another device is current.
  void require_device() const;
  // Throws what kernels reported, once. Waits only if they did.
  void require_no_faults();
  // Both, and learns the lengths again that replays of captured graphs may have changed.
  void require_ready();
  void require_sequence(int64_t sequence) const;
  // Of a captured append(): room for sequences of these lengths.
  void require_room(std::span<const int64_t> lengths) const;
  kv_cache::KVView view() const;
  // In pieces whose starts travel with a launch.
  std::vector<kv_cache::KVSpan> spans(int64_t tokens, std::span<const int64_t> starts) const;
  // Pages of their own for sequences of these lengths.
  void own_pages(std::span<const int64_t> lengths, cudaStream_t stream);
  void update_room(cudaStream_t stream);
  // Memory for so many sequences, and pages of each, with what was in it.
  void make_rows(int64_t sequences, int64_t table_pages, cudaStream_t stream);
  void make_exact(int64_t sequences, cudaStream_t stream);
  void reorder(std::span<const int64_t> sources, cudaStream_t stream);
  // Of a cache that was just made: becomes a copy of another one.
  void copy_tokens(const State& from, cudaStream_t stream);
  void add_slab(int64_t pages);
  std::byte* page_data(int32_t page) const;
  // The memory, larger if need be; what is new is zero.
  std::byte* grown(kv_cache::DeviceMemory& memory, int64_t bytes, bool capturing, const char* argument);
  // Keeps memory that captured graphs may use.
  void retire(kv_cache::DeviceMemory memory);

  int64_t exact_bytes() const;  // of the keys, or the values, of a sequence
  int64_t reserved_bytes() const;
  int64_t page_bytes() const { return shape.kv_heads * layout.record_bytes; }
  kv_cache::KVReport report() const {
    return {reinterpret_cast<kv_cache::KVFaults*>(faults.data()), raised.on_device()};
  }

  int device = 0;
  KVFormat format;
  KVShape shape;
  KVLayout layout;
  std::shared_ptr<const KVTables> tables;
  KVPages pages;
  kv_cache::TableMemory table_memory;
  std::vector<kv_cache::DeviceMemory> slabs;
  kv_cache::SequenceRows rows;  // at least as many as sequences
  std::vector<int64_t> room;    // as on the device
  std::array<kv_cache::DeviceMemory, 2> exact;
  kv_cache::DeviceMemory changed_keys;  // keys of a few tokens in the basis that is stored
  kv_cache::DeviceMemory changed_queries;
  kv_cache::DeviceMemory workspace;  // of attention
  kv_cache::DeviceMemory faults;
  kv_cache::HostWord raised;
  bool captured = false;  // some graph has the addresses of this memory
  bool stale = false;     // some graph may have changed the lengths
  std::vector<kv_cache::DeviceMemory> retired;
};

}  // namespace quantloom
