// New tokens into a cache, the same bytes as src/kv_cache/kv_cache.cpp writes. One launch does all of it, and
// all that depends on lengths is decided on the device, so that a captured graph can be replayed.
#include "common/check.cuh"
#include "common/load_float.cuh"
#include "common/shared_memory.cuh"
#include "kv_cache/append.hpp"
#include "kv_cache/row_checks.cuh"
#include "kv_cache/token_codes.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 32;  // tokens of a group whose codes are in shared memory at once

// The vectors of one head: those that came, and those that the cache keeps exact.
struct HeadRows {
  KVSource source;
  int64_t given;  // element of token 0 of the call
  std::byte* exact;
  int64_t kept;  // element of slot 0
  DType dtype;
  int head_dim;

  __device__ int64_t given_at(int64_t i) const { return given + i * source.strides[2]; }
  __device__ int64_t exact_at(int64_t slot) const { return kept + slot * head_dim; }
  // Copies a vector that came to a slot, by lanes; whether this lane saw a value that cannot be stored.
  __device__ bool keep(int64_t i, int64_t slot, int lane) const {
    bool bad = false;
    const int64_t from = given_at(i);
    const int64_t to = exact_at(slot);
    for (int d = lane; d < head_dim; d += 32) {
      bad |= is_bad(cuda::load_float(source.data, dtype, from + d));
      if (dtype == DType::f32) {
        reinterpret_cast<uint32_t*>(exact)[to + d] = static_cast<const uint32_t*>(source.data)[from + d];
      } else {
        reinterpret_cast<uint16_t*>(exact)[to + d] = static_cast<const uint16_t*>(source.data)[from + d];
      }
    }
    return bad;
  }
};

// The tokens of a call for one sequence, counted from the first that is not kept at its start.
struct NewTokens {
  int64_t start;  // the first one of the call
  int64_t begin;  // its number, below 0 for tokens that are kept
  int64_t end;
  int64_t window;  // the first one that goes through the window
  bool fits;

  __device__ int64_t index(int64_t token) const { return start + token - begin; }
};

struct Place {
  int sequence;
  int head;
  KVSide side;
};

__device__ NewTokens new_tokens(const KVAppend& a, int sequence) {
  NewTokens tokens{};
  tokens.start = a.span.started ? a.span.starts[sequence - a.span.sequence] : 0;
  const int64_t length = a.view.lengths[sequence];
  tokens.begin = length - a.view.first;
  tokens.end = tokens.begin + a.span.tokens - tokens.start;
  tokens.window = tokens.begin > 0 ? tokens.begin : (tokens.end < 0 ? tokens.end : 0);
  tokens.fits = length + a.span.tokens - tokens.start <= a.room[sequence];
  return tokens;
}

__device__ std::byte* record_of(const KVView& view, const Place& place, int64_t token) {
  const int64_t page = token / view.layout.page_tokens;
  return view.pages[place.sequence * view.table_pages + page] + place.head * view.layout.record_bytes;
}

__device__ void report_row(const KVAppend& a, const Place& place, int64_t token, bool bad, int lane) {
  if (!__any_sync(kAllLanes, bad) || lane != 0) return;
  report_value(a.report, place.sequence * a.view.kv_heads + place.head, token + a.view.first, place.side);
}

