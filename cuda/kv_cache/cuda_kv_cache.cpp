#include "quantloom/kv_cache/cuda_kv_cache.hpp"

#include "common/device_buffer.hpp"
#include "common/device_pointer.hpp"
#include "kv_cache/cuda_kv_state.hpp"
#include "kv_cache/kv_checks.hpp"
#include "kv_cache/page_table.hpp"
#include "kv_cache/read.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace {

using kv_cache::KVSource;
using kv_cache::KVSpan;

cudaStream_t to_stream(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "capture of the stream");
  return status != cudaStreamCaptureStatusNone;
}

void require_no_capture(cudaStream_t stream, const char* function) {
  if (!is_capturing(stream)) return;
  throw InvalidArgument("stream", text_of("one that is captured, for ", function),
                        "one that is not: only append() and attend() can be captured");
}

void require_memory(const void* data, DType dtype, const char* argument) {
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
    throw InvalidArgument(argument, "an address that is not a multiple of the element size",
                          "an aligned address");
  }
  cuda::require_device_memory(data, argument);
}

KVSource source_of(const KVTokens& x) {
  return {x.data, x.dtype, {x.strides[0], x.strides[1], x.strides[2]}};
}

KVTokens contiguous(const KVTokens& x, const void* data, DType dtype) {
  KVTokens result = x;
  result.data = data;
  result.dtype = dtype;
  result.strides = {x.heads * x.tokens * x.head_dim, x.tokens * x.head_dim, x.head_dim};
  return result;
}

struct NamedTokens {
  const char* name;
  KVTokens x;
};

// Throws as KVCache::append() does for the first value that cannot be stored; waits for that.
void require_values(std::span<const NamedTokens> all, std::span<const KVSpan> spans, cudaStream_t stream) {
  cuda::DeviceBuffer<uint64_t> keys(std::ssize(all), stream);
  keys.fill_bytes(0xff);
  for (size_t i = 0; i < all.size(); ++i) {
    const KVTokens& x = all[i].x;
    for (const KVSpan& span : spans) {
      kv_cache::launch_look(source_of(x), static_cast<int>(x.heads), static_cast<int>(x.head_dim), span,
                            keys.data() + i, stream);
    }
  }
  std::vector<uint64_t> found(all.size());
  cuda::download(keys.data(), found.data(), std::ssize(all), stream);
  for (size_t i = 0; i < all.size(); ++i) {
    if (found[i] == kv_cache::kNoFault) continue;
    const KVTokens& x = all[i].x;
    const auto row = static_cast<int64_t>(found[i]);
    const int64_t s = row / x.tokens / x.heads;
    const int64_t h = row / x.tokens % x.heads;
    const int64_t t = row % x.tokens;
    std::vector<std::byte> bytes(static_cast<size_t>(x.head_dim * size_of(x.dtype)));
    cuda::download(x.row(s, h, t), bytes.data(), std::ssize(bytes), stream);
    std::vector<float> values(static_cast<size_t>(x.head_dim));
    FloatMatrix(bytes.data(), x.dtype, 1, x.head_dim, x.head_dim).read(0, 0, x.head_dim, values.data());
    kv_cache::require_row(all[i].name, values, s, h, t);
  }
}

}  // namespace

CudaKVCache::CudaKVCache(KVFormat format, KVShape shape, int64_t capacity,
                         std::shared_ptr<const KVTables> tables, void* stream) {
  require_no_capture(to_stream(stream), "CudaKVCache()");
  state_ = std::make_unique<State>(format, shape, capacity, std::move(tables), to_stream(stream));
}

