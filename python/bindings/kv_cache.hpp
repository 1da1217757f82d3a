// What the bindings of caches on the CPU and on CUDA devices share.
#pragma once

#include <string>

#include "arrays.hpp"
#include "quantloom/kv_cache/kv_attention.hpp"

namespace quantloom::python {

// [sequences, heads, tokens, head_dim] on `device`. Throws TypeMismatch or InvalidArgument naming `name`.
KVTokens kv_tokens(const char* name, const ArrayRef& x, Device device);

KVSide kv_side(const std::string& side);

py::dict to_dict(const KVLayout& layout);
py::dict to_dict(const KVUsage& usage);

// Throws InvalidArgument unless `out` has an element for each of queries.
void require_room_for(const ArrayRef& queries, const ArrayRef& out);

template <class Cache>
void require_sequence(const Cache& cache, int64_t sequence) {
  if (sequence < 0 || sequence >= cache.shape().sequences) {
    throw InvalidArgument("sequence", text_of(sequence), text_of("0 to ", cache.shape().sequences - 1));
  }
}

// Throws what attend() would of these queries.
template <class Cache>
void require_queries_of(const Cache& cache, const ArrayRef& queries, double scale) {
  require_queries(cache.shape(), kv_tokens("queries", queries, queries.device()), static_cast<float>(scale));
}

template <class Cache>
std::vector<int64_t> lengths_of(const Cache& cache) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < cache.shape().sequences; ++s) lengths.push_back(cache.length(s));
  return lengths;
}

template <class Cache>
int64_t coded_of(const Cache& cache, const std::string& side, int64_t sequence) {
  require_sequence(cache, sequence);
  return cache.coded(kv_side(side), sequence);
}

template <class Cache>
void require_record(const Cache& cache, int64_t sequence, int64_t page, int64_t head) {
  const KVShape& shape = cache.shape();
  const bool exists = sequence >= 0 && sequence < shape.sequences && head >= 0 && head < shape.kv_heads;
  const int64_t tokens =
      exists ? std::max(cache.coded(KVSide::keys, sequence), cache.coded(KVSide::values, sequence)) : 0;
  if (page < 0 || page * cache.layout().page_tokens >= tokens) {
    throw InvalidArgument("page", text_of(page), "a page of a sequence and a head");
  }
}

}  // namespace quantloom::python
