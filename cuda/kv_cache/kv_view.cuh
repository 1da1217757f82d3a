// A cache of keys and values as kernels see it.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "quantloom/dtype.hpp"
#include "quantloom/kv_cache/kv_layout.hpp"

namespace quantloom::kv_cache {

constexpr int kUnitTokens = 32;  // tokens that a warp takes at a time: two tiles

// Bytes of the lines of shared memory (all banks once) that hold so many. A copy of 128 bytes that begins
// within a line takes two requests.
__host__ __device__ constexpr int whole_lines(int bytes) {
  return (bytes + 127) / 128 * 128;
}

struct KVView {
  KVLayout layout;
  DType dtype = DType::f16;  // of exact tokens
  int sequences = 0;
  int kv_heads = 0;
  int first = 0;  // tokens at the start that are kept exact
  int window = 0;
  int64_t table_pages = 0;            // entries of a row of the table
  std::byte* const* pages = nullptr;  // [sequences, table_pages]: page p of a sequence: kv_heads records
  int64_t* lengths = nullptr;         // [sequences]
  std::byte* exact_keys = nullptr;    // [sequences, kv_heads, first + window, head_dim], slots as in KVCache
  std::byte* exact_values = nullptr;
  // Of the kind kvquant (kv_tables.hpp), else null.
  const float* key_bounds = nullptr;
  const float* key_values = nullptr;  // [2^bits]
  const float* value_bounds = nullptr;
  const float* value_values = nullptr;
  const __half2* key_ranges = nullptr;  // (scale, middle) [kv_heads, head_dim]
  const float* cosines = nullptr;       // [positions, rotated / 2]
  const float* sines = nullptr;
  int64_t rotated = 0;  // 0: no rotation
  int64_t positions = 0;
  // The rotation of a position is that of the 32nd before it, turned further by the distance, nearly.
  bool composes = false;

  // Tokens, counted from `first`, whose keys or values are codes in a sequence of `length` tokens.
  __host__ __device__ int coded(KVSide side, int length) const {
    return coded(side, length, [&](int tokens) { return tokens % window; });
  }
  // remainder(tokens): tokens modulo the window.
  template <class Remainder>
  __host__ __device__ int coded(KVSide side, int length, const Remainder& remainder) const {
    const int tokens = length > first ? length - first : 0;
    const KVPart& part = side == KVSide::keys ? layout.keys : layout.values;
    if (part.codec == KVCodec::channel_grid) return tokens - remainder(tokens);
    return tokens > window ? tokens - window : 0;
  }
};

// Queries, and where results go: kernels' arguments of attend().
struct KVQueries {
  const void* data = nullptr;
  DType dtype = DType::f16;
  int heads = 0;
  int tokens = 0;
  int64_t strides[3] = {};  // of sequence, head and token, in elements
  float scale = 0;
  void* out = nullptr;  // [sequences, tokens, heads, head_dim] of dtype
};

// Bytes of device memory that launch_attention() needs: zeroed once, when it is allocated; kernels leave the
// counters at its beginning zero. Fewer query tokens may use the same memory.
int64_t attention_workspace(const KVView& view, int heads, int64_t tokens);
// Launches the attention of kv_attention.hpp. Everything was checked before.
void launch_attention(const KVView& view, const KVQueries& queries, void* workspace, void* stream);

}  // namespace quantloom::kv_cache