CudaKVCache::CudaKVCache(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudaKVCache::~CudaKVCache() = default;
CudaKVCache::CudaKVCache(CudaKVCache&&) noexcept = default;
CudaKVCache& CudaKVCache::operator=(CudaKVCache&&) noexcept = default;

CudaKVCache CudaKVCache::clone(void* stream) const {
  State& from = *state_;
  const cudaStream_t queue = to_stream(stream);
  require_no_capture(queue, "clone()");
  from.require_ready();
  auto copy = std::make_unique<State>(from.format, from.shape, 0, from.tables, queue);
  copy->copy_tokens(from, queue);
  return CudaKVCache(std::move(copy));
}

const KVFormat& CudaKVCache::format() const {
  return state_->format;
}
const KVLayout& CudaKVCache::layout() const {
  return state_->layout;
}
const KVShape& CudaKVCache::shape() const {
  return state_->shape;
}

int64_t CudaKVCache::length(int64_t sequence) const {
  state_->require_ready();
  state_->require_sequence(sequence);
  return state_->pages.length(sequence);
}

int64_t CudaKVCache::coded(KVSide side, int64_t sequence) const {
  state_->require_ready();
  state_->require_sequence(sequence);
  return state_->pages.coded(side, sequence);
}

void CudaKVCache::reserve(int64_t tokens, void* stream) {
  State& state = *state_;
  require_no_capture(to_stream(stream), "reserve()");
  state.require_ready();
  if (tokens < 0) throw InvalidArgument("tokens", text_of(tokens), "0 or more");
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < state.shape.sequences; ++s) {
    lengths.push_back(std::max(tokens, state.pages.length(s)));
  }
  state.own_pages(lengths, to_stream(stream));
}

void CudaKVCache::append(const KVTokens& keys, const KVTokens& values, std::span<const int64_t> starts,
                         const CudaKVAppend& options) {
  State& state = *state_;
  const cudaStream_t stream = to_stream(options.stream);
  const bool capturing = is_capturing(stream);
  if (capturing) {
    state.require_device();
  } else {
    state.require_ready();
  }
  kv_cache::require_append(state.shape, keys, values, starts);
  if (capturing && options.check) {
    throw InvalidArgument("check", "true while the stream is captured", "false: a capture cannot wait");
  }
  if (state.shape.sequences * keys.tokens == 0) return;
  require_memory(keys.data, keys.dtype, "keys");
  require_memory(values.data, values.dtype, "values");
  if (state.table_memory.rotated() && !capturing) {
    static_cast<void>(kv_cache::require_positions(*state.tables->rotation, state.pages, keys.tokens, starts));
  }
  const std::vector<int64_t> lengths = kv_cache::lengths_after(state.pages, keys.tokens, starts);
  if (capturing && !state.stale) state.require_room(lengths);

  const std::vector<KVSpan> spans = state.spans(keys.tokens, starts);
  std::vector<NamedTokens> checked = {{"keys", keys}, {"values", values}};
  cuda::DeviceBuffer<std::byte> memory;
  KVTokens stored = keys;
  const bool turn = state.table_memory.rotated();
  if (turn || state.format.hadamard) {
    const int64_t bytes = checked_mul(state.shape.sequences * state.shape.kv_heads,
                                      checked_mul(keys.tokens, keys.head_dim * size_of(keys.dtype)));
    std::byte* to = state.changed_keys.data();
    if (bytes > state.changed_keys.bytes()) {
      memory = cuda::DeviceBuffer<std::byte>(bytes, stream);
      to = memory.data();
    }
    for (const KVSpan& span : spans) {
      kv_cache::launch_change(
          {state.view(), source_of(keys), static_cast<int>(keys.heads), span, turn,
           state.table_memory.basis(), to, keys.dtype, options.check ? kv_cache::KVReport{} : state.report()},
          stream);
    }
    stored = contiguous(keys, to, keys.dtype);
    checked.push_back({"rotated keys", stored});
  }
  if (options.check) require_values(checked, spans, stream);
  if (!capturing) state.own_pages(lengths, stream);
  for (const KVSpan& span : spans) {
    kv_cache::launch_append({state.view(), source_of(stored), source_of(values), span, state.rows.rooms(),
                             state.rows.arrivals(), state.report()},
                            stream);
  }
  if (capturing) {
    state.captured = state.stale = true;
    return;
  }
  for (int64_t s = 0; s < state.shape.sequences; ++s) {
    state.pages.set_length(s, lengths[static_cast<size_t>(s)]);
  }
}

void CudaKVCache::reorder(std::span<const int64_t> sources, void* stream) {
  State& state = *state_;
  require_no_capture(to_stream(stream), "reorder()");
  state.require_ready();
  kv_cache::require_sources(state.shape, sources);
  state.reorder(sources, to_stream(stream));
}

void CudaKVCache::clear(void* stream) {
  State& state = *state_;
  require_no_capture(to_stream(stream), "clear()");
  state.require_ready();
  state.pages.clear();
  if (state.rows.count() > 0) {
    check_cuda(cudaMemsetAsync(state.rows.lengths(), 0,
                               static_cast<size_t>(state.rows.count()) * sizeof(int64_t), to_stream(stream)),
               "fill of device memory");
  }
  state.update_room(to_stream(stream));
}

