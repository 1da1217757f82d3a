// Trellis codes decoded to the values that the format defines, to the bit of the CPU: float32 sums in the
// order of its butterflies.
//
// A block of four warps makes 128 x 128 weights. A thread has a row, then a column, whole: both rotations are
// in registers, and values change hands in shared memory.
#pragma once

#include "common/check.cuh"
#include "kernels/trellis_spans.cuh"
#include "kernels/trellis_stage.cuh"

namespace quantloom::cuda {

constexpr int kPlainThreads = 256;
constexpr int kExactThreads = kTileSide;
constexpr int kExactBlocks = 3;              // of threads on a processor
constexpr int kExactStride = kTileSide + 4;  // floats
constexpr int kExactRows = kTileSide * kExactStride * 4;
constexpr int kExactBytes = kExactRows + kTileSide * 4;  // and the scales of the rows

// The orthonormal Hadamard matrix of order 128, in the order of the CPU.
__device__ __forceinline__ void rotate_values(float (&v)[kTileSide]) {
  constexpr auto kNorm = static_cast<float>(0.08838834764831845);  // 1 / sqrt(128)
#pragma unroll
  for (int distance = 1; distance < kTileSide; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kTileSide; ++i) {
      if ((i & distance) != 0) continue;
      const float difference = v[i] - v[i + distance];
      v[i] += v[i + distance];
      v[i + distance] = difference;
    }
  }
#pragma unroll
  for (int i = 0; i < kTileSide; ++i) v[i] = __fmul_rn(v[i], kNorm);
}

template <class Stage>
__global__ void __launch_bounds__(kExactThreads, kExactBlocks)
    decode_exactly(const __grid_constant__ TrellisDense w) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const floats = reinterpret_cast<float*>(memory);
  auto* const outputs = reinterpret_cast<float*>(memory + kExactRows);
  const int spans = w.column_blocks / 2;
  const auto band = static_cast<int>(blockIdx.x / static_cast<unsigned>(spans));
  const int span = static_cast<int>(blockIdx.x) - band * spans;
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = min(w.n - band * kTileSide, kTileSide);
  outputs[thread] = thread < rows ? __half2float(w.output_scales[band * kTileSide + thread]) : 0.0F;
  const int column = span * kTileSide + thread;
  const float input = column < w.k ? __half2float(w.input_scales[column]) : 0.0F;
  Stage::template decode<kExactThreads / 32>(w, band, span, memory);
  __syncthreads();
  float v[kTileSide];
#pragma unroll
  for (int i = 0; i < kTileSide; i += 8) {
    using Half = HalfPair<__half>;
    const uint4 piece = *reinterpret_cast<const uint4*>(memory + thread * kStageRowBytes + 2 * i);
    v[i] = Half::low(piece.x);
    v[i + 1] = Half::high(piece.x);
    v[i + 2] = Half::low(piece.y);
    v[i + 3] = Half::high(piece.y);
    v[i + 4] = Half::low(piece.z);
    v[i + 5] = Half::high(piece.z);
    v[i + 6] = Half::low(piece.w);
    v[i + 7] = Half::high(piece.w);
  }
  rotate_values(v);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileSide; i += 4) {
    *reinterpret_cast<float4*>(floats + thread * kExactStride + i) =
        make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileSide; ++i) v[i] = floats[i * kExactStride + thread];
  rotate_values(v);
