// Trellis codes on the device: ring words in the order of the kernels, and decoded rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/check.cuh"
#include "formats/trellis_codes.hpp"
#include "kernels/trellis_product.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 128;          // of what a block of threads decodes, and of the rotation
constexpr int kStride = kSide + 1;  // columns are read without conflicts
constexpr int kByteSums = 1021;
constexpr auto kNorm = static_cast<float>(0.08838834764831845);  // 1 / sqrt(128)

struct Words {
  bool fragments;
  int ring_words;
  int64_t column_blocks;
  int64_t row_tiles;
  int64_t column_tiles;
};

Words words_of(const TrellisLayout& layout) {
  return {layout.fragments, layout.ring.words(), layout.column_blocks, layout.row_tiles, layout.column_tiles};
}

__global__ void __launch_bounds__(kThreads)
    prepare_words(const Words words, int64_t count, const uint32_t* packed, uint32_t* prepared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const TrellisWord word = trellis_word(words.fragments, words.ring_words, words.column_blocks, i);
  const bool inside = word.row_tile < words.row_tiles && word.column_tile < words.column_tiles;
  const int64_t at = (word.column_tile * words.row_tiles + word.row_tile) * words.ring_words + word.word;
  prepared[i] = inside ? packed[at] : 0U;
}

__global__ void __launch_bounds__(kThreads)
    unprepare_words(const Words words, int64_t count, const uint32_t* prepared, uint32_t* packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t tile = i / words.ring_words;
  packed[i] =
      prepared[trellis_place(words.fragments, words.ring_words, words.column_blocks, tile % words.row_tiles,
                             tile / words.row_tiles, static_cast<int>(i - tile * words.ring_words))];
}

dim3 grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) throw Unsupported(text_of("no CUDA kernel for ", threads, " words of a trellis"));
  return dim3(static_cast<unsigned>(blocks));
}

struct Matrix {
  TrellisShape ring;
  TrellisCode code;
  uint32_t multiplier;
  bool rotated;
  bool fragments;
  int64_t column_blocks;
  int64_t first_row;
  int64_t end_row;
  int64_t k;
  const uint32_t* words;
  const uint16_t* table;
  const __half* input_scales;
  const __half* output_scales;
};

// A weight of a state. byte_sums: those of 1MAD.
__device__ __forceinline__ float weight(const Matrix& w, const __half* byte_sums, uint32_t state, int which) {
  const uint32_t hash = trellis::hash_of(w.code, w.multiplier, state);
  switch (w.code) {
    case TrellisCode::lcg:
    case TrellisCode::mcg: {
      const uint32_t halves = trellis::halves_of(hash);
      return __half2float(__hadd_rn(__ushort_as_half(static_cast<unsigned short>(halves & 0xFFFFU)),
                                    __ushort_as_half(static_cast<unsigned short>(halves >> 16))));
    }
    case TrellisCode::mul1:
      return __half2float(
          __hfma(__ushort_as_half(static_cast<unsigned short>(0x6400U + trellis::byte_sum(hash))),
                 __ushort_as_half(trellis::kMul1Slope), __ushort_as_half(trellis::kMul1Offset)));
    case TrellisCode::one_mad:
      return __half2float(byte_sums[trellis::byte_sum(hash)]);
    default:
      return __half2float(__ushort_as_half(
          trellis::weight_at(w.code, w.multiplier, w.table, w.ring.weights_per_step, state, which)));
  }
}

// A lane's four values of 128, numbers lane + 32 * i: added in the order of the CPU, to the same bits.
__device__ __forceinline__ void rotate(float (&v)[4]) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const float sign = (threadIdx.x & distance) != 0 ? -1.0F : 1.0F;
    for (float& value : v) value = fmaf(sign, value, __shfl_xor_sync(~0U, value, distance));
  }
  const float a = v[0] + v[1];
  const float b = v[0] - v[1];
  const float c = v[2] + v[3];
  const float d = v[2] - v[3];
  v[0] = __fmul_rn(a + c, kNorm);
  v[1] = __fmul_rn(b + d, kNorm);
  v[2] = __fmul_rn(a - c, kNorm);
  v[3] = __fmul_rn(b - d, kNorm);
}

__device__ __forceinline__ void store(float value, float* to) {
  *to = value;
}
__device__ __forceinline__ void store(float value, __half* to) {
  *to = __float2half_rn(value);
}
__device__ __forceinline__ void store(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}

