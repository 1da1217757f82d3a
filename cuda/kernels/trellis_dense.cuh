// Trellis codes decoded to rows of float16 or bfloat16 in the basis of the caller, for products of many
// tokens by cuBLASLt.
//
// With the rotation, a block of eight warps makes 128 x 128 weights at a time. The Hadamard matrix of order
// 128 is that of order 16, on the tensor cores, by that of order 8, on float32 sums in registers. First along
// the rows: a warp has 16 rows, its decoded weights are the operand of 8 columns, and the sums come out with
// rows where the next product wants them. Rounded to float16 they change hands in shared memory, and the same
// is done along the columns, of which a warp has 16. So a weight is rounded twice, here and at the end.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/device.hpp"
#include "kernels/trellis_exact_rows.cuh"

namespace quantloom::cuda {

constexpr int kDenseThreads = 256;
constexpr int kDenseBlocks = 2;  // of threads on a processor
constexpr int kDensePlaneBytes = kTileSide * kTileSide * 2;
constexpr int kDenseScaleBytes = 2 * kTileSide * 4;  // of the rows, then of the columns

// Where decode_rotated() has its weights from: the 16 rows of a warp.
//
// From words of its lanes, which it asks for one tile ahead.
template <int kBits, TrellisHash kHash>
class FragmentRows {
 public:
  static constexpr int kPlanes = 2;  // that rotated weights change hands in, by turns
  static constexpr int kBytes = 0;   // of shared memory

  // A block of 64 columns. Words are numbered as those of TrellisExact.
  class Block {
   public:
    __device__ __forceinline__ Block(const uint32_t (&words)[kBits], const TrellisMap& map)
        : windows_(words), map_(map) {}
    template <int kWord>
    __device__ __forceinline__ uint32_t word() const {
      return TrellisExact<kBits, kHash>::template word<kWord>(windows_, map_);
    }

   private:
    typename TrellisExact<kBits, kHash>::Windows windows_;
    const TrellisMap& map_;
  };

  __device__ __forceinline__ void ask(const TrellisDense& w, int band, int span) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int64_t block = static_cast<int64_t>(2 * band + warp / 4) * w.column_blocks + 2 * span;
    load_unit<kBits>(w.codes, block, warp % 4, lane, words_[0]);
    load_unit<kBits>(w.codes, block + 1, warp % 4, lane, words_[1]);
  }
  // By all threads, before the blocks of a tile are taken.
  __device__ __forceinline__ void stage(const TrellisDense& /*w*/, int /*band*/, int /*span*/,
                                        unsigned char* /*memory*/) {}
  __device__ __forceinline__ Block block(const TrellisDense& w, const unsigned char* /*memory*/,
                                         int i) const {
    return Block(words_[i], w.map);
  }

 private:
  uint32_t words_[2][kBits];
};

// From shared memory, where all warps decode them.
class StagedRows {
 public:
  static constexpr int kPlanes = 1;
  static constexpr int kBytes = kStageBytes + RingStage::kWordBytes;

  class Block {
   public:
    // from: 16 columns of the first of the lane's two rows.
    explicit __device__ __forceinline__ Block(const unsigned char* from) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pieces_[i / 2][i % 2] =
            *reinterpret_cast<const uint4*>(from + i / 2 * 8 * kStageRowBytes + i % 2 * 16);
      }
    }
    template <int kWord>
    __device__ __forceinline__ uint32_t word() const {
      const uint4& piece = pieces_[kWord / 2 % 2][kWord % 2];
      return kWord / 4 == 0 ? piece.x : kWord / 4 == 1 ? piece.y : kWord / 4 == 2 ? piece.z : piece.w;
    }

   private:
    uint4 pieces_[2][2];
  };

  __device__ __forceinline__ void ask(const TrellisDense& /*w*/, int /*band*/, int /*span*/) {}
  __device__ __forceinline__ void stage(const TrellisDense& w, int band, int span, unsigned char* memory) {
    RingStage::decode<kDenseThreads / 32>(w, band, span, memory);
    __syncthreads();
  }
  __device__ __forceinline__ Block block(const TrellisDense& /*w*/, const unsigned char* memory,
                                         int i) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    return Block(memory + (16 * warp + lane / 4) * kStageRowBytes + i * 128 + lane % 4 * 32);
  }
};

template <class Source>
constexpr int kDenseBytes = Source::kPlanes*(kDensePlaneBytes + kDenseScaleBytes) + Source::kBytes;

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float difference = a - b;
  a += b;
  b = difference;
}

