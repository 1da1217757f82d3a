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
  const bool digits = keys.codec == KVCodec::digits;
  if (values.codec != (digits ? KVCodec::digits : KVCodec::token_grid)) return false;
  if (keys.bits != values.bits) return takes_matrices(layout);
  if (layout.page_tokens > kWarps * kUnitTokens) return false;
  if (kTwoGroups ? values.group < kRun || values.group % 2 != 0 : values.group % kRun != 0) return false;
  if (keys.codec == KVCodec::channel_grid) {
    return has_code_windows(keys.bits, kDim) ? takes_matrices(layout) : keys.group % kUnitTokens == 0;
  }
  return keys.group % kRun == 0 && (digits || keys.bits == 4 || keys.bits == 8);
}

template <class Keys, class Values, int kDim>
AttentionMemory plan_memory(const AttentionLaunch& launch) {
  AttentionMemory at;
  if constexpr (std::is_void_v<Values>) {
    at.warp = StagedMemory<kDim>(launch.view.layout).bytes;
  } else {
    at.keys = whole_lines(Keys::unit_bytes(launch.view.layout));
    at.unit = at.keys + whole_lines(Values::unit_bytes(launch.view.layout));
    at.warp = kStages * at.unit;
    if (Keys::kTakesRest) at.warp = std::max(at.warp, at.keys + whole_lines(ExactMatrices<kDim>::kBytes));
  }
  at.rows = std::min(launch.plan.rows, launch.plan.item_rows);
  at.queries = kWarps * at.warp;
  using QueryKeys = std::conditional_t<std::is_void_v<Values>, RowQueries<kDim>, Keys>;
  at.exact_queries = at.queries + kRows * QueryKeys::kQueryWords * 4;
  at.weights = at.exact_queries;
  if constexpr (!std::is_void_v<Values>) {
    if (Keys::kTakesRest) at.weights += kRows * ExactQueries<kDim>::kQueryWords * 4;
    at.sums = at.weights;
    at.turn = kWarps * at.rows * kSumsRow<kDim> * 4;
    at.weights += 2 * at.turn;
  }
  at.scales = at.weights + 2 * kWarps * kRows * 8;
  at.tables = at.scales + kRows * 4;
  at.finished = at.tables + (has_tables<Keys> ? StagedTables<kDim>(launch.view.layout).bytes : 0);
  at.barrier = at.finished + 8;
  at.walk = at.finished + 16;
  at.bytes = at.walk + static_cast<int>(sizeof(AttentionWalk));
  return at;
}

template <class Keys, class Values, int kDim>
void launch_with(const AttentionLaunch& launch, AttentionPlan plan) {
  plan.by_runs = cuda::Divisor(plan.pieces - plan.rest);
  const AttentionMemory at = plan_memory<Keys, Values, kDim>(launch);
  const auto kernel = &attend_kernel<Keys, Values, kDim>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes),
             "shared memory of attention");
  // Kernels that run side by side on a processor need the same division of its memory.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "shared memory of attention");
  int blocks = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, static_cast<size_t>(at.bytes)),
      "blocks of attention");
  int64_t most = int64_t{std::max(blocks, 1)} * launch.processors;
  const int64_t pieces = int64_t{plan.places} * (plan.rest_alone ? plan.rest : plan.pieces - plan.skipped);
  // Blocks that have pieces of one place alone, where that leaves few processors without work.
  const int64_t even = most / plan.places * plan.places;
  if (even * 10 >= most * 9) most = even;
  cuda::LaunchSettings settings(static_cast<unsigned>(std::min(pieces, most)), kThreads,
                                static_cast<cudaStream_t>(launch.stream), launch.overlap, 1);
  settings.config.dynamicSmemBytes = static_cast<size_t>(at.bytes);
  check_cuda(
      cudaLaunchKernelEx(&settings.config, kernel, launch.view, launch.queries, plan, launch.workspace, at),
      "launch of attention");
}