// A block of threads decodes 128 x 128, the pair of blocks of 64 columns number blockIdx.x.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    decode_band(const __grid_constant__ Matrix w, Out* out, int64_t stride) {
  extern __shared__ float values[];  // [128 rows][kStride], then the words of 64 rings
  __shared__ __half byte_sums[kByteSums];
  auto* const words = reinterpret_cast<uint32_t*>(values + kSide * kStride);
  const int ring_words = w.ring.words();
  const int64_t row_tile = w.first_row / 16 + static_cast<int64_t>(blockIdx.y) * 8;
  const int64_t column_tile = static_cast<int64_t>(blockIdx.x) * 8;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * ring_words; i += kThreads) {
    const int tile = i / ring_words;
    words[i] = w.words[trellis_place(w.fragments, ring_words, w.column_blocks, row_tile + tile / 8,
                                     column_tile + tile % 8, i - tile * ring_words)];
  }
  if (w.code == TrellisCode::one_mad) {
    for (int i = static_cast<int>(threadIdx.x); i < kByteSums; i += kThreads) {
      // Four bytes of that sum.
      const auto sum = static_cast<uint32_t>(i);
      const uint32_t hash = sum / 4 | (sum + 1) / 4 << 8 | (sum + 2) / 4 << 16 | (sum + 3) / 4 << 24;
      byte_sums[i] = __ushort_as_half(trellis::weight_of(TrellisCode::one_mad, hash));
    }
  }
  __syncthreads();
  const int per_step = w.ring.weights_per_step;
  const int window = w.ring.window;
  for (int i = static_cast<int>(threadIdx.x); i < kSide * kSide; i += kThreads) {
    const int tile = i / trellis::kRingLength;
    const int position = i % trellis::kRingLength;
    const int end = w.ring.first_bit(position / per_step + 1);
    const int first = end >= window ? end - window : end - window + 32 * ring_words;
    const uint32_t* const ring = words + tile * ring_words;
    const int word = first / 32;
    const uint32_t next = ring[word + 1 < ring_words ? word + 1 : 0];
    const uint32_t state =
        __funnelshift_l(next, ring[word], static_cast<uint32_t>(first % 32)) >> (32 - window);
    values[(tile / 8 * 16 + trellis::output_of(position)) * kStride + tile % 8 * 16 +
           trellis::input_of(position)] = weight(w, byte_sums, state, position % per_step);
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (w.rotated) {
    for (int line = warp; line < kSide; line += kThreads / 32) {
      float v[4];
      for (int i = 0; i < 4; ++i) v[i] = values[line * kStride + lane + 32 * i];
      rotate(v);
      for (int i = 0; i < 4; ++i) values[line * kStride + lane + 32 * i] = v[i];
    }
    __syncthreads();
    for (int line = warp; line < kSide; line += kThreads / 32) {
      float v[4];
      for (int i = 0; i < 4; ++i) v[i] = values[(lane + 32 * i) * kStride + line];
      rotate(v);
      for (int i = 0; i < 4; ++i) values[(lane + 32 * i) * kStride + line] = v[i];
    }
    __syncthreads();
  }
  const int64_t first_row = w.first_row + static_cast<int64_t>(blockIdx.y) * kSide;
  const int column = static_cast<int>(threadIdx.x) % kSide;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSide + column;
  const float input = at < w.k ? __half2float(w.input_scales[at]) : 0.0F;
  for (int r = static_cast<int>(threadIdx.x) / kSide; r < kSide; r += kThreads / kSide) {
    const int64_t row = first_row + r;
    if (row >= w.end_row) return;
    const float output = __half2float(w.output_scales[row]);
    store(__fmul_rn(output, __fmul_rn(values[r * kStride + column], input)),
          out + (row - w.first_row) * stride + at);
  }
}

template <class Out>
void launch(const Matrix& matrix, int64_t columns, int ring_words, void* out, int64_t stride,
            cudaStream_t stream) {
  const int shared = kSide * kStride * 4 + 64 * ring_words * 4;
  const int64_t bands = ceil_div(matrix.end_row - matrix.first_row, kSide);
  const auto kernel = decode_band<Out>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "shared memory of the trellis decoder");
  constexpr int64_t kMostBands = 65535;  // of a grid
  for (int64_t first = 0; first < bands; first += kMostBands) {
    Matrix part = matrix;
    part.first_row = matrix.first_row + first * kSide;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(columns / kSide),
                          static_cast<unsigned>(std::min(bands - first, kMostBands)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    check_cuda(
        cudaLaunchKernelEx(&config, kernel, part, static_cast<Out*>(out) + first * kSide * stride, stride),
        "launch of the trellis decoder");
  }
}

}  // namespace

void prepare_trellis_words(const TrellisLayout& layout, const uint32_t* packed, uint32_t* prepared,
                           cudaStream_t stream) {
  const int64_t count = layout.words();
  if (count == 0) return;
  prepare_words<<<grid_for(count), kThreads, 0, stream>>>(words_of(layout), count, packed, prepared);
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of prepare_words");
}

void unprepare_trellis_words(const TrellisLayout& layout, const uint32_t* prepared, uint32_t* packed,
                             cudaStream_t stream) {
  const int64_t count = layout.row_tiles * layout.column_tiles * layout.ring.words();
  if (count == 0) return;
  unprepare_words<<<grid_for(count), kThreads, 0, stream>>>(words_of(layout), count, prepared, packed);
  check_cuda(cudaGetLastError(), "unprepare_cuda: launch of unprepare_words");
}

void decode_trellis(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                    void* out, DType dtype, int64_t stride, cudaStream_t stream) {
  if (rows <= 0 || layout.k == 0) return;
  const Matrix matrix{
      .ring = layout.ring,
      .code = layout.code,
      .multiplier = layout.multiplier,
      .rotated = layout.rotated,
      .fragments = layout.fragments,
      .column_blocks = layout.column_blocks,
      .first_row = first_row,
      .end_row = std::min(first_row + rows, layout.n),
      .k = layout.k,
      .words = reinterpret_cast<const uint32_t*>(w.plane("codes").bytes()),
      .table = w.has("table") ? reinterpret_cast<const uint16_t*>(w.plane("table").bytes()) : nullptr,
      .input_scales = reinterpret_cast<const __half*>(w.plane("input_scales").bytes()),
      .output_scales = reinterpret_cast<const __half*>(w.plane("output_scales").bytes())};
  const int64_t columns = layout.column_blocks * 64;
  const int ring_words = layout.ring.words();
  if (dtype == DType::f16) {
    launch<__half>(matrix, columns, ring_words, out, stride, stream);
  } else if (dtype == DType::bf16) {
    launch<__nv_bfloat16>(matrix, columns, ring_words, out, stride, stream);
  } else {
    launch<float>(matrix, columns, ring_words, out, stride, stream);
  }
}

}  // namespace quantloom::cuda
