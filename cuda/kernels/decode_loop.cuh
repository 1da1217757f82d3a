// From fragment order to rows of values, for products with so many tokens that decoding is a small part.
//
// A warp decodes blocks of 64 x 64. A lane's fragment of a step is four consecutive columns of two rows;
// stores are of 16 bytes. Bound by the memory it writes.
#pragma once

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "formats/fragment_order.hpp"
#include "kernels/group_scales.cuh"
#include "kernels/outlier_rows.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom::cuda {

constexpr int kDecodeThreads = 128;

__device__ __forceinline__ float2 floats_of(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  if constexpr (HalfPair<T>::kMantissa == 10) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Stores a lane's four columns of two steps; `row`: the row, from the first column of the first step on.
// Called by all lanes of a warp; `stored` is the same for the four lanes of a row.
__device__ __forceinline__ void store_steps(const float (&values)[2][4], float* row, int lane, bool stored) {
  if (!stored) return;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    *reinterpret_cast<float4*>(row + 16 * step + lane % 4 * 4) =
        make_float4(values[step][0], values[step][1], values[step][2], values[step][3]);
  }
}
template <class T>
__device__ __forceinline__ void store_steps(const float (&values)[2][4], T* row, int lane, bool stored) {
  // Of two neighbouring lanes, one takes the eight columns of the first step, the other of the second.
  uint32_t pairs[2][2];
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    pairs[step][0] = rounded_pair<T>(values[step][0], values[step][1]);
    pairs[step][1] = rounded_pair<T>(values[step][2], values[step][3]);
  }
  const bool second = lane % 2 == 1;
  const uint32_t x = __shfl_xor_sync(0xFFFFFFFFU, second ? pairs[0][0] : pairs[1][0], 1);
  const uint32_t y = __shfl_xor_sync(0xFFFFFFFFU, second ? pairs[0][1] : pairs[1][1], 1);
  if (!stored) return;
  *reinterpret_cast<uint4*>(row + lane % 2 * 16 + lane % 4 / 2 * 8) =
      second ? make_uint4(x, y, pairs[1][0], pairs[1][1]) : make_uint4(pairs[0][0], pairs[0][1], x, y);
}

template <DType kDType>
__device__ __forceinline__ void convert_scales(const RawParameters& parameters, float (&scales)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) scales[i] = parameters.scale(kDType, i);
}

// Steps 2 * kHalf and 2 * kHalf + 1 of a block. `rows`: from the lane's first row to the last of the matrix;
// `out`: the lane's first row in the block's first column.
template <class Decoder, class Out, int kHalf>
__device__ __forceinline__ void decode_half(const FragmentMatrix& w, const Decoder& decoder,
                                            const uint4 (&pieces)[Decoder::kBits],
                                            const RawParameters (&parameters)[2], int lane, int64_t rows,
                                            Out* out, int64_t stride) {
  float scales[2][8];
  float offsets[2][8];
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if (w.scale_dtype == DType::f16) {
      convert_scales<DType::f16>(parameters[step], scales[step]);
    } else if (w.scale_dtype == DType::bf16) {
      convert_scales<DType::bf16>(parameters[step], scales[step]);
    } else {
      convert_scales<DType::f32>(parameters[step], scales[step]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) offsets[step][i] = 0.0F;
    if (w.zeros != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) offsets[step][i] = Decoder::kCenter - parameters[step].zero(i);
    }
  }
#pragma unroll
  for (int unit = 0; unit < fragments::kUnits; ++unit) {
    uint32_t words[Decoder::kBits];
    words_of_unit<Decoder::kBits>(pieces, unit, words);
    uint32_t a[2][4];
    decoder.template fragment<__half, 2 * kHalf>(words, a[0]);
    decoder.template fragment<__half, 2 * kHalf + 1>(words, a[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 2 * unit + r;
      float values[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 pair = floats_of(a[step][r + 2 * j]);
          values[step][2 * j] = __fmul_rn(scales[step][i], fmaf(pair.x, Decoder::kUnit, offsets[step][i]));
          values[step][2 * j + 1] =
              __fmul_rn(scales[step][i], fmaf(pair.y, Decoder::kUnit, offsets[step][i]));
        }
      }
      store_steps(values, out + (8 * i) * stride + 32 * kHalf, lane, 8 * i < rows);
    }
  }
}

// What store_steps() relies on.
static_assert(fragments::column_of(3, 4 * 2, 0) == 32 + 12 &&
              fragments::column_of(1, 4 * 3 + 2, 1) == 48 + 7);

template <class Decoder, class Out>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_fragments(const __grid_constant__ FragmentMatrix w, Out* out, int64_t stride) {
  constexpr int kBits = Decoder::kBits;
  extern __shared__ __align__(16) unsigned char decoder_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_begin();
  Decoder decoder;
  decoder.template prepare<__half>(w.table, w.table_entries, decoder_memory);
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
    Out* const place = out + row * stride + static_cast<int64_t>(block) * fragments::kBlockColumns;
    decode_half<Decoder, Out, 0>(w, decoder, pieces, parameters[0], lane, w.n - row, place, stride);
    decode_half<Decoder, Out, 1>(w, decoder, pieces, parameters[1], lane, w.n - row, place, stride);
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
  // A table is filled once by each block of threads: few of them, for many blocks of the matrix.
  const int64_t most = int64_t{Decoder::kSharedBytes > 0 ? 5 : 64} * current_device().processors;
  LaunchSettings settings(dim3(static_cast<unsigned>(std::min((blocks + kWarps - 1) / kWarps, most))),
                          dim3(kDecodeThreads), stream, overlap, 1);
  settings.config.dynamicSmemBytes = Decoder::kSharedBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, w, static_cast<Out*>(out), stride),
             "matmul_cuda: launch of decode_fragments");
}

template <class Decoder>
void launch_decode_fragments(const FragmentMatrix& w, void* out, int64_t stride, DType dtype, bool overlap,
                             cudaStream_t stream) {
  if (dtype == DType::f16) {
    launch_decode_to<Decoder, __half>(w, out, stride, overlap, stream);
  } else if (dtype == DType::bf16) {
    launch_decode_to<Decoder, __nv_bfloat16>(w, out, stride, overlap, stream);
  } else {
    launch_decode_to<Decoder, float>(w, out, stride, overlap, stream);
  }
  add_outliers_to_decoded(w, out, stride, dtype, stream);
}

template <class Decoder>
void launch_decoded(const ProductLaunch& launch, void* workspace) {
  const ProductArguments& p = launch.arguments;
  if (p.m == 0 || p.w.n == 0) return;
  if (p.w.column_blocks == 0) return launch_bias_alone(launch);
  const DecodedPlan plan = decoded_plan(p.w, p.m, launch.dtype, launch.splits);
  for (int64_t first = 0; first < p.w.n; first += plan.rows) {
    const ProductLaunch part = part_of_rows(launch, first, plan.rows, Decoder::kBits);
    launch_decode_fragments<Decoder>(part.arguments.w, workspace, int64_t{64} * p.w.column_blocks,
                                     launch.dtype, launch.overlap && first == 0, launch.stream);
    multiply_decoded(part, plan, first == 0, workspace);
  }
}

}  // namespace quantloom::cuda
