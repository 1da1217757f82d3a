// From fragment order to rows of values, for products with so many tokens that decoding is a small part.
//
// A warp decodes blocks of 64 x 64. A lane's fragments of two steps are eight consecutive columns of a row:
// it stores them at once. Bound by the memory it writes.
#pragma once

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "kernels/fragment_order.hpp"
#include "kernels/fragment_parameters.cuh"
#include "kernels/overlap.cuh"
#include "kernels/products.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom::cuda {

constexpr int kDecodeThreads = 128;

__device__ __forceinline__ void store_eight(const float (&values)[8], float* out) {
  auto* const pieces = reinterpret_cast<float4*>(out);
  pieces[0] = make_float4(values[0], values[1], values[2], values[3]);
  pieces[1] = make_float4(values[4], values[5], values[6], values[7]);
}
template <class T>
__device__ __forceinline__ void store_eight(const float (&values)[8], T* out) {
  alignas(16) T rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rounded[i] = HalfPair<T>::from_float(values[i]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(rounded);
}

__device__ __forceinline__ float2 floats_of(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Steps 2 * kHalf and 2 * kHalf + 1 of a block. `out`: the lane's first row and column of the block.
template <class Decoder, class Out, int kHalf>
__device__ __forceinline__ void decode_half(const FragmentMatrix& w, const Decoder& decoder,
                                            const uint4 (&pieces)[Decoder::kBits],
                                            const RawParameters (&parameters)[2], int64_t rows, Out* out,
                                            int64_t stride) {
  constexpr int kBits = Decoder::kBits;
#pragma unroll
  for (int unit = 0; unit < fragments::kUnits; ++unit) {
    uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int at = unit * kBits + i;
      const uint4& piece = pieces[at / 4];
      words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
    }
    uint32_t a[2][4];
    decoder.template fragment<__half, 2 * kHalf>(words, a[0]);
    decoder.template fragment<__half, 2 * kHalf + 1>(words, a[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * unit + 8 * r;
      if (row >= rows) continue;
      float values[8];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int i = 2 * unit + r;
        const float scale = parameters[step].scale(w.scale_dtype, i);
        const float offset = w.zeros == nullptr ? 0.0F : Decoder::kCenter - parameters[step].zero(i);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 pair = floats_of(a[step][r + 2 * j]);
          values[4 * step + 2 * j] = __fmul_rn(scale, fmaf(pair.x, Decoder::kUnit, offset));
          values[4 * step + 2 * j + 1] = __fmul_rn(scale, fmaf(pair.y, Decoder::kUnit, offset));
        }
      }
      store_eight(values, out + row * stride + 32 * kHalf);
    }
  }
}

template <class Decoder, class Out>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_fragments(const __grid_constant__ FragmentMatrix w, Out* out, int64_t stride) {
  constexpr int kBits = Decoder::kBits;
  extern __shared__ __align__(16) unsigned char decoder_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_begin();
  Decoder decoder;
  decoder.prepare(w.table, w.table_entries, decoder_memory);
  if constexpr (Decoder::kSharedBytes > 0) __syncthreads();
  // Kernels before may still read what is written here.
  wait_for_previous();

  const int64_t blocks = static_cast<int64_t>(w.row_blocks) * w.column_blocks;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kDecodeThreads / 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kDecodeThreads / 32) + warp; i < blocks; i += warps) {
    const int row_block = static_cast<int>(i / w.column_blocks);
    const int block = static_cast<int>(i % w.column_blocks);
    uint4 pieces[kBits];
#pragma unroll
    for (int c = 0; c < kBits; ++c) pieces[c] = __ldcs(w.codes + (i * kBits + c) * 32 + lane);
    const int64_t first = static_cast<int64_t>(row_block) * w.group_count * 64 + lane / 4 * 8;
    RawParameters parameters[2][2];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      // Columns past the last group are padding.
      const int group = min((4 * block + step) / w.group_steps, w.group_count - 1);
      parameters[step / 2][step % 2].load(w, first + static_cast<int64_t>(group) * 64);
    }
    const int64_t row = static_cast<int64_t>(row_block) * fragments::kBlockRows + lane / 4;
    Out* const place =
        out + row * stride + static_cast<int64_t>(block) * fragments::kBlockColumns + lane % 4 * 8;
    decode_half<Decoder, Out, 0>(w, decoder, pieces, parameters[0], w.n - row, place, stride);
    decode_half<Decoder, Out, 1>(w, decoder, pieces, parameters[1], w.n - row, place, stride);
  }
}

template <class Decoder, class Out>
void launch_decode_to(const FragmentMatrix& w, void* out, int64_t stride, bool overlap, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(w.row_blocks) * w.column_blocks;
  if (w.n == 0 || blocks == 0) return;
  const auto kernel = decode_fragments<Decoder, Out>;
  if constexpr (Decoder::kSharedBytes > 0) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Decoder::kSharedBytes),
        "matmul_cuda: shared memory of decode_fragments");
  }
  constexpr int64_t kWarps = kDecodeThreads / 32;
  const int64_t most = int64_t{64} * device_facts().multiprocessors;
  LaunchSettings settings(dim3(static_cast<unsigned>(std::min((blocks + kWarps - 1) / kWarps, most))),
                          dim3(kDecodeThreads), stream, overlap, 1);
  settings.config.dynamicSmemBytes = Decoder::kSharedBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, w, static_cast<Out*>(out), stride),
             "matmul_cuda: launch of decode_fragments");
}

template <class Decoder>
void launch_decode_fragments(const FragmentMatrix& w, void* out, int64_t stride, DType dtype, bool overlap,
                             cudaStream_t stream) {
  switch (dtype) {
    case DType::f16:
      return launch_decode_to<Decoder, __half>(w, out, stride, overlap, stream);
    case DType::bf16:
      return launch_decode_to<Decoder, __nv_bfloat16>(w, out, stride, overlap, stream);
    default:
      return launch_decode_to<Decoder, float>(w, out, stride, overlap, stream);
  }
}

template <class Decoder>
void launch_decoded(const ProductLaunch& launch, void* workspace) {
  const ProductArguments& p = launch.arguments;
  if (p.m == 0 || p.w.n == 0) return;
  if (p.w.column_blocks == 0) return launch_bias_alone(launch);
  launch_decode_fragments<Decoder>(p.w, workspace, int64_t{64} * p.w.column_blocks, launch.dtype,
                                   launch.overlap, launch.stream);
  multiply_decoded(launch, workspace);
}

}  // namespace quantloom::cuda
