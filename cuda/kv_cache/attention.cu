// Attention to a cache on a CUDA device: checks of the shape, items of work, workspace.
#include "common/device.hpp"
#include "kv_cache/attention_launch.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"

namespace quantloom::kv_cache {
namespace {

AttentionPlan plan_of(const KVView& view, int heads, int64_t tokens, int processors) {
  AttentionPlan plan;
  plan.group = heads / view.kv_heads;
  plan.rows = static_cast<int>(checked_mul(tokens, plan.group));
  plan.item_rows = item_rows_of(view.layout);
  plan.row_blocks = static_cast<int>(ceil_div(plan.rows, plan.item_rows));
  plan.by_group = cuda::Divisor(plan.group);
  plan.by_row_blocks = cuda::Divisor(plan.row_blocks);
  plan.by_page_tokens = cuda::Divisor(static_cast<int>(view.layout.page_tokens));
  plan.by_window = cuda::Divisor(std::max(view.window, 1));
  // All blocks of a device have a piece of one long sequence.
  plan.pieces = std::clamp(kBlocks * processors / (view.kv_heads * plan.row_blocks), 3, kMostPieces);
  plan.places = static_cast<int>(checked_mul(view.sequences * view.kv_heads, plan.row_blocks));
  static_cast<void>(checked_mul(plan.places, plan.pieces));
  return plan;
}

void launch_heads(const AttentionLaunch& launch) {
  switch (launch.view.layout.head_dim) {
    case 64:
      return launch_attention_of<64>(launch);
    case 80:
      return launch_attention_of<80>(launch);
    case 96:
      return launch_attention_of<96>(launch);
    case 128:
      return launch_attention_of<128>(launch);
    case 256:
      return launch_attention_of<256>(launch);
    default:
      throw Unsupported(text_of("attention on CUDA devices with heads of ", launch.view.layout.head_dim,
                                " channels, expected 64, 80, 96, 128 or 256"));
  }
}

constexpr int kMostRowBlocks = 32;  // of a KV head in one launch

// Query tokens that one launch takes.
int64_t most_tokens(const KVView& view, int heads) {
  return std::max<int64_t>(1, kMostRowBlocks * item_rows_of(view.layout) / (heads / view.kv_heads));
}

struct WorkspaceBytes {
  int64_t counters;
  int64_t weights;
  int64_t sums;
};

WorkspaceBytes workspace_of(const KVView& view, int heads, const AttentionPlan& plan) {
  const int64_t blocks = std::max<int64_t>(kMostRowBlocks, ceil_div(heads / view.kv_heads, plan.item_rows));
  return {checked_pad(checked_mul(view.sequences * view.kv_heads, blocks * 4), 16),
          checked_mul(plan.places, plan.pieces * plan.item_rows * 8),
          checked_mul(checked_mul(plan.places, plan.pieces * plan.item_rows), view.layout.head_dim * 4)};
}

}  // namespace

int64_t attention_workspace(const KVView& view, int heads, int64_t tokens) {
  const int processors = current_device().processors;
  const AttentionPlan plan = plan_of(view, heads, std::min(tokens, most_tokens(view, heads)), processors);
  const WorkspaceBytes bytes = workspace_of(view, heads, plan);
  return bytes.counters + bytes.weights + bytes.sums;
}

void launch_attention(const KVView& view, const KVQueries& queries, void* workspace, void* stream) {
  if (view.sequences == 0) return;
  const DeviceFacts device = current_device();
  const auto launch_tokens = static_cast<int>(most_tokens(view, queries.heads));
  for (int token = 0; token < queries.tokens; token += launch_tokens) {
    AttentionPlan plan =
        plan_of(view, queries.heads, std::min(launch_tokens, queries.tokens - token), device.processors);
    plan.first_token = token;
    const WorkspaceBytes bytes = workspace_of(view, queries.heads, plan);
    auto* memory = static_cast<std::byte*>(workspace);
    AttentionWorkspace places;
    places.finished = reinterpret_cast<unsigned*>(memory);
    places.weights = reinterpret_cast<float2*>(memory + bytes.counters);
    places.sums = reinterpret_cast<float*>(memory + bytes.counters + bytes.weights);
    launch_heads({view, queries, plan, places, device.processors, device.code >= 90, stream});
  }
}

}  // namespace quantloom::kv_cache