#pragma unroll
  for (int i = 0; i < kTileSide; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(outputs + i);
    v[i] = __fmul_rn(four.x, __fmul_rn(v[i], input));
    v[i + 1] = __fmul_rn(four.y, __fmul_rn(v[i + 1], input));
    v[i + 2] = __fmul_rn(four.z, __fmul_rn(v[i + 2], input));
    v[i + 3] = __fmul_rn(four.w, __fmul_rn(v[i + 3], input));
  }
  // Rows again, so that they are stored in pieces of 16 bytes.
  if (w.dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < kTileSide; ++i) floats[i * kExactStride + thread] = v[i];
    __syncthreads();
    auto* const out = static_cast<float*>(w.out) + int64_t{band} * kTileSide * w.stride + span * kTileSide;
    for (int i = thread / 32; i < rows; i += kExactThreads / 32) {
      *reinterpret_cast<float4*>(out + i * w.stride + thread % 32 * 4) =
          *reinterpret_cast<const float4*>(floats + i * kExactStride + thread % 32 * 4);
    }
    return;
  }
  __syncthreads();
  auto* const halves = reinterpret_cast<uint16_t*>(memory + 2 * thread);
  if (w.dtype == DType::f16) {
#pragma unroll
    for (int i = 0; i < kTileSide; ++i) {
      halves[i * (kStageRowBytes / 2)] = __half_as_ushort(__float2half_rn(v[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTileSide; ++i) {
      halves[i * (kStageRowBytes / 2)] = __bfloat16_as_ushort(__float2bfloat16_rn(v[i]));
    }
  }
  __syncthreads();
  auto* const out = static_cast<uint16_t*>(w.out) + int64_t{band} * kTileSide * w.stride + span * kTileSide;
  for (int i = thread / 16; i < rows; i += kExactThreads / 16) {
    *reinterpret_cast<uint4*>(out + i * w.stride + thread % 16 * 8) =
        *reinterpret_cast<const uint4*>(memory + i * kStageRowBytes + thread % 16 * 16);
  }
}

// Without the rotation.
template <class Stage>
__global__ void __launch_bounds__(kPlainThreads) decode_plain(const __grid_constant__ TrellisDense w) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float outputs[kTileSide];
  const int spans = w.column_blocks / 2;
  const auto band = static_cast<int>(blockIdx.x / static_cast<unsigned>(spans));
  const int span = static_cast<int>(blockIdx.x) - band * spans;
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = min(w.n - band * kTileSide, kTileSide);
  // Of a thread, 16 bytes of a row: four columns or eight.
  const bool wide = w.dtype == DType::f32;
  const int in_row = wide ? 32 : 16;  // threads
  const int column = thread % in_row * (kTileSide / in_row);
  float inputs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = span * kTileSide + column + i;
    inputs[i] = at < w.k && !(wide && i >= 4) ? __half2float(w.input_scales[at]) : 0.0F;
  }
  if (thread < rows) outputs[thread] = __half2float(w.output_scales[band * kTileSide + thread]);
  Stage::template decode<kPlainThreads / 32>(w, band, span, memory);
  __syncthreads();
  const int64_t first = int64_t{band} * kTileSide * w.stride + span * kTileSide + column;
  for (int row = thread / in_row; row < rows; row += kPlainThreads / in_row) {
    using Half = HalfPair<__half>;
    const unsigned char* const from = memory + row * kStageRowBytes + 2 * column;
    const float output = outputs[row];
    const auto scaled = [&](float value, int i) { return __fmul_rn(output, __fmul_rn(value, inputs[i])); };
    const int64_t to = first + row * w.stride;
    if (wide) {
      const uint2 piece = *reinterpret_cast<const uint2*>(from);
      *reinterpret_cast<float4*>(static_cast<float*>(w.out) + to) =
          make_float4(scaled(Half::low(piece.x), 0), scaled(Half::high(piece.x), 1),
                      scaled(Half::low(piece.y), 2), scaled(Half::high(piece.y), 3));
      continue;
    }
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    const bool bfloat16 = w.dtype == DType::bf16;
    const uint2 low = round_four(bfloat16, scaled(Half::low(piece.x), 0), scaled(Half::high(piece.x), 1),
                                 scaled(Half::low(piece.y), 2), scaled(Half::high(piece.y), 3));
    const uint2 high = round_four(bfloat16, scaled(Half::low(piece.z), 4), scaled(Half::high(piece.z), 5),
                                  scaled(Half::low(piece.w), 6), scaled(Half::high(piece.w), 7));
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(w.out) + to) = make_uint4(low.x, low.y, high.x, high.y);
  }
}

template <class Stage>
void launch_exact_rows(const TrellisDense& dense, cudaStream_t stream) {
  const int64_t tiles = static_cast<int64_t>(dense.bands) * (dense.column_blocks / 2);
  if (tiles == 0) return;
  if (tiles > 2147483647) throw Unsupported(text_of("no CUDA kernel for ", tiles, " tiles of a trellis"));
  static_assert(kStageBytes + Stage::kWordBytes <= kExactRows);
  const auto kernel = dense.rotated ? decode_exactly<Stage> : decode_plain<Stage>;
  const int threads = dense.rotated ? kExactThreads : kPlainThreads;
  const int shared = dense.rotated ? kExactBytes : kStageBytes + Stage::kWordBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "shared memory of the trellis decoder");
  kernel<<<static_cast<unsigned>(tiles), threads, shared, stream>>>(dense);
  check_cuda(cudaGetLastError(), "launch of the trellis decoder");
}

}  // namespace quantloom::cuda
