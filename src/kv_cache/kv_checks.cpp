#include "kv_cache/kv_checks.hpp"

#include <algorithm>
#include <cmath>

#include "kv_cache/kv_codes.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kv_cache/kv_attention.hpp"

namespace quantloom::kv_cache {
namespace {

std::string shape_of(const KVTokens& x) {
  return text_of("[", x.sequences, ", ", x.heads, ", ", x.tokens, ", ", x.head_dim, "]");
}

void require_tokens(const char* name, const KVTokens& x, const KVShape& shape, int64_t tokens) {
  if (x.dtype != shape.dtype) throw TypeMismatch(name, name_of(x.dtype), name_of(shape.dtype));
  if (x.sequences != shape.sequences || x.heads != shape.kv_heads || x.head_dim != shape.head_dim ||
      x.tokens < 0 || x.tokens != tokens) {
    throw InvalidArgument(name, text_of("shape ", shape_of(x)),
                          text_of("[", shape.sequences, ", ", shape.kv_heads, ", ",
                                  std::max<int64_t>(tokens, 0), ", ", shape.head_dim, "]"));
  }
  if (x.data == nullptr && x.sequences * x.heads * x.tokens > 0) {
    throw InvalidArgument(name, "a null pointer", "values");
  }
}

}  // namespace

void require_cache(const KVFormat& format, const KVLayout& layout, const KVShape& shape, int64_t capacity,
                   const KVTables* tables) {
  if (!is_float16_or_32(shape.dtype)) {
    throw TypeMismatch("dtype", name_of(shape.dtype), "float32, float16 or bfloat16");
  }
  if (shape.sequences < 0) throw InvalidArgument("sequences", text_of(shape.sequences), "0 or more");
  if (shape.kv_heads < 1) throw InvalidArgument("kv_heads", text_of(shape.kv_heads), "1 or more");
  if (shape.sequences > INT32_MAX / shape.kv_heads) {
    throw InvalidArgument("sequences", text_of(shape.sequences, " of ", shape.kv_heads, " KV heads"),
                          "fewer than 2^31 of all together");
  }
  if ((tables != nullptr) != layout.keys.has_table()) {
    throw InvalidArgument("tables", tables == nullptr ? "none" : "some",
                          tables == nullptr ? "those of a calibration" : text_of("none for ", format.spec()));
  }
  if (tables != nullptr) require_valid(*tables, format, shape.kv_heads, shape.head_dim);
  if (capacity < 0) throw InvalidArgument("capacity", text_of(capacity), "0 or more tokens");
  if (capacity / layout.page_tokens >= INT32_MAX / std::max<int64_t>(1, shape.sequences)) {
    throw InvalidArgument("capacity", text_of(capacity, " tokens of ", shape.sequences, " sequences"),
                          text_of("fewer than 2^31 pages of ", layout.page_tokens));
  }
}

void require_append(const KVShape& shape, const KVTokens& keys, const KVTokens& values,
                    std::span<const int64_t> starts) {
  require_tokens("keys", keys, shape, keys.tokens);
  require_tokens("values", values, shape, keys.tokens);
  if (!starts.empty() && std::ssize(starts) != shape.sequences) {
    throw InvalidArgument("starts", text_of(starts.size()), text_of(shape.sequences, " numbers"));
  }
  for (const int64_t start : starts) {
    if (start < 0 || start > keys.tokens) {
      throw InvalidArgument("starts", text_of(start), text_of("0 to ", keys.tokens));
    }
  }
}

std::vector<int64_t> require_positions(const KVRotation& rotation, const KVPages& pages, int64_t tokens,
                                       std::span<const int64_t> starts) {
  std::vector<int64_t> positions;
  for (int64_t s = 0; s < pages.sequences(); ++s) {
    positions.push_back(pages.length(s) - start_of(starts, s));
    if (positions.back() + tokens <= rotation.positions()) continue;
    throw InvalidArgument("keys", text_of("token ", positions.back() + tokens - 1, " of sequence ", s),
                          text_of("tokens below ", rotation.positions(), ", the positions of the tables"));
  }
  return positions;
}

std::vector<int64_t> lengths_after(const KVPages& pages, int64_t tokens, std::span<const int64_t> starts) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < pages.sequences(); ++s) {
    lengths.push_back(checked_add(pages.length(s), tokens - start_of(starts, s)));
  }
  return lengths;
}

void require_sources(const KVShape& shape, std::span<const int64_t> sources) {
  for (const int64_t source : sources) {
    if (source < 0 || source >= shape.sequences) {
      throw InvalidArgument("sources", text_of(source), text_of("0 to ", shape.sequences - 1));
    }
  }
}

void require_run(const KVShape& shape, const KVPages& pages, int64_t sequence, int64_t first, int64_t count) {
  if (sequence < 0 || sequence >= shape.sequences) {
    throw InvalidArgument("sequence", text_of(sequence), text_of("0 to ", shape.sequences - 1));
  }
  if (first < 0 || count < 0 || first > pages.length(sequence) - count) {
    throw InvalidArgument("tokens", text_of(first, " to ", first + count - 1),
                          text_of("tokens below ", pages.length(sequence)));
  }
}

void require_queries(const KVShape& shape, const KVTokens& queries, float scale, const void* out) {
  quantloom::require_queries(shape, queries, scale);
  if ((queries.data == nullptr || out == nullptr) && queries.sequences * queries.tokens > 0) {
    throw InvalidArgument(out == nullptr ? "out" : "queries", "a null pointer", "memory");
  }
}

void require_row(const char* name, std::span<const float> row, int64_t sequence, int64_t head,
                 int64_t token) {
  for (size_t d = 0; d < row.size(); ++d) {
    if (std::abs(row[d]) <= kLargestValue) continue;
    throw NumericError(text_of(name, ": got ", row[d], " for sequence ", sequence, ", head ", head,
                               ", token ", token, ", channel ", d, ", expected finite values up to ",
                               kLargestValue));
  }
}

}  // namespace quantloom::kv_cache

namespace quantloom {

void require_queries(const KVShape& shape, const KVTokens& queries, float scale) {
  if (!is_float16_or_32(queries.dtype)) {
    throw TypeMismatch("queries", name_of(queries.dtype), "float32, float16 or bfloat16");
  }
  if (queries.sequences != shape.sequences || queries.head_dim != shape.head_dim || queries.heads < 1 ||
      queries.heads % shape.kv_heads != 0 || queries.tokens < 0) {
    throw InvalidArgument(
        "queries", text_of("shape ", kv_cache::shape_of(queries)),
        text_of("[", shape.sequences, ", a multiple of ", shape.kv_heads, ", tokens, ", shape.head_dim, "]"));
  }
  if (!std::isfinite(scale)) throw InvalidArgument("scale", text_of(scale), "a finite number");
}

}  // namespace quantloom