// By a warp, for new token number `unit` of the call: it leaves the slot that this token takes to it.
__device__ void append_token(const KVAppend& a, const Place& place, const NewTokens& tokens,
                             const HeadRows& rows, int64_t unit, const RowMemory& memory, int lane) {
  const KVView& view = a.view;
  const int64_t t = tokens.begin + unit;
  if (t >= tokens.end) return;
  const int64_t kept = view.first;
  if (t < 0) {
    report_row(a, place, t, rows.keep(tokens.start + unit, t + kept, lane), lane);
    return;
  }
  const int64_t window = view.window;
  const int64_t coded = t - window;
  if (coded >= 0) {
    const bool came = window == 0 || coded >= tokens.window;
    const int64_t from = came ? rows.given_at(tokens.index(coded)) : rows.exact_at(kept + coded % window);
    const void* data = came ? rows.source.data : rows.exact;
    bool bad = false;
    for (int d = lane; d < rows.head_dim; d += 32) {
      memory.values[d] = cuda::load_float(data, rows.dtype, from + d);
      bad |= is_bad(memory.values[d]);
    }
    report_row(a, place, coded, bad && came, lane);
    __syncwarp();
    encode_token(view.layout.part(place.side), rows.head_dim, memory, lane, coded % view.layout.page_tokens,
                 record_of(view, place, coded), code_tables(view, place.side, place.head));
    __syncwarp();
  }
  // The first tokens of a call own the slots: of those that want a slot, the last one stays there.
  if (window == 0 || t - tokens.window >= window) return;
  const int64_t last = t + (tokens.end - 1 - t) / window * window;
  report_row(a, place, last, rows.keep(tokens.index(last), kept + t % window, lane), lane);
}

// By a block: `group` tokens of one head, from `first` on, become codes by channel.
__device__ void encode_channels(const KVAppend& a, const Place& place, const NewTokens& tokens,
                                const HeadRows& rows, int64_t first, std::byte* shared) {
  const KVView& view = a.view;
  const KVPart& part = view.layout.part(place.side);
  const auto group = static_cast<int>(part.group);
  const int dim = rows.head_dim;
  auto* grids = reinterpret_cast<Grid*>(shared);
  auto* codes = reinterpret_cast<uint8_t*>(grids + dim);
  std::byte* record = record_of(view, place, first);
  const auto slot = static_cast<int>(first % view.layout.page_tokens);
  const auto value = [&](int j, int d) {
    const int64_t token = first + j;
    if (token >= tokens.window) {
      return cuda::load_float(rows.source.data, rows.dtype, rows.given_at(tokens.index(token)) + d);
    }
    return cuda::load_float(rows.exact, rows.dtype, rows.exact_at(view.first + token % view.window) + d);
  };
  for (int d = threadIdx.x; d < dim; d += kThreads) {
    float low = value(0, d);
    float high = low;
    int64_t bad = is_bad(low) ? 0 : group;
#pragma unroll 8
    for (int j = 1; j < group; ++j) {
      const float x = value(j, d);
      low = x < low ? x : low;
      high = fmaxf(high, x);
      if (is_bad(x)) bad = min(bad, static_cast<int64_t>(j));
    }
    if (bad < group) {
      report_value(a.report, place.sequence * view.kv_heads + place.head, first + bad + view.first,
                   place.side);
    }
    grids[d] = store_grid(low, high, part.bits,
                          record + part.parameters + (slot / group * static_cast<int64_t>(dim) + d) * 4);
  }
  const auto words = static_cast<int>(part.row_bytes / 4);
  for (int begin = 0; begin < group; begin += kChunk) {
    const int count = min(kChunk, group - begin);
    __syncthreads();
    for (int i = threadIdx.x; i < count * dim; i += kThreads) {
      codes[i] = code_of(value(begin + i / dim, i % dim), grids[i % dim], part.bits);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * words; i += kThreads) {
      const int j = i / words;
      auto* row = reinterpret_cast<uint32_t*>(record + part.codes + (slot + begin + j) * part.row_bytes);
      row[i % words] = pack_bits(codes + j * dim, dim, part.bits, 32 * (i % words), 32);
    }
  }
}

// By a block: group number `unit` of those that may be completed, and the slots of the window that it had.
__device__ void append_group(const KVAppend& a, const Place& place, const NewTokens& tokens,
                             const HeadRows& rows, int unit, int units, std::byte* shared) {
  const KVView& view = a.view;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t t = tokens.begin + unit * kWarps + warp; t < tokens.window; t += units * kWarps) {
    report_row(a, place, t, rows.keep(tokens.index(t), t + view.first, lane), lane);
  }
  if (tokens.end <= 0) return;
  const int64_t group = view.layout.part(place.side).group;
  const int64_t from = tokens.window - tokens.window % view.window;
  const int64_t to = tokens.end - tokens.end % view.window;
  const int64_t first = from + unit * group;
  if (first < to) {
    encode_channels(a, place, tokens, rows, first, shared);
    __syncthreads();
  }
  const int64_t slot = unit * group;
  if (slot >= view.window) return;
  for (int64_t j = slot + warp; j < slot + group; j += kWarps) {
    const int64_t t = to + j;
    if (t < tokens.window || t >= tokens.end) continue;
    report_row(a, place, t, rows.keep(tokens.index(t), view.first + j, lane), lane);
  }
}

