// New tokens into a cache, the same bytes as src/kv_cache/kv_cache.cpp writes. One launch does all of it, and
// all that depends on lengths is decided on the device, so that a captured graph can be replayed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/check.cuh"
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

__device__ float to_float(float value) {
  return value;
}
__device__ float to_float(__half value) {
  return __half2float(value);
}
__device__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// The vectors of one head: those that came, and those that the cache keeps exact.
template <class T>
struct HeadRows {
  const T* given;  // token 0 of the call
  int64_t stride;
  T* exact;  // slot 0
  int head_dim;

  __device__ const T* given_at(int i) const { return given + i * stride; }
  __device__ T* exact_at(int slot) const { return exact + static_cast<int64_t>(slot) * head_dim; }
  // Copies a vector that came to a slot, by lanes; whether this lane saw a value that cannot be stored.
  __device__ bool keep(int i, int slot, int lane) const {
    bool bad = false;
    const T* from = given_at(i);
    T* to = exact_at(slot);
    for (int d = lane; d < head_dim; d += 32) {
      const T value = from[d];
      bad |= is_bad(to_float(value));
      to[d] = value;
    }
    return bad;
  }
};

// The tokens of a call for one sequence, counted from the first that is not kept at its start.
struct NewTokens {
  int start;   // the first one of the call
  int begin;   // its number, below 0 for tokens that are kept
  int window;  // the first one that goes through the window
  int end;
  bool fits;

  __device__ int index(int token) const { return start + token - begin; }
};

struct Place {
  int sequence;
  int head;
  KVSide side;
};

__device__ NewTokens new_tokens(const KVAppend& a, int sequence) {
  NewTokens tokens{};
  const int64_t start = a.span.started ? a.span.starts[sequence - a.span.sequence] : 0;
  const int64_t length = a.view.lengths[sequence];
  tokens.fits = length + a.span.tokens - start <= a.room[sequence];
  // Room is less than 2^31; what does not fit is not looked at.
  tokens.start = static_cast<int>(start);
  tokens.begin = static_cast<int>(length) - a.view.first;
  tokens.end = tokens.begin + static_cast<int>(a.span.tokens - start);
  tokens.window = tokens.begin > 0 ? tokens.begin : min(tokens.end, 0);
  return tokens;
}

__device__ std::byte* record_of(const KVView& view, const Place& place, int token, int page_tokens) {
  const int page = token / page_tokens;
  return view.pages[place.sequence * view.table_pages + page] + place.head * view.layout.record_bytes;
}

__device__ void report_row(const KVAppend& a, const Place& place, int token, bool bad, int lane) {
  if (!__any_sync(kAllLanes, bad) || lane != 0) return;
  report_value(a.report, place.sequence * a.view.kv_heads + place.head, token + a.view.first, place.side);
}

// By a warp, for new token number `unit` of the call: it leaves the slot that this token takes to it.
template <class T>
__device__ void append_token(const KVAppend& a, const Place& place, const Part& part, const NewTokens& tokens,
                             const HeadRows<T>& rows, int unit, const RowMemory& memory, int lane) {
  const KVView& view = a.view;
  const int t = tokens.begin + unit;
  if (t >= tokens.end) return;
  const int kept = view.first;
  if (t < 0) {
    report_row(a, place, t, rows.keep(tokens.start + unit, t + kept, lane), lane);
    return;
  }
  const int window = view.window;
  const int coded = t - window;
  // The first tokens of a call own the slots: of those that want a slot, the last one stays there.
  const bool owns = window > 0 && t - tokens.window < window;
  const int last = owns ? t + (tokens.end - 1 - t) / window * window : coded;
  const T* came = rows.given_at(tokens.index(last));
  T* slot = owns ? rows.exact_at(kept + t % window) : nullptr;
  bool bad = false;
  for (int d = lane; d < rows.head_dim; d += 32) {
    const T value = came[d];
    bad |= is_bad(to_float(value));
    if (coded >= 0) memory.values[d] = to_float(owns ? slot[d] : value);
    if (owns) slot[d] = value;
  }
  report_row(a, place, last, bad, lane);
  if (coded < 0) return;
  __syncwarp();
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  encode_token(part, rows.head_dim, memory, lane, coded % page_tokens,
               record_of(view, place, coded, page_tokens), code_tables(view, place.side, place.head));
}

