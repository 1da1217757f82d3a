// Keys and queries in the basis that keys are stored in, bit for bit those of the CPU; and the search for
// values that cannot be stored.
#include "common/check.cuh"
#include "common/load_float.cuh"
#include "common/shared_memory.cuh"
#include "common/store_float.cuh"
#include "kv_cache/append.hpp"
#include "kv_cache/row_checks.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// A vector of a call: row number i of [sequences of the span, heads, tokens].
struct SpanRow {
  int sequence;
  int head;
  int64_t token;
  int64_t element;  // of the source
  bool exists;      // not before its sequence's start
};

__device__ SpanRow span_row(const KVSpan& span, const KVSource& source, int heads, int64_t i) {
  SpanRow row{};
  row.token = i % span.tokens;
  const int64_t pair = i / span.tokens;
  row.head = static_cast<int>(pair % heads);
  const auto sequence = static_cast<int>(pair / heads);
  row.sequence = span.sequence + sequence;
  row.exists = sequence < span.sequences && (!span.started || row.token >= span.starts[sequence]);
  row.element =
      row.sequence * source.strides[0] + row.head * source.strides[1] + row.token * source.strides[2];
  return row;
}

// x H by a warp: the matrix of odd order first, then butterflies from neighbours on, as
// src/transforms/hadamard_rows.cpp has them.
__device__ float* transform(const KVBasis& basis, int head_dim, float* x, float* second, int lane) {
  const int columns = 1 << basis.power;
  if (basis.base != nullptr) {
    for (int d = lane; d < head_dim; d += 32) {
      const int8_t* entries = basis.base + d / columns * basis.order;
      float sum = 0;
      for (int j = 0; j < basis.order; ++j) {
        const float value = x[j * columns + d % columns];
        sum = entries[j] > 0 ? sum + value : sum - value;
      }
      second[d] = sum;
    }
    __syncwarp();
    x = second;
  }
  for (int stride = 1; stride < columns; stride *= 2) {
    for (int i = lane; i < head_dim / 2; i += 32) {
      const int low = i / stride * 2 * stride + i % stride;
      const float a = x[low];
      const float b = x[low + stride];
      x[low] = a + b;
      x[low + stride] = a - b;
    }
    __syncwarp();
  }
  for (int d = lane; d < head_dim; d += 32) x[d] *= basis.factor;
  return x;
}

// As turn_back() of src/kv_cache/kv_rotation.cpp.
__device__ void turn_back(const KVView& view, int64_t position, float* x, int lane) {
  const auto half = static_cast<int>(view.rotated / 2);
  for (int i = lane; i < half; i += 32) {
    const double c = view.cosines[position * half + i];
    const double v = view.sines[position * half + i];
    const double a = x[i];
    const double b = x[half + i];
    x[i] = static_cast<float>((a * c + b * v) / (c * c + v * v));
    x[half + i] = static_cast<float>((b * c - a * v) / (c * c + v * v));
  }
}

__global__ void __launch_bounds__(kThreads) change_kernel(const __grid_constant__ KVChange c) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto dim = static_cast<int>(c.view.layout.head_dim);
  float* x = cuda::dynamic_shared_memory<float>() + 2 * dim * warp;
  const SpanRow row = span_row(c.span, c.from, c.heads, static_cast<int64_t>(blockIdx.x) * kWarps + warp);
  if (!row.exists) return;
  bool bad = false;
  for (int d = lane; d < dim; d += 32) {
    x[d] = cuda::load_float(c.from.data, c.from.dtype, row.element + d);
    bad |= is_bad(x[d]);
  }
  const int64_t start = c.span.started ? c.span.starts[row.sequence - c.span.sequence] : 0;
  const int64_t position =
      c.turn || c.report.faults != nullptr ? c.view.lengths[row.sequence] + row.token - start : 0;
  if (c.report.faults != nullptr && __any_sync(0xffffffffU, bad) && lane == 0) {
    const int64_t pair = static_cast<int64_t>(row.sequence) * c.heads + row.head;
    report_value(c.report, pair, position, KVSide::keys);
  }
  __syncwarp();
  if (c.turn) {
    // Beyond the tables there is no room either, and append() leaves the sequence alone.
    if (position < c.view.positions) turn_back(c.view, position, x, lane);
  } else {
    x = transform(c.basis, dim, x, x + dim, lane);
  }
  __syncwarp();
  const int64_t to =
      ((static_cast<int64_t>(row.sequence) * c.heads + row.head) * c.span.tokens + row.token) * dim;
  for (int d = lane; d < dim; d += 32) cuda::store_float(c.out, c.out_dtype, to + d, x[d]);
}

__global__ void __launch_bounds__(kThreads)
    look_kernel(const __grid_constant__ KVSource source, int heads, int head_dim,
                const __grid_constant__ KVSpan span, uint64_t* key) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const SpanRow row = span_row(
      span, source, heads, static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32);
  if (!row.exists) return;
  bool bad = false;
  for (int d = lane; d < head_dim; d += 32) {
    bad |= is_bad(cuda::load_float(source.data, source.dtype, row.element + d));
  }
  if (!__any_sync(0xffffffffU, bad) || lane != 0) return;
  const int64_t index = (static_cast<int64_t>(row.sequence) * heads + row.head) * span.tokens + row.token;
  atomicMin(reinterpret_cast<unsigned long long*>(key), static_cast<unsigned long long>(index));
}

unsigned blocks_of(const KVSpan& span, int heads) {
  const int64_t rows = checked_mul(checked_mul(span.sequences, heads), span.tokens);
  if (rows > INT32_MAX) throw InvalidArgument("tokens", text_of(span.tokens), "fewer in one call");
  return static_cast<unsigned>(ceil_div(rows, kWarps));
}

}  // namespace

void launch_change(const KVChange& change, cudaStream_t stream) {
  const unsigned blocks = blocks_of(change.span, change.heads);
  if (blocks == 0) return;
  const auto memory = static_cast<size_t>(kWarps * 2 * change.view.layout.head_dim) * sizeof(float);
  change_kernel<<<blocks, kThreads, memory, stream>>>(change);
  check_cuda(cudaGetLastError(), "basis of keys");
}

void launch_look(const KVSource& source, int heads, int head_dim, const KVSpan& span, uint64_t* key,
                 cudaStream_t stream) {
  const unsigned blocks = blocks_of(span, heads);
  if (blocks == 0) return;
  look_kernel<<<blocks, kThreads, 0, stream>>>(source, heads, head_dim, span, key);
  check_cuda(cudaGetLastError(), "look for values that cannot be stored");
}

}  // namespace quantloom::kv_cache
