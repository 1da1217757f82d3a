// Vectors as codes in a record, and back by plain loops: the definition that fast loops are held to.
#pragma once

#include <cstddef>

#include "quantloom/kv_cache/kv_layout.hpp"

namespace quantloom::kv_cache {

// Values beyond this have no scale in float16.
inline constexpr float kLargestValue = 32752.0F;

// Of one head: tables of values, and of keys the ranges of channels.
struct HeadTables {
  const float* bounds = nullptr;
  const float* values = nullptr;
  const float* scale = nullptr;   // [head_dim], of keys
  const float* middle = nullptr;  // likewise
};

// Encodes part.group tokens x [part.group, head_dim], by channel, as group number `group` of the record.
void encode_channels(const KVPart& part, int64_t head_dim, const float* x, int64_t group, std::byte* record);
// Encodes one token x [head_dim], by token, at `slot` of the record.
void encode_token(const KVPart& part, int64_t head_dim, const float* x, int64_t slot, std::byte* record,
                  const HeadTables& tables);
// The values of `count` tokens from `slot` on, to out [count, head_dim].
void decode_reference(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot,
                      int64_t count, float* out, const HeadTables& tables);
// Adds what is missing of the outliers of `count` tokens to their decoded rows.
void add_outliers(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                  float* out);

}  // namespace quantloom::kv_cache
