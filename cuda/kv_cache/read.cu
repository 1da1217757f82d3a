#include "common/check.cuh"
#include "common/load_float.cuh"
#include "common/shared_memory.cuh"
#include "common/store_float.cuh"
#include "kv_cache/read.hpp"
#include "kv_cache/token_codes.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// As decode_reference() of src/kv_cache/kv_codes.cpp, by a warp.
__device__ void decode_token(const Part& part, int head_dim, const std::byte* record, int slot,
                             const CodeTables& tables, int lane, float* out) {
  const std::byte* row = record + part.codes + slot * part.row_bytes;
  if (part.codec == KVCodec::digits) {
    const float scale = __half2float(*reinterpret_cast<const __half*>(record + part.parameters + slot * 2));
    const std::byte* shifts = record + part.shifts + slot * part.shift_bytes;
    const int half = 1 << (part.bits - 1);
    for (int d = lane; d < head_dim; d += 32) {
      const int code = (code_at(row, d, part.bits) ^ half) - half;
      const int shift = code_at(shifts, d / part.group, part.shift_bits);
      out[d] = scale * static_cast<float>(code * (1 << shift));
    }
    return;
  }
  for (int d = lane; d < head_dim; d += 32) {
    const int code = code_at(row, d, part.bits);
    if (part.codec == KVCodec::channel_table) {
      out[d] = tables.values[code] * __low2float(tables.ranges[d]) + __high2float(tables.ranges[d]);
      continue;
    }
    const std::byte* from = record + part.parameters;
    if (part.codec == KVCodec::channel_grid) {
      const ChannelPlace place(part.bits, head_dim, d);
      from += slot / part.group * head_dim * 4;
      out[d] = load_half(from + place.scale) * static_cast<float>(code) + load_half(from + place.least);
      continue;
    }
    from += (part.codec == KVCodec::token_grid ? slot * part.groups + d / part.group : slot) * 4;
    const Grid grid = load_pair(from);
    out[d] = grid.scale * (part.has_table() ? tables.values[code] : static_cast<float>(code)) + grid.least;
  }
  if (!part.has_table()) return;
  __syncwarp();
  const int end = part.outliers_before(slot + 1, head_dim);
  for (int i = part.outliers_before(slot, head_dim) + lane; i < end; i += 32) {
    const uint32_t entry = *reinterpret_cast<const uint32_t*>(record + part.outliers + i * 4);
    const auto missing = static_cast<unsigned short>(entry >> 16);
    out[(entry & 0xffffU) - slot * head_dim] += __half2float(__ushort_as_half(missing));
  }
}

__global__ void __launch_bounds__(kThreads) read_kernel(const __grid_constant__ KVRead r) {
  const KVView& view = r.view;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto dim = static_cast<int>(view.layout.head_dim);
  float* values = cuda::dynamic_shared_memory<float>() + dim * warp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (i >= r.count * view.kv_heads) return;
  const auto head = static_cast<int>(i / r.count);
  const int64_t position = r.first + i % r.count;
  const int64_t t = position - view.first;
  if (t >= 0 && t < view.coded(r.side, r.length)) {
    const int64_t page = t / view.layout.page_tokens;
    const std::byte* record =
        view.pages[r.sequence * view.table_pages + page] + head * view.layout.record_bytes;
    decode_token(Part(view.layout.part(r.side)), dim, record, static_cast<int>(t % view.layout.page_tokens),
                 code_tables(view, r.side, head), lane, values);
  } else {
    const int64_t slot = t < 0 ? position : view.first + t % view.window;
    const int64_t pair = static_cast<int64_t>(r.sequence) * view.kv_heads + head;
    const int64_t row = (pair * (view.first + view.window) + slot) * dim;
    const std::byte* exact = r.side == KVSide::keys ? view.exact_keys : view.exact_values;
    for (int d = lane; d < dim; d += 32) values[d] = cuda::load_float(exact, view.dtype, row + d);
  }
  __syncwarp();
  if (r.side == KVSide::keys && view.rotated > 0) {
    const auto half = static_cast<int>(view.rotated / 2);
    for (int d = lane; d < half; d += 32) {
      const float cosine = view.cosines[position * half + d];
      const float sine = view.sines[position * half + d];
      const float a = values[d];
      const float b = values[half + d];
      values[d] = a * cosine - b * sine;
      values[half + d] = b * cosine + a * sine;
    }
    __syncwarp();
  }
  for (int d = lane; d < dim; d += 32) cuda::store_float(r.out, r.dtype, i * dim + d, values[d]);
}

}  // namespace

void launch_read(const KVRead& read, cudaStream_t stream) {
  const int64_t rows = checked_mul(read.count, read.view.kv_heads);
  if (rows == 0) return;
  const int64_t blocks = ceil_div(rows, kWarps);
  if (blocks > INT32_MAX) throw InvalidArgument("count", text_of(read.count), "fewer tokens in one call");
  const auto memory = static_cast<size_t>(kWarps * read.view.layout.head_dim) * sizeof(float);
  read_kernel<<<static_cast<unsigned>(blocks), kThreads, memory, stream>>>(read);
  check_cuda(cudaGetLastError(), "read of a cache");
}

}  // namespace quantloom::kv_cache