// All pieces in one launch, or those of the rest and beside them those of the codes.
template <class Keys, class Values, int kDim>
void launch_codes(const AttentionLaunch& launch) {
  AttentionPlan codes = launch.plan;
  if constexpr (Keys::kTakesRest) {
    codes.rest = kRestPieces;
    launch_with<Keys, Values, kDim>(launch, codes);
  } else {
    AttentionPlan rest = launch.plan;
    rest.rest_alone = true;
    launch_with<RestRows, void, kDim>(launch, rest);
    codes.skipped = codes.rest;
    launch_with<Keys, Values, kDim>(launch, codes);
  }
}

// Codes as matrices, of keys and of values.
template <int kBits, int kValueBits, int kDim>
void launch_matrices(const AttentionLaunch& launch) {
  using Keys = MatrixKeys<kBits, kDim>;
  if constexpr (kDim == 256) {
    if (launch.view.layout.values.groups == 8)
      return launch_codes<Keys, MatrixValues<kValueBits, kDim, 8>, kDim>(launch);
  }
  launch_codes<Keys, MatrixValues<kValueBits, kDim>, kDim>(launch);
}

// Of keys of kBits.
template <int kBits, int kDim>
void launch_bits(const AttentionLaunch& launch) {
  using Values = RunValues<TokenGridValues<kBits, kDim>, kDim>;
  if constexpr (kBits == 4 || kBits == 8) {
    if (launch.view.layout.keys.codec == KVCodec::token_grid)
      return launch_codes<RunKeys<TokenGridKeys<kBits, kDim>, kDim>, Values, kDim>(launch);
  }
  const int value_bits = launch.view.layout.values.bits;
  if constexpr (kBits > 2 && has_matrices(kBits, 2, kDim)) {
    if (value_bits == 2) return launch_matrices<kBits, 2, kDim>(launch);
  }
  if constexpr (kBits > 4 && has_matrices(kBits, 4, kDim)) {
    if (value_bits == 4) return launch_matrices<kBits, 4, kDim>(launch);
  }
  if constexpr (has_code_windows(kBits, kDim)) {
    launch_matrices<kBits, kBits, kDim>(launch);
  } else {
    launch_codes<RunKeys<ChannelGridKeys<kBits, kDim>, kDim>, Values, kDim>(launch);
  }
}

template <int kBits, int kDim>
void launch_digits(const AttentionLaunch& launch) {
  launch_codes<RunKeys<DigitKeys<kBits, kDim>, kDim>, RunValues<DigitValues<kBits, kDim>, kDim>, kDim>(
      launch);
}

template <int kDim>
void launch_digits_of(const AttentionLaunch& launch) {
  switch (launch.view.layout.keys.bits) {
    case 2:
      return launch_digits<2, kDim>(launch);
    case 3:
      return launch_digits<3, kDim>(launch);
    case 4:
      return launch_digits<4, kDim>(launch);
    case 5:
      return launch_digits<5, kDim>(launch);
    case 6:
      return launch_digits<6, kDim>(launch);
    default:
      return launch_digits<7, kDim>(launch);
  }
}

// Whether pieces of codes are taken by attend_tables().
template <int kDim>
bool takes_table_rows(const KVView& view) {
  const KVPart& keys = view.layout.keys;
  return keys.has_table() && keys.bits > 1 && keys.bits == view.layout.values.bits &&
         view.layout.page_tokens == kWarps * kUnitTokens &&
         (view.rotated == 0 || turns_in_registers<kDim>(view));
}

template <int kDim>
void launch_rows(const AttentionLaunch& launch) {
  const auto launch_as = [&]<class Rows>() { launch_with<Rows, void, kDim>(launch, launch.plan); };
  if (!takes_table_rows<kDim>(launch.view)) return launch_as.template operator()<AnyRows>();
  switch (launch.view.layout.keys.bits) {
    case 2:
      return launch_as.template operator()<TableRows<2>>();
    case 3:
      return launch_as.template operator()<TableRows<3>>();
    default:
      return launch_as.template operator()<TableRows<4>>();
  }
}

template <int kDim>
void launch_attention_of(const AttentionLaunch& launch) {
  if (!decodes_in_registers<kDim>(launch.view.layout)) return launch_rows<kDim>(launch);
  if (launch.view.layout.keys.codec == KVCodec::digits) return launch_digits_of<kDim>(launch);
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