// By a block: `group` tokens of one head, from `first` on, become codes by channel.
template <class T>
__device__ void encode_channels(const KVAppend& a, const Place& place, const Part& part,
                                const NewTokens& tokens, const HeadRows<T>& rows, int first,
                                std::byte* shared) {
  const KVView& view = a.view;
  const int dim = rows.head_dim;
  const auto page_tokens = static_cast<int>(view.layout.page_tokens);
  std::byte* record = record_of(view, place, first, page_tokens);
  const int slot = first % page_tokens;
  auto* grids = reinterpret_cast<Grid*>(shared);
  auto* codes = reinterpret_cast<uint8_t*>(grids + dim);
  // The first `held` of them are in the window, next to each other.
  const int held = min(max(tokens.window - first, 0), part.group);
  const T* exact = rows.exact_at(view.first + first % view.window);
  const T* given = rows.given_at(tokens.index(first));
  const auto row_at = [&](int j) { return j < held ? exact + j * dim : given + j * rows.stride; };
  for (int d = threadIdx.x; d < dim; d += kThreads) {
    float low = to_float(row_at(0)[d]);
    float high = low;
    int bad = is_bad(low) ? 0 : part.group;
#pragma unroll 8
    for (int j = 1; j < part.group; ++j) {
      const float x = to_float(row_at(j)[d]);
      low = x < low ? x : low;
      high = fmaxf(high, x);
      if (is_bad(x)) bad = min(bad, j);
    }
    if (bad < part.group) {
      report_value(a.report, place.sequence * view.kv_heads + place.head, first + bad + view.first,
                   place.side);
    }
    std::byte* grid = record + part.parameters + slot / part.group * dim * 4;
    const ChannelPlace place(part.bits, dim, d);
    grids[d] = store_grid(low, high, part.bits, grid + place.scale, grid + place.least);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int begin = 0; begin < part.group; begin += kChunk) {
    const int count = min(kChunk, part.group - begin);
    __syncthreads();
#pragma unroll 2
    for (int j = warp; j < count; j += kWarps) {
      const T* row = row_at(begin + j);
#pragma unroll 4
      for (int d = lane; d < dim; d += 32) {
        codes[j * dim + d] = code_of(to_float(row[d]), grids[d], part.bits);
      }
    }
    __syncthreads();
    const int words = part.row_bytes / 4;
    for (int i = threadIdx.x; i < count * words; i += kThreads) {
      const int j = i / words;
      const int word = i - j * words;
      auto* row = reinterpret_cast<uint32_t*>(record + part.codes + (slot + begin + j) * part.row_bytes);
      row[word] = pack_bits(codes + j * dim, dim, part.bits, 32 * word, 32);
    }
  }
}

// By a block: group number `unit` of those that may be completed, and the slots of the window that it had.
template <class T>
__device__ void append_group(const KVAppend& a, const Place& place, const Part& part, const NewTokens& tokens,
                             const HeadRows<T>& rows, int unit, int units, std::byte* shared) {
  const KVView& view = a.view;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int t = tokens.begin + unit * kWarps + warp; t < tokens.window; t += units * kWarps) {
    report_row(a, place, t, rows.keep(tokens.index(t), t + view.first, lane), lane);
  }
  if (tokens.end <= 0) return;
  const int from = tokens.window - tokens.window % view.window;
  const int to = tokens.end - tokens.end % view.window;
  const int slot = unit * part.group;
  if (from + slot < to) {
    encode_channels(a, place, part, tokens, rows, from + slot, shared);
    __syncthreads();
  }
  if (slot >= view.window) return;
  for (int j = slot + warp; j < slot + part.group; j += kWarps) {
    const int t = to + j;
    if (t < tokens.window || t >= tokens.end) continue;
    report_row(a, place, t, rows.keep(tokens.index(t), view.first + j, lane), lane);
  }
}

// By a thread of each block when the block has read the length: the last one changes it.
__device__ void arrive(const KVAppend& a, int sequence, const NewTokens& tokens, unsigned blocks_of_head) {
  if (atomicAdd(a.arrivals + sequence, 1U) + 1 != blocks_of_head * a.view.kv_heads) return;
  a.arrivals[sequence] = 0;
  if (tokens.fits) {
    a.view.lengths[sequence] += tokens.end - tokens.begin;
  } else {
    report_room(a.report, sequence);
  }
}

struct Units {
  int keys;  // blocks of a head
  int values;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ KVAppend a, const __grid_constant__ Units units) {
  auto* shared = cuda::dynamic_shared_memory<std::byte>();
  const int all = units.keys + units.values;
  const int pair = static_cast<int>(blockIdx.x) / all;
  int unit = static_cast<int>(blockIdx.x) - pair * all;
  const KVView& view = a.view;
  Place place{a.span.sequence + pair / view.kv_heads, pair % view.kv_heads, KVSide::keys};
  if (unit >= units.keys) {
    place.side = KVSide::values;
    unit -= units.keys;
  }
  const NewTokens tokens = new_tokens(a, place.sequence);
  __syncthreads();
  // By a warp that has the least to do.
  if (threadIdx.x == kThreads - 1) arrive(a, place.sequence, tokens, static_cast<unsigned>(all));
  if (tokens.fits) {
    const bool keys = place.side == KVSide::keys;
    const KVSource& source = keys ? a.keys : a.values;
    const auto dim = static_cast<int>(view.layout.head_dim);
    const int64_t row = (static_cast<int64_t>(place.sequence) * view.kv_heads + place.head) *
                        (static_cast<int64_t>(view.first) + view.window);
    const HeadRows<T> rows{static_cast<const T*>(source.data) + place.sequence * source.strides[0] +
                               place.head * source.strides[1],
                           source.strides[2],
                           reinterpret_cast<T*>(keys ? view.exact_keys : view.exact_values) + row * dim, dim};
    const Part part(view.layout.part(place.side));
    if (part.codec == KVCodec::channel_grid) {
      append_group(a, place, part, tokens, rows, unit, keys ? units.keys : units.values, shared);
    } else {
      const int warp = static_cast<int>(threadIdx.x) / 32;
      const RowMemory memory(shared + warp * RowMemory::bytes(dim), dim);
      append_token(a, place, part, tokens, rows, unit * kWarps + warp, memory,
                   static_cast<int>(threadIdx.x) % 32);
    }
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
  const Units units{static_cast<int>(keys), static_cast<int>(values)};
  const auto grid = static_cast<unsigned>(blocks);
  if (view.dtype == DType::f32) {
    append_kernel<float><<<grid, kThreads, memory, stream>>>(append, units);
  } else if (view.dtype == DType::f16) {
    append_kernel<__half><<<grid, kThreads, memory, stream>>>(append, units);
  } else {
    append_kernel<__nv_bfloat16><<<grid, kThreads, memory, stream>>>(append, units);
  }
  check_cuda(cudaGetLastError(), "append to a cache");
}

}  // namespace quantloom::kv_cache
