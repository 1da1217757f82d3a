// The kernels of attention, one unit of compilation for each size of heads.
#pragma once

#include "kv_cache/attention_plan.cuh"

namespace quantloom::kv_cache {

struct AttentionLaunch {
  const KVView& view;
  const KVQueries& queries;
  AttentionPlan plan;
  AttentionWorkspace workspace;
  int processors = 0;
  bool overlap = false;  // kernels may begin before the one before them has ended
  void* stream = nullptr;
};

// Whether there are kernels that take keys and values of these widths as matrices (code_matrices.cuh).
constexpr bool has_matrices(int key_bits, int value_bits, int head_dim) {
  if (!has_code_windows(key_bits, head_dim) || !has_code_windows(value_bits, head_dim)) return false;
  return key_bits == value_bits ||
         (key_bits > value_bits && value_bits > 1 && (head_dim == 64 || head_dim == 128));
}

// Whether the codes of a cache are taken as matrices of windows.
inline bool takes_matrices(const KVLayout& layout) {
  const KVPart& keys = layout.keys;
  const KVPart& values = layout.values;
  if (keys.codec != KVCodec::channel_grid || keys.group % kUnitTokens != 0) return false;
  if (values.codec != KVCodec::token_grid) return false;
  // Four groups, or eight of 32 channels.
  if (values.groups > 4 && (layout.head_dim != 256 || values.group != 32)) return false;
  if (layout.page_tokens != kWarps * kUnitTokens) return false;
  const int chunk = 128 / values.bits;  // channels
  if (values.group < chunk && (chunk % values.group != 0 || values.group * 4 < chunk)) return false;
  if (values.group >= chunk && values.group % chunk != 0 && values.groups > 1) return false;
  return has_matrices(keys.bits, values.bits, static_cast<int>(layout.head_dim));
}

// Queries of an item: fewer where the values of a chunk have several scales.
inline int item_rows_of(const KVLayout& layout) {
  if (!takes_matrices(layout)) return kRows;
  const int chunk = 128 / layout.values.bits;
  return layout.values.group < chunk ? static_cast<int>(kRows * layout.values.group / chunk) : kRows;
}

template <int kDim>
void launch_attention_of(const AttentionLaunch& launch);

}  // namespace quantloom::kv_cache