// The Hadamard matrix of order 16 as the operand of 16 rows.
__device__ __forceinline__ void hadamard_operand(int lane, uint32_t (&a)[4]) {
  constexpr uint32_t kOnes = 0x3C003C00U;
  const int row = lane / 4;
  const int column = lane % 4 * 2;
  // Signs of columns `column` and the next.
  const uint32_t first = static_cast<uint32_t>(__popc(row & column) & 1) << 15;
  const uint32_t second = static_cast<uint32_t>(__popc(row & (column + 1)) & 1) << 31;
  a[0] = a[1] = a[2] = kOnes ^ first ^ second;
  a[3] = a[0] ^ 0x80008000U;
}

// The products of one step of 16 columns: rows 0 ... 7 and 8 ... 15 of the warp's.
template <int kStep, class Block>
__device__ __forceinline__ void rotate_step(const Block& block, const uint32_t (&a)[4], float (&sums)[2][4]) {
  constexpr float kNone[4] = {};
  multiply_add<__half>(sums[0], a, block.template word<4 * kStep>(), block.template word<4 * kStep + 1>(),
                       kNone);
  multiply_add<__half>(sums[1], a, block.template word<4 * kStep + 2>(), block.template word<4 * kStep + 3>(),
                       kNone);
}

// Tiles of 128 x 128, dealt to the blocks of threads by turns.
template <class Source>
__global__ void __launch_bounds__(kDenseThreads, kDenseBlocks)
    decode_rotated(const __grid_constant__ TrellisDense dense) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int g = lane / 4;
  const int t = lane % 4;
  const auto spans = static_cast<unsigned>(dense.column_blocks) / 2;
  const unsigned tiles = static_cast<unsigned>(dense.bands) * spans;
  uint32_t hadamard[4];
  hadamard_operand(lane, hadamard);

  // A column of the plane has 32 pieces of eight bytes; piece 4 w + t is rows 16 w + 2 t + {0, 1, 8, 9}. They
  // are permuted so that neither writes nor reads collide: place = piece ^ 4 (column & 1) ^ 8 (bits 2 and 4
  // of the column differ). Written: columns with bits 0, 4 and 5 of g, and bits 1, 2, 3 and 6 of a register's
  // number.
  const int written = ((g & 1) + (g >> 1 & 1) * 16 + (g >> 2) * 32) * 256 +
                      ((4 * warp + t) ^ (4 * (g & 1)) ^ (8 * (g >> 1 & 1))) * 8;
  // Read: columns 16 warp + 4 (g / 2) + g % 2 and that + 2.
  const int read = (16 * warp + 4 * (g >> 1) + (g & 1)) * 256 +
                   (t ^ (4 * (g & 1)) ^ (8 * ((warp & 1) ^ (g >> 1 & 1)))) * 8;

  Source source;
  uint32_t scale = 0;  // float16 bits
  int next_band = 0;
  int next_span = 0;
  const auto ask = [&](unsigned tile) {
    const auto band = static_cast<int>(tile / spans);
    const auto span = static_cast<int>(tile % spans);
    next_band = band;
    next_span = span;
    source.ask(dense, band, span);
    const int i = static_cast<int>(threadIdx.x) % kTileSide;
    const bool of_rows = threadIdx.x < kTileSide;
    const int at = (of_rows ? band : span) * kTileSide + i;
    const __half* const scales = of_rows ? dense.output_scales : dense.input_scales;
    scale = at < (of_rows ? dense.n : dense.k) ? __ldg(reinterpret_cast<const uint16_t*>(scales) + at) : 0U;
  };

  unsigned tile = blockIdx.x;
  if (tile < tiles) ask(tile);
  for (int plane = 0; tile < tiles; plane = Source::kPlanes - 1 - plane) {
    unsigned char* const weights = memory + plane * kDensePlaneBytes;
    auto* const scales =
        reinterpret_cast<float*>(memory + Source::kPlanes * kDensePlaneBytes + plane * kDenseScaleBytes);
    unsigned char* const staged = memory + Source::kPlanes * (kDensePlaneBytes + kDenseScaleBytes);
    const int band = next_band;
    const int span = next_span;
    source.stage(dense, band, span, staged);
    {
      float sums[2][4][2][4];  // of a block of columns, a step, a half of the rows
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const typename Source::Block columns = source.block(dense, staged, block);
        rotate_step<0>(columns, hadamard, sums[block][0]);
        rotate_step<1>(columns, hadamard, sums[block][1]);
        rotate_step<2>(columns, hadamard, sums[block][2]);
        rotate_step<3>(columns, hadamard, sums[block][3]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          butterfly(sums[block][0][i / 4][i % 4], sums[block][1][i / 4][i % 4]);
          butterfly(sums[block][2][i / 4][i % 4], sums[block][3][i / 4][i % 4]);
          butterfly(sums[block][0][i / 4][i % 4], sums[block][2][i / 4][i % 4]);
          butterfly(sums[block][1][i / 4][i % 4], sums[block][3][i / 4][i % 4]);
        }
      }
      // Rows that are equal modulo 8 lie together: they meet in a lane.
      const int i = static_cast<int>(threadIdx.x) % kTileSide;
      const bool of_rows = threadIdx.x < kTileSide;
      scales[of_rows ? i % 8 * 16 + i / 8 : kTileSide + i] =
          __half2float(__ushort_as_half(static_cast<unsigned short>(scale))) * (of_rows ? 1.0F : 0x1p-7F);
      tile += gridDim.x;
      if (tile < tiles) ask(tile);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) butterfly(sums[0][step][i / 4][i % 4], sums[1][step][i / 4][i % 4]);
      }
