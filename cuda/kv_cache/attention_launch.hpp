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

template <int kDim>
void launch_attention_of(const AttentionLaunch& launch);

}  // namespace quantloom::kv_cache
