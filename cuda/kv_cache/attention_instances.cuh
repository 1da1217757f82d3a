// Which kernel attends to a cache, and how much shared memory its blocks take.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "kv_cache/attention_kernel.cuh"
#include "kv_cache/attention_launch.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {

// Whether codes are decoded in registers: channels that a lane holds share scales.
template <int kDim>
bool decodes_in_registers(const KVLayout& layout) {
  constexpr int kRun = kDim / 8;
  constexpr bool kTwoGroups = (kRun & (kRun - 1)) != 0;
  const KVPart& keys = layout.keys;
  const KVPart& values = layout.values;
  if (values.codec != KVCodec::token_grid || keys.bits != values.bits) return false;
  if (kTwoGroups ? values.group < kRun || values.group % 2 != 0 : values.group % kRun != 0) return false;
  if (keys.codec == KVCodec::channel_grid) return keys.group % kUnitTokens == 0;
  return keys.codec == KVCodec::token_grid && keys.group % kRun == 0 && (keys.bits == 4 || keys.bits == 8);
}

template <class Keys, class Values, int kDim, int kStages>
AttentionMemory plan_memory(const AttentionLaunch& launch) {
  AttentionMemory at;
  if constexpr (std::is_void_v<Keys>) {
    at.warp = static_cast<int>(checked_pad(staged_bytes(kDim), 16));
  } else {
    at.keys = Keys::unit_bytes(launch.view.layout);
    at.values = Values::unit_bytes(launch.view.layout);
    at.warp = kStages * (at.keys + at.values);
  }
  at.rows = launch.plan.rows < kRows ? launch.plan.rows : kRows;
  at.queries = kWarps * at.warp;
  at.sums = at.queries + kRows * kQueryWords<kDim> * 4;
  at.weights = at.sums + kWarps * at.rows * kDim * 4;
  at.scales = at.weights + kWarps * kRows * 8;
  at.tables = at.scales + kRows * 4;
  at.finished = at.tables + 32 * 4;
  at.bytes = at.finished + 16;
  return at;
}

template <class Keys, class Values, int kDim, int kStages>
void launch_with(const AttentionLaunch& launch, const AttentionPlan& plan, bool overlap) {
  const AttentionMemory at = plan_memory<Keys, Values, kDim, kStages>(launch);
  const auto kernel = &attend_kernel<Keys, Values, kDim, kStages>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes),
             "shared memory of attention");
  int blocks = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, static_cast<size_t>(at.bytes)),
      "blocks of attention");
  const int64_t most = int64_t{std::max(blocks, 1)} * launch.processors;
  const int64_t pieces = int64_t{plan.places} * (plan.rest_alone ? 1 : plan.pieces - plan.skipped);
  cuda::LaunchSettings settings(static_cast<unsigned>(std::min(pieces, most)), kThreads,
                                static_cast<cudaStream_t>(launch.stream), overlap, 1);
  settings.config.dynamicSmemBytes = static_cast<size_t>(at.bytes);
  check_cuda(
      cudaLaunchKernelEx(&settings.config, kernel, launch.view, launch.queries, plan, launch.workspace, at),
      "launch of attention");
}

// The codes of each sequence, and its rest, which takes the places of blocks that have ended.
template <class Keys, class Values, int kDim, int kStages>
void launch_both(const AttentionLaunch& launch) {
  AttentionPlan codes = launch.plan;
  codes.skipped = 1;
  launch_with<Keys, Values, kDim, kStages>(launch, codes, false);
  AttentionPlan rest = launch.plan;
  rest.rest_alone = true;
  launch_with<void, void, kDim, 1>(launch, rest, launch.overlap);
}

template <int kBits, int kDim>
void launch_bits(const AttentionLaunch& launch) {
  using Values = TokenGridValues<kBits, kDim>;
  constexpr int kStages = kBits <= 2 ? 3 : 2;
  if constexpr (kBits == 4 || kBits == 8) {
    if (launch.view.layout.keys.codec == KVCodec::token_grid)
      return launch_both<TokenGridKeys<kBits, kDim>, Values, kDim, kStages>(launch);
  }
  launch_both<ChannelGridKeys<kBits, kDim>, Values, kDim, kStages>(launch);
}

template <int kDim>
void launch_attention_of(const AttentionLaunch& launch) {
  if (!decodes_in_registers<kDim>(launch.view.layout)) {
    launch_with<void, void, kDim, 1>(launch, launch.plan, false);
    return;
  }
  switch (launch.view.layout.keys.bits) {
    case 1:
      return launch_bits<1, kDim>(launch);
    case 2:
      return launch_bits<2, kDim>(launch);
    case 3:
      return launch_bits<3, kDim>(launch);
    case 4:
      return launch_bits<4, kDim>(launch);
    default:
      return launch_bits<8, kDim>(launch);
  }
}

}  // namespace quantloom::kv_cache