void CudaKVCache::read(KVSide side, int64_t sequence, int64_t first, int64_t count, void* out, DType dtype,
                       void* stream) const {
  State& state = *state_;
  require_no_capture(to_stream(stream), "read()");
  state.require_ready();
  kv_cache::require_run(state.shape, state.pages, sequence, first, count);
  if (!is_float16_or_32(dtype)) {
    throw TypeMismatch("dtype", name_of(dtype), "float32, float16 or bfloat16");
  }
  if (count == 0) return;
  require_memory(out, dtype, "out");
  kv_cache::launch_read({state.view(), side, static_cast<int>(sequence), state.pages.length(sequence), first,
                         count, out, dtype},
                        to_stream(stream));
}

void CudaKVCache::attend(const KVTokens& queries, float scale, void* out, void* stream) const {
  State& state = *state_;
  const cudaStream_t queue = to_stream(stream);
  const bool capturing = is_capturing(queue);
  state.require_device();
  if (!capturing) state.require_no_faults();
  kv_cache::require_queries(state.shape, queries, scale, out);
  if (state.shape.sequences * queries.tokens == 0) return;
  require_memory(queries.data, queries.dtype, "queries");
  require_memory(out, queries.dtype, "out");
  const int64_t count = checked_mul(checked_mul(queries.sequences, queries.heads),
                                    checked_mul(queries.tokens, queries.head_dim));
  if (count > INT32_MAX * queries.head_dim) {
    throw InvalidArgument("queries", text_of(queries.tokens, " tokens"), "fewer in one call");
  }
  const kv_cache::KVView view = state.view();
  const auto heads = static_cast<int>(queries.heads);
  KVTokens q = queries;
  void* to = out;
  if (state.format.hadamard) {
    // float16 is what they are rounded to anyway; from bfloat16 it takes float32 to lose nothing.
    const DType dtype = queries.dtype == DType::bf16 ? DType::f32 : queries.dtype;
    const bool widened = dtype != queries.dtype;
    const int64_t bytes = checked_mul(count, size_of(dtype));
    std::byte* memory = state.grown(state.changed_queries, widened ? 2 * bytes : bytes, capturing, "queries");
    for (const KVSpan& span : state.spans(queries.tokens, {})) {
      kv_cache::launch_change(
          {view, source_of(queries), heads, span, false, state.table_memory.basis(), memory, dtype, {}},
          queue);
    }
    q = contiguous(queries, memory, dtype);
    if (widened) to = memory + bytes;
  }
  std::byte* workspace = state.grown(
      state.workspace, kv_cache::attention_workspace(view, heads, queries.tokens), capturing, "queries");
  kv_cache::launch_attention(view,
                             {q.data,
                              q.dtype,
                              heads,
                              static_cast<int>(q.tokens),
                              {q.strides[0], q.strides[1], q.strides[2]},
                              scale,
                              to},
                             workspace, stream);
  if (to != out) kv_cache::launch_round(static_cast<const float*>(to), out, true, count, queue);
  state.captured |= capturing;
}

KVUsage CudaKVCache::usage() const {
  State& state = *state_;
  state.require_ready();
  KVUsage usage = state.pages.usage(state.shape.kv_heads, state.shape.dtype);
  usage.reserved_bytes = state.reserved_bytes();
  return usage;
}

std::vector<std::byte> CudaKVCache::record(int64_t sequence, int64_t page, int64_t head) const {
  State& state = *state_;
  state.require_ready();
  state.require_sequence(sequence);
  if (page < 0 || page >= state.pages.page_count(sequence)) {
    throw InvalidArgument("page", text_of(page), text_of("pages below ", state.pages.page_count(sequence)));
  }
  if (head < 0 || head >= state.shape.kv_heads) {
    throw InvalidArgument("head", text_of(head), text_of("0 to ", state.shape.kv_heads - 1));
  }
  std::vector<std::byte> bytes(static_cast<size_t>(state.layout.record_bytes));
  check_cuda(cudaDeviceSynchronize(), "work of the device");
  const std::byte* from =
      state.page_data(state.pages.page(sequence, page)) + head * state.layout.record_bytes;
  check_cuda(cudaMemcpy(bytes.data(), from, bytes.size(), cudaMemcpyDeviceToHost), "copy from the device");
  return bytes;
}

}  // namespace quantloom
