// A KVCache in memory of a CUDA device: the same formats, the same bytes in the same pages.
//
//   CudaKVCache cache(kv_format_from_spec("kivi:2"), {.sequences = 4, .kv_heads = 8, .head_dim = 128},
//   32768); cache.append(keys, values, {}, {.stream = stream});     // [4, 8, m, 128] each, on the device
//   cache.attend(queries, scale, out, stream);              // [4, 32, m, 128]
//
// Everything belongs to the device that is current when the cache is made. Lengths and the addresses of pages
// are kept on the device too: a captured CUDA graph of append() and attend() may be replayed, and each replay
// adds its tokens, as long as reserve() made room for them. A replay without room leaves its sequence alone,
// and the next call of any member throws InvalidArgument. Nothing is allocated for a token that fits.
//
// The calls for one cache, and replays, are ordered by whoever makes them: by one stream, or by waits between
// streams. All but append() and attend() refuse a stream that is captured.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "quantloom/kv_cache/kv_cache.hpp"

namespace quantloom {

struct CudaKVAppend {
  void* stream = nullptr;  // a cudaStream_t
  // Looks at all values first, waits for the answer, and throws NumericError before anything is changed. If
  // false, nothing waits: tokens with values that are not finite or beyond 32752 in magnitude are written as
  // they come, and the next call of any member throws.
  bool check = true;
};

class CudaKVCache {
 public:
  // As KVCache; also Unsupported in a build without CUDA.
  CudaKVCache(KVFormat format, KVShape shape, int64_t capacity = 0,
              std::shared_ptr<const KVTables> tables = nullptr, void* stream = nullptr);
  ~CudaKVCache();
  CudaKVCache(CudaKVCache&&) noexcept;
  CudaKVCache& operator=(CudaKVCache&&) noexcept;
  CudaKVCache clone(void* stream = nullptr) const;

  const KVFormat& format() const;
  const KVLayout& layout() const;
  const KVShape& shape() const;
  // Waits for replays of captured graphs, if there may have been some.
  int64_t length(int64_t sequence) const;
  int64_t coded(KVSide side, int64_t sequence) const;

  // Makes room for `tokens` tokens in each sequence, so that append() needs nothing of the host until then:
  // required before a capture. clear(), reorder() and a cache that grows beyond what was reserved (or to more
  // sequences) take room away that graphs count on: reserve() again; after such growth, capture again. Pages
  // that are reserved are pages in use.
  void reserve(int64_t tokens, void* stream = nullptr);
  // As KVCache::append(), of tensors on the device. While `stream` is captured, room must have been reserved,
  // `options.check` must be false, and lengths are known to the device alone.
  void append(const KVTokens& keys, const KVTokens& values, std::span<const int64_t> starts = {},
              const CudaKVAppend& options = {});
  void reorder(std::span<const int64_t> sources, void* stream = nullptr);
  void clear(void* stream = nullptr);

  // Keys (rotated with format().hadamard) or values of `count` tokens of a sequence from `first` on, as
  // KVCache::read() gives them, to `out` on the device: [kv_heads, count, head_dim], contiguous, of `dtype`.
  void read(KVSide side, int64_t sequence, int64_t first, int64_t count, void* out, DType dtype,
            void* stream = nullptr) const;

  // attend() of kv_attention.hpp on the device. out [sequences, m, heads, head_dim] of the queries' dtype.
  // What is multiplied is rounded to float16 before: values, weights of tokens, and either keys and queries
  // or, of keys with ranges by channel, queries times the scales of these. Rotary embeddings, too, are
  // applied in float16; those of all channels whose angles grow evenly with positions to queries by the
  // position of each 32 tokens, and to keys by the rest of it. Sums are float32, over pieces of a sequence
  // whose number depends on its length alone: results do not depend on other sequences of the batch, and the
  // same call gives the same bytes. The first call with more queries than any before takes memory: make it
  // before a capture.
  void attend(const KVTokens& queries, float scale, void* out, void* stream = nullptr) const;

  KVUsage usage() const;
  // The record of a page, copied to the host (layout().record_bytes).
  std::vector<std::byte> record(int64_t sequence, int64_t page, int64_t head) const;

 private:
  struct State;
  explicit CudaKVCache(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace quantloom
