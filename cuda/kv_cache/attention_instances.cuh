// Which kernel attends to a cache, and how much shared memory its blocks take.
#pragma once

#include "common/check.cuh"
#include "kv_cache/attention_kernel.cuh"
#include "kv_cache/attention_launch.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {

// Whether codes are decoded in registers: groups are such that the channels that a lane holds share scales.
template <int kDim>
bool decodes_in_registers(const KVLayout& layout) {
  constexpr int kRun = kDim / 8;
  constexpr bool kTwoGroups = (kRun & (kRun - 1)) != 0;
  const KVPart& keys = layout.keys;
  const KVPart& values = layout.values;
  return keys.codec == KVCodec::channel_grid && values.codec == KVCodec::token_grid &&
         keys.bits == values.bits && keys.group % kUnitTokens == 0 &&
         (kTwoGroups ? values.group >= kRun && values.group % 2 == 0 : values.group % kRun == 0);
}

// False if not even one record fits.
template <class Keys, int kDim>
bool plan_memory(const AttentionLaunch& launch, int blocks, AttentionMemory& at) {
  at = {};
  at.record = static_cast<int>(launch.view.layout.record_bytes);
  at.staging_bytes = Keys::kStaged ? static_cast<int>(checked_pad(staged_bytes(kDim), 16)) : 0;
  at.rows = launch.plan.rows < kRows ? launch.plan.rows : kRows;
  const int sums = kWarps * at.rows * kDim * 4;
  constexpr int kMostStages = 8;
  const int fixed = kRows * kQueryWords<kDim> * 4 + kWarps * at.staging_bytes + sums + kWarps * kRows * 8 +
                    kRows * 4 + 32 * 4 + kMostStages * 16 + 16;
  int limit = launch.processor_memory / blocks - 1024;
  if (limit > launch.block_memory) limit = launch.block_memory;
  at.stages = (limit - fixed) / at.record;
  if (at.stages < (blocks == 1 ? 1 : 2)) return false;
  if (at.stages > kMostStages) at.stages = kMostStages;
  at.queries = at.stages * at.record;
  at.staging = at.queries + kRows * kQueryWords<kDim> * 4;
  at.sums = at.staging + kWarps * at.staging_bytes;
  at.weights = at.sums + sums;
  at.scales = at.weights + kWarps * kRows * 8;
  at.tables = at.scales + kRows * 4;
  at.barriers = at.tables + 32 * 4;
  at.finished = at.barriers + at.stages * 16;
  at.bytes = at.finished + 16;
  return true;
}

template <class Keys, class Values, int kDim>
void launch_with(const AttentionLaunch& launch) {
  AttentionMemory at;
  int blocks = kBlocks;
  while (blocks > 0 && !plan_memory<Keys, kDim>(launch, blocks, at)) --blocks;
  if (blocks == 0) {
    throw Unsupported(text_of("attention on CUDA devices with records of ", launch.view.layout.record_bytes,
                              " bytes, expected some that fit ", launch.block_memory,
                              " bytes of shared memory: fewer tokens in a group of keys"));
  }
  const auto kernel = &attend_kernel<Keys, Values, kDim>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes),
             "shared memory of attention");
  const int most = blocks * launch.processors;
  const int grid = launch.plan.items < most ? launch.plan.items : most;
  kernel<<<static_cast<unsigned>(grid), kThreads, static_cast<size_t>(at.bytes),
           static_cast<cudaStream_t>(launch.stream)>>>(launch.view, launch.queries, launch.plan,
                                                       launch.workspace, at);
  check_cuda(cudaGetLastError(), "launch of attention");
}

template <int kDim>
void launch_attention_of(const AttentionLaunch& launch) {
  if (!decodes_in_registers<kDim>(launch.view.layout)) {
    launch_with<StagedKeys<kDim>, StagedValues<kDim>, kDim>(launch);
    return;
  }
  switch (launch.view.layout.keys.bits) {
    case 1:
      return launch_with<ChannelGridKeys<1, kDim>, TokenGridValues<1, kDim>, kDim>(launch);
    case 2:
      return launch_with<ChannelGridKeys<2, kDim>, TokenGridValues<2, kDim>, kDim>(launch);
    case 3:
      return launch_with<ChannelGridKeys<3, kDim>, TokenGridValues<3, kDim>, kDim>(launch);
    case 4:
      return launch_with<ChannelGridKeys<4, kDim>, TokenGridValues<4, kDim>, kDim>(launch);
    default:
      return launch_with<ChannelGridKeys<8, kDim>, TokenGridValues<8, kDim>, kDim>(launch);
  }
}

}  // namespace quantloom::kv_cache
