// Checks of the arguments of caches, the same for every device. All throw before anything is changed.
#pragma once

#include <span>
#include <vector>

#include "quantloom/kv_cache/kv_cache.hpp"

namespace quantloom::kv_cache {

void require_cache(const KVFormat& format, const KVLayout& layout, const KVShape& shape, int64_t capacity,
                   const KVTables* tables);
// Shapes, dtypes and starts of append().
void require_append(const KVShape& shape, const KVTokens& keys, const KVTokens& values,
                    std::span<const int64_t> starts);
// The positions that the first token of a call has in each sequence, padding included; throws if the
// rotation has none for the last one.
std::vector<int64_t> require_positions(const KVRotation& rotation, const KVPages& pages, int64_t tokens,
                                       std::span<const int64_t> starts);
// The lengths of the sequences behind a call of append().
std::vector<int64_t> lengths_after(const KVPages& pages, int64_t tokens, std::span<const int64_t> starts);
void require_sources(const KVShape& shape, std::span<const int64_t> sources);
void require_run(const KVShape& shape, const KVPages& pages, int64_t sequence, int64_t first, int64_t count);
void require_queries(const KVShape& shape, const KVTokens& queries, float scale, const void* out);

// Throws NumericError if a value of a row, widened to float32, is not finite or too large.
void require_row(const char* name, std::span<const float> row, int64_t sequence, int64_t head, int64_t token);

inline int64_t start_of(std::span<const int64_t> starts, int64_t sequence) {
  return starts.empty() ? 0 : starts[static_cast<size_t>(sequence)];
}

}  // namespace quantloom::kv_cache
