// From fragment order to rows of values, for products with so many tokens that decoding is a small part.
//
// A warp decodes blocks of 64 x 64. A lane's fragment of a step is four consecutive columns of two rows: it
// stores them at once. Bound by the memory it writes.
#pragma once

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "kernels/fragment_order.hpp"
#include "kernels/group_scales.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom::cuda {

constexpr int kDecodeThreads = 128;

// Four consecutive columns of a row.
__device__ __forceinline__ void store_four(const float (&values)[4], float* out) {
  *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
}
template <class T>
__device__ __forceinline__ void store_four(const float (&values)[4], T* out) {
  alignas(8) T rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = HalfPair<T>::from_float(values[i]);
  *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(rounded);
}

__device__ __forceinline__ float2 floats_of(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Step kStep of a block. `at`: the place of the lane's parameters; `rows`: from the lane's first row to the
// last of the matrix; `out`: the lane's first row in the block's first column.
template <class Decoder, class Out, int kStep>
__device__ __forceinline__ void decode_step(const FragmentMatrix& w, const Decoder& decoder,
                                            const uint4 (&pieces)[Decoder::kBits],
                                            const RawParameters& parameters, int64_t at, int64_t rows,
                                            Out* out, int64_t stride) {
  Out* const place = out + fragments::column_of(static_cast<int>(threadIdx.x) % 32, 4 * kStep, 0);
#pragma unroll
  for (int unit = 0; unit < fragments::kUnits; ++unit) {
    uint32_t words[Decoder::kBits];
    words_of_unit<Decoder::kBits>(pieces, unit, words);
    uint32_t a[4];
    decoder.template fragment<__half, kStep>(words, a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * unit + 8 * r;
      if (row >= rows) continue;
      const int i = 2 * unit + r;
      const float scale = scale_of(parameters, w, at, i);
      const float offset = w.zeros == nullptr ? 0.0F : Decoder::kCenter - parameters.zero(i);
      float values[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 pair = floats_of(a[r + 2 * j]);
        values[2 * j] = __fmul_rn(scale, fmaf(pair.x, Decoder::kUnit, offset));
        values[2 * j + 1] = __fmul_rn(scale, fmaf(pair.y, Decoder::kUnit, offset));
      }
      store_four(values, place + row * stride);
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
  prepare_decoder<__half>(decoder, w, decoder_memory);
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
    RawParameters parameters[4];
    int64_t at[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      // Columns past the last group are padding.
      const int group = min((4 * block + step) / w.group_steps, w.group_count - 1);
      at[step] = first + static_cast<int64_t>(group) * 64;
      parameters[step].load(w, at[step]);
    }
    const int64_t row = static_cast<int64_t>(row_block) * fragments::kBlockRows + lane / 4;
    Out* const place = out + row * stride + static_cast<int64_t>(block) * fragments::kBlockColumns;
    decode_step<Decoder, Out, 0>(w, decoder, pieces, parameters[0], at[0], w.n - row, place, stride);
    decode_step<Decoder, Out, 1>(w, decoder, pieces, parameters[1], at[1], w.n - row, place, stride);
    decode_step<Decoder, Out, 2>(w, decoder, pieces, parameters[2], at[2], w.n - row, place, stride);
    decode_step<Decoder, Out, 3>(w, decoder, pieces, parameters[3], at[3], w.n - row, place, stride);
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
