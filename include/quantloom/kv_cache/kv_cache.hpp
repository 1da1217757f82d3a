// The keys and values of one layer for a batch of sequences, in pages of codes and a window of exact tokens.
//
//   KVCache cache(kv_format_from_spec("kivi:2"), {.sequences = 4, .kv_heads = 8, .head_dim = 128}, 32768);
//   cache.append(keys, values);                 // [4, 8, m, 128] each: m new tokens of each sequence
//   attend(cache, queries, scale, out);         // kv_attention.hpp
//
// Memory for `capacity` tokens of each sequence is taken at the start, and none for a token that fits;
// beyond it, more pages are added. No token is moved once it is written: a reordering (beam search) shares
// pages, and copies one only when it is written to.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "quantloom/kv_cache/kv_pages.hpp"
#include "quantloom/kv_cache/kv_tables.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom::kv_cache {
struct HeadTables;
}

namespace quantloom {

// Vectors [sequences, heads, tokens, head_dim] of float32, float16 or bfloat16 in somebody else's memory.
// Strides in elements, of the first three axes; elements of a vector are next to each other.
struct KVTokens {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t sequences = 0;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  std::array<int64_t, 3> strides = {};

  const std::byte* row(int64_t sequence, int64_t head, int64_t token) const {
    return static_cast<const std::byte*>(data) +
           (sequence * strides[0] + head * strides[1] + token * strides[2]) * size_of(dtype);
  }
};

struct KVShape {
  int64_t sequences = 1;
  int64_t kv_heads = 1;
  int64_t head_dim = 64;
  DType dtype = DType::f16;  // of exact tokens, and of all that is appended
};

class KVCache {
 public:
  // `tables`: for the kind kvquant, and no other. Throws InvalidArgument / TypeMismatch naming the field that
  // is out of range.
  KVCache(KVFormat format, KVShape shape, int64_t capacity = 0,
          std::shared_ptr<const KVTables> tables = nullptr);
  KVCache(KVCache&&) = default;
  KVCache& operator=(KVCache&&) = default;
  // A cache of its own with the same tokens.
  KVCache clone() const;

  const KVFormat& format() const { return format_; }
  const KVLayout& layout() const { return layout_; }
  const KVShape& shape() const { return shape_; }
  int64_t length(int64_t sequence) const { return pages_.length(sequence); }
  // Tokens of a sequence whose keys or values are codes: those from format().first on.
  int64_t coded(KVSide side, int64_t sequence) const { return pages_.coded(side, sequence); }

  // Takes memory now that each sequence needs to reach `tokens` tokens.
  void reserve(int64_t tokens);
  // Adds the tokens [starts[s], keys.tokens) to each sequence s; without starts all of them. Throws before
  // anything is changed: InvalidArgument or TypeMismatch for a wrong shape or dtype, NumericError naming
  // sequence, head and token for a value that is not finite or beyond 32752 in magnitude (float16 scales),
  // InvalidArgument for tokens past the last position of the tables.
  void append(const KVTokens& keys, const KVTokens& values, std::span<const int64_t> starts = {},
              int threads = 0);
  // Sequence s becomes what sequence sources[s] was; their number may change.
  void reorder(std::span<const int64_t> sources);
  // Forgets all tokens and keeps the memory.
  void clear();

  // The keys (rotated with format().hadamard) or values of `count` tokens from `first` on as attention sees
  // them, to `out` [count, head_dim] with memory for 16 more elements, which are overwritten.
  void read(KVSide side, int64_t sequence, int64_t head, int64_t first, int64_t count, float* out) const;
  // The same by plain loops.
  void read_reference(KVSide side, int64_t sequence, int64_t head, int64_t first, int64_t count,
                      float* out) const;
  // The record of page number `page` of a sequence: record_bytes of layout().
  const std::byte* record(int64_t sequence, int64_t page, int64_t head) const;

  KVUsage usage() const;

 private:
  KVCache(const KVCache&) = default;  // shares memory: for clone()

  void add_slab(int64_t pages);
  std::byte* page_data(int32_t page) const;
  kv_cache::HeadTables head_tables(KVSide side, int64_t head) const;
  std::byte* exact_row(KVSide side, int64_t sequence, int64_t head, int64_t slot) const;
  void append_head(const KVTokens& x, KVSide side, int64_t sequence, int64_t head, int64_t start);
  void read_with(bool reference, KVSide side, int64_t sequence, int64_t head, int64_t first, int64_t count,
                 float* out) const;

  KVFormat format_;
  KVShape shape_;
  KVLayout layout_;
  std::shared_ptr<const KVTables> tables_;
  KVPages pages_;
  // Exact tokens [sequences, kv_heads, first + window, head_dim]: token t < first at slot t, others at slot
  // first + (t - first) % window.
  std::array<Tensor, 2> exact_;
  std::vector<Tensor> slabs_;
};

}  // namespace quantloom