#pragma unroll
      for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int third = 0; third < 2; ++third) {
            const __half2 low =
                __floats2half2_rn(sums[block][step][0][2 * third], sums[block][step][0][2 * third + 1]);
            const __half2 high =
                __floats2half2_rn(sums[block][step][1][2 * third], sums[block][step][1][2 * third + 1]);
            const int to = (written ^ (step / 2 * 64)) + (2 * step + 8 * third + 64 * block) * 256;
            *reinterpret_cast<uint2*>(weights + to) = make_uint2(*reinterpret_cast<const uint32_t*>(&low),
                                                                 *reinterpret_cast<const uint32_t*>(&high));
          }
        }
      }
    }
    __syncthreads();
    {
      float sums[8][2][4];  // of 16 rows, of columns 2 apart
#pragma unroll
      for (int rows = 0; rows < 8; ++rows) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint2 b = *reinterpret_cast<const uint2*>(weights + (read ^ (rows % 4 * 32)) +
                                                          rows / 4 * 128 + pair * 512);
          constexpr float kNone[4] = {};
          multiply_add<__half>(sums[rows][pair], hadamard, b.x, b.y, kNone);
        }
      }
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
        for (int rows = 0; rows < 8; ++rows) {
          if ((rows & distance) != 0) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            butterfly(sums[rows][i / 4][i % 4], sums[rows + distance][i / 4][i % 4]);
          }
        }
      }
      const float4 columns = *reinterpret_cast<const float4*>(scales + kTileSide + 16 * warp + 4 * t);
      const int64_t stride = dense.stride;
      uint16_t* to = static_cast<uint16_t*>(dense.out) +
                     (static_cast<int64_t>(band) * kTileSide + g) * stride + span * kTileSide + 16 * warp +
                     4 * t;
#pragma unroll
      for (int rows = 0; rows < 8; ++rows) {
        const float2 outputs = *reinterpret_cast<const float2*>(scales + g * 16 + 2 * rows);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float output = half == 0 ? outputs.x : outputs.y;
          const float(&low)[4] = sums[rows][0];
          const float(&high)[4] = sums[rows][1];
          *reinterpret_cast<uint2*>(to) =
              round_four(dense.dtype == DType::bf16, low[2 * half] * columns.x * output,
                         low[2 * half + 1] * columns.y * output, high[2 * half] * columns.z * output,
                         high[2 * half + 1] * columns.w * output);
          to += 8 * stride;
        }
      }
    }
  }
}

template <class Source, class Stage>
void launch_rounded_rows(const TrellisDense& dense, cudaStream_t stream) {
  if (!dense.rotated) return launch_exact_rows<Stage>(dense, stream);
  const int64_t tiles = static_cast<int64_t>(dense.bands) * (dense.column_blocks / 2);
  if (tiles == 0) return;
  if (tiles > 2147483647) throw Unsupported(text_of("no CUDA kernel for ", tiles, " tiles of a trellis"));
  const auto kernel = decode_rotated<Source>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDenseBytes<Source>),
             "matmul_cuda: shared memory of decode_rotated");
  const int64_t resident = int64_t{kDenseBlocks} * current_device().processors;
  kernel<<<static_cast<unsigned>(std::min(tiles, resident)), kDenseThreads, kDenseBytes<Source>, stream>>>(
      dense);
  check_cuda(cudaGetLastError(), "matmul_cuda: launch of decode_rotated");
}

}  // namespace quantloom::cuda
