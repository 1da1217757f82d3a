// Where decoded codes go: to memory as they are, or as values of a matrix. Positions count the codes of the
// stream; a sink keeps those in [first, last).
#pragma once

#include <cstdint>

#include "common/load_float.cuh"

namespace quantloom::cuda {

__device__ __forceinline__ void convert(float value, float& out) {
  out = value;
}
__device__ __forceinline__ void convert(float value, __half& out) {
  out = __float2half_rn(value);
}
__device__ __forceinline__ void convert(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}

struct CodeSink {
  uint8_t* out = nullptr;
  int64_t first = 0;
  int64_t last = 0;
  bool vector = false;  // four codes of a run can be stored at once

  __device__ void prepare(float* /*shared*/) {}

  // Follows the runs of a lane, which lie 128 codes apart.
  struct Cursor {
    int64_t position;
    __device__ Cursor(const CodeSink& /*sink*/, int64_t at) : position(at) {}
    __device__ void advance() { position += 128; }
  };

  // Four codes, the first of them lowest.
  __device__ void store_run(const Cursor& cursor, uint32_t codes) const {
    const int64_t at = cursor.position;
    if (vector && at >= first && at + 4 <= last) {
      *reinterpret_cast<uint32_t*>(out + (at - first)) = codes;
      return;
    }
    for (int i = 0; i < 4; ++i) store(at + i, codes >> (8 * i) & 0xffU);
  }
  __device__ void store(int64_t position, uint32_t code) const {
    if (position >= first && position < last) out[position - first] = static_cast<uint8_t>(code);
  }
};

template <class Out>
struct ValueSink {
  Out* out = nullptr;
  int64_t first = 0;
  int64_t last = 0;
  int64_t first_row = 0;
  int64_t stride = 0;
  uint32_t k = 0;
  const float* table = nullptr;
  uint32_t entries = 0;
  const void* scales = nullptr;
  DType scale_dtype = DType::f32;
  int64_t scales_per_row = 0;
  uint32_t rows_per_scale = 1;
  uint32_t columns_per_scale = 1;
  int column_shift = -1;          // log2 of columns_per_scale; -1 if it is no power of two
  bool vector = false;            // a run lies in one row, under one scale, at an aligned address
  const float* values = nullptr;  // the table, in shared memory

  __device__ void prepare(float* shared) {
    for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) shared[i] = i < entries ? table[i] : 0.0F;
    values = shared;
  }

  struct Cursor {
    int64_t position;
    uint32_t row;
    uint32_t column;
    uint32_t k;
    __device__ Cursor(const ValueSink& sink, int64_t at) : position(at), k(sink.k) { locate(); }
    __device__ void locate() {
      row = static_cast<uint32_t>(position / k);
      column = static_cast<uint32_t>(position - static_cast<int64_t>(row) * k);
    }
    __device__ void advance() {
      position += 128;
      if (k < 128) {
        locate();
        return;
      }
      column += 128;
      if (column >= k) {
        column -= k;
        ++row;
      }
    }
  };

  __device__ float scale_at(uint32_t row, uint32_t column) const {
    const uint32_t block_column = column_shift >= 0 ? column >> column_shift : column / columns_per_scale;
    const uint32_t block_row = rows_per_scale == 1 ? row : row / rows_per_scale;
    return load_float(scales, scale_dtype, static_cast<int64_t>(block_row) * scales_per_row + block_column);
  }
  __device__ void store_run(const Cursor& cursor, uint32_t codes) const {
    const int64_t at = cursor.position;
    if (vector && at >= first && at < last) {
      const float scale = scale_at(cursor.row, cursor.column);
      alignas(4 * sizeof(Out)) Out run[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) convert(values[codes >> (8 * i) & 0xffU] * scale, run[i]);
      Out* to = out + (static_cast<int64_t>(cursor.row) - first_row) * stride + cursor.column;
      if constexpr (sizeof(Out) == 2) {
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(run);
      } else {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(run);
      }
      return;
    }
    for (int i = 0; i < 4; ++i) store(at + i, codes >> (8 * i) & 0xffU);
  }
  __device__ void store(int64_t position, uint32_t code) const {
    if (position < first || position >= last) return;
    const auto row = static_cast<uint32_t>(position / k);
    const auto column = static_cast<uint32_t>(position - static_cast<int64_t>(row) * k);
    convert(values[code] * scale_at(row, column),
            out[(static_cast<int64_t>(row) - first_row) * stride + column]);
  }
};

}  // namespace quantloom::cuda