struct Units {
  int keys;  // blocks of a head
  int values;
};

__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ KVAppend a, const __grid_constant__ Units units) {
  auto* shared = cuda::dynamic_shared_memory<std::byte>();
  const int all = units.keys + units.values;
  const auto pair = static_cast<int>(blockIdx.x / all);
  int unit = static_cast<int>(blockIdx.x % all);
  const KVView& view = a.view;
  Place place{a.span.sequence + pair / view.kv_heads, pair % view.kv_heads, KVSide::keys};
  if (unit >= units.keys) {
    place.side = KVSide::values;
    unit -= units.keys;
  }
  const NewTokens tokens = new_tokens(a, place.sequence);
  if (tokens.fits) {
    const bool keys = place.side == KVSide::keys;
    const KVSource& source = keys ? a.keys : a.values;
    const auto dim = static_cast<int>(view.layout.head_dim);
    const int64_t slots = view.first + view.window;
    const HeadRows rows{source,
                        place.sequence * source.strides[0] + place.head * source.strides[1],
                        keys ? view.exact_keys : view.exact_values,
                        (static_cast<int64_t>(place.sequence) * view.kv_heads + place.head) * slots * dim,
                        view.dtype,
                        dim};
    if (view.layout.part(place.side).codec == KVCodec::channel_grid) {
      append_group(a, place, tokens, rows, unit, keys ? units.keys : units.values, shared);
    } else {
      const int warp = static_cast<int>(threadIdx.x) / 32;
      const RowMemory memory(shared + warp * RowMemory::bytes(dim), dim);
      append_token(a, place, tokens, rows, static_cast<int64_t>(unit) * kWarps + warp, memory,
                   static_cast<int>(threadIdx.x) % 32);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  // All blocks have read the length before the last one changes it.
  if (atomicAdd(a.arrivals + place.sequence, 1U) + 1 != static_cast<uint32_t>(all) * view.kv_heads) return;
  a.arrivals[place.sequence] = 0;
  if (tokens.fits) {
    view.lengths[place.sequence] += a.span.tokens - tokens.start;
  } else {
    report_room(a.report, place.sequence);
  }
}

// Blocks of a head for one side.
int64_t units_of(const KVPart& part, int64_t window, int64_t tokens) {
  if (part.codec != KVCodec::channel_grid) return ceil_div(tokens, kWarps);
  // The window and what these tokens can complete, wherever the sequence stands.
  return std::max(window, (window - 1 + tokens) / window * window) / part.group;
}

}  // namespace

void launch_append(const KVAppend& append, cudaStream_t stream) {
  const KVView& view = append.view;
  const int64_t keys = units_of(view.layout.keys, view.window, append.span.tokens);
  const int64_t values = units_of(view.layout.values, view.window, append.span.tokens);
  const int64_t blocks = checked_mul(checked_mul(append.span.sequences, view.kv_heads), keys + values);
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw InvalidArgument("keys", text_of(append.span.tokens, " tokens"), "fewer in one call");
  }
  const auto dim = static_cast<int>(view.layout.head_dim);
  static_assert(sizeof(Grid) + kChunk == 40);
  const int memory = std::max(kWarps * RowMemory::bytes(dim), 40 * dim);
  append_kernel<<<static_cast<unsigned>(blocks), kThreads, memory, stream>>>(
      append, {static_cast<int>(keys), static_cast<int>(values)});
  check_cuda(cudaGetLastError(), "append to a cache");
}

}  // namespace quantloom::kv_cache
