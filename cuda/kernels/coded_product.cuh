// Kernels that read streams of coded matrices: products with few tokens, and decoding.
#pragma once

#include "common/half_pairs.cuh"
#include "common/load_float.cuh"
#include "common/shared_memory.cuh"
#include "formats/coded_stream.cuh"
#include "quantloom/dtype.hpp"

namespace quantloom::cuda {

constexpr int kCodedWarps = 16;  // most warps of a block of threads
constexpr int kCodedTiles = 4;   // most tiles of 8 tokens

// Where the values of a coded matrix come from.
struct CodedSource {
  CodedView view;
  int64_t n = 0;
  int64_t k = 0;
  const float* values = nullptr;  // [256]
  float unit = 1.0F;              // of the values, a factor of all scales
  const void* scales = nullptr;
  DType scale_dtype = DType::f32;
  int64_t scales_per_row = 1;
  int64_t rows_per_scale = 1;
  int64_t columns_per_scale = 1;

  __device__ float scale_at(int64_t row, int64_t column) const {
    if (row >= n || column >= k) return 0.0F;
    const int64_t at = row / rows_per_scale * scales_per_row + column / columns_per_scale;
    return unit * load_float(scales, scale_dtype, at);
  }
};

struct CodedArguments {
  CodedSource w;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  int m = 0;
};

// The warp's stream: warps of a block share rows, split by columns, or have rows that follow each other.
struct CodedPlace {
  int row_block;
  int split;
  int first;  // block of columns
  int end;
};

__device__ __forceinline__ CodedPlace coded_place(const CodedView& view, int warp, int warps) {
  CodedPlace place;
  place.split = warp % view.splits;
  place.row_block = static_cast<int>(blockIdx.x) * (warps / view.splits) + warp / view.splits;
  const auto at = [&](int split) {
    return static_cast<int>(static_cast<int64_t>(view.column_blocks) * split / view.splits);
  };
  place.first = at(place.split);
  place.end = at(place.split + 1);
  return place;
}

// Activations of a lane: columns 8 (lane % 4)... of the blocks, tokens 8 tile + lane / 4. kVector: eight can
// be loaded at once.
template <class T, int kTiles, bool kVector>
class CodedTokens {
 public:
  __device__ CodedTokens(const CodedArguments& p, int block, int lane) {
    const int column = kCodedColumnsOfBlock * block + 8 * (lane % 4);
    left_ = static_cast<int>(p.w.k) - column;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = 8 * tile + lane / 4;
      there_[tile] = token < p.m;
      from_[tile] = static_cast<const T*>(p.x) + token * p.x_stride + column;
    }
  }
  // Of the next block.
  __device__ __forceinline__ void load(uint4 (&tokens)[kTiles]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      tokens[tile] = make_uint4(0, 0, 0, 0);
      if (kVector) {
        if (there_[tile] && left_ > 0) tokens[tile] = __ldg(reinterpret_cast<const uint4*>(from_[tile]));
      } else if (there_[tile]) {
        alignas(16) T parts[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) parts[i] = i < left_ ? from_[tile][i] : T(0.0F);
        tokens[tile] = *reinterpret_cast<const uint4*>(parts);
      }
      from_[tile] += kCodedColumnsOfBlock;
    }
    left_ -= kCodedColumnsOfBlock;
  }

 private:
  int left_;  // columns
  bool there_[kTiles];
  const T* from_[kTiles];
};

// y = x W^T + bias for up to 8 kTiles tokens. Shared memory: entries, then a ring for each warp, in which
// parts of sums meet at the end.
template <class T, int kTiles, bool kGrouped, bool kVector>
__global__ void __launch_bounds__(32 * kCodedWarps, kTiles == 1 ? 2 : 1)
    multiply_coded(const __grid_constant__ CodedArguments p) {
  const CodedView& view = p.w.view;
  auto* const shared = dynamic_shared_memory<unsigned char>();
  const uint32_t rings = first_ring(shared + (size_t{CodedEntries::kBytes} << view.table_bits));
  const auto pair_of = [&](uint32_t first, uint32_t second) {
    const T values[2] = {HalfPair<T>::from_float(p.w.values[first]),
                         HalfPair<T>::from_float(p.w.values[second])};
    return *reinterpret_cast<const unsigned short*>(&values[0]) |
           static_cast<uint32_t>(*reinterpret_cast<const unsigned short*>(&values[1])) << 16;
  };
  const auto spell = [&](uint32_t pair) { return pair_of(pair & 0xffU, pair >> 8); };
  const CodedEntries entries(view, shared, pair_of);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const CodedPlace place = coded_place(view, warp, static_cast<int>(blockDim.x / 32));
  const bool works = place.row_block < view.row_blocks;
  const int64_t row = int64_t{kCodedRowsOfBlock} * place.row_block + lane / 4;
  const uint32_t ring = rings + static_cast<uint32_t>(warp) * kRingBytes;
  float sums[kTiles][4] = {};
  if (works) {
    CodedWarp stream(view, entries, ring, static_cast<int64_t>(place.row_block) * view.splits + place.split,
                     lane);
    float scales[2] = {};
    float group_sums[kTiles][4] = {};
    const int group_blocks = kGrouped ? static_cast<int>(p.w.columns_per_scale / kCodedColumnsOfBlock) : 0;
    const auto load_scales = [&](int block) {
      const int64_t column = int64_t{kCodedColumnsOfBlock} * block;
      scales[0] = p.w.scale_at(row, column);
      scales[1] = p.w.scale_at(row + 8, column);
    };
    int group_end = 0;
    if constexpr (kGrouped) {
      group_end = (place.first / group_blocks + 1) * group_blocks;
    }
    load_scales(place.first);
    CodedTokens<T, kTiles, kVector> activations(p, place.first, lane);
    for (int block = place.first; block < place.end; ++block) {
      uint4 tokens[kTiles];
      activations.load(tokens);
      uint32_t payload[8];
      stream.decode(payload, spell);
      const uint32_t a[2][4] = {{payload[0], payload[1], payload[2], payload[3]},
                                {payload[4], payload[5], payload[6], payload[7]}};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        auto& to = kGrouped ? group_sums[tile] : sums[tile];
        multiply_accumulate<T>(to, a[0], tokens[tile].x, tokens[tile].y);
        multiply_accumulate<T>(to, a[1], tokens[tile].z, tokens[tile].w);
      }
      if constexpr (kGrouped) {
        if (block + 1 == group_end || block + 1 == place.end) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[tile][i] = fmaf(group_sums[tile][i], scales[i / 2], sums[tile][i]);
              group_sums[tile][i] = 0.0F;
            }
          }
          group_end += group_blocks;
          load_scales(block + 1);
        }
      }
    }
    stream.finish();
    if constexpr (!kGrouped) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] *= scales[i / 2];
      }
    }
  }
  if (view.splits > 1) {
    auto* const parts = static_cast<float*>(__cvta_shared_to_generic(ring));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[(4 * tile + i) * 32 + lane] = sums[tile][i];
    }
    __syncthreads();
    if (place.split == 0) {
      for (int split = 1; split < view.splits; ++split) {
        const float* other = parts + split * static_cast<int>(kRingBytes / sizeof(float));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][i] += other[(4 * tile + i) * 32 + lane];
        }
      }
    }
  }
  if (!works || place.split != 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = row + 8 * (i / 2);
    if (at >= p.w.n) continue;
    const float bias = p.bias == nullptr ? 0.0F : HalfPair<T>::to_float(static_cast<const T*>(p.bias)[at]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = 8 * tile + 2 * (lane % 4) + i % 2;
      if (token < p.m) {
        static_cast<T*>(p.y)[token * p.y_stride + at] = HalfPair<T>::from_float(sums[tile][i] + bias);
      }
    }
  }
}

__device__ __forceinline__ void round_to(float value, float& out) {
  out = value;
}
__device__ __forceinline__ void round_to(float value, __half& out) {
  out = __float2half_rn(value);
}
__device__ __forceinline__ void round_to(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}

// Rows [first_row, first_row + rows) of W. Shared memory: entries, values, rings. kScales: scales of whole
// rows, of multiples of a block's columns, of any.
enum class CodedScales { rows, blocks, any };

template <class Out, CodedScales kScales>
__global__ void __launch_bounds__(32 * kCodedWarps)
    decode_coded(const __grid_constant__ CodedSource w, Out* out, int64_t stride, int64_t first_row,
                 int64_t rows, int first_block, bool vector) {
  const CodedView& view = w.view;
  auto* const shared = dynamic_shared_memory<unsigned char>();
  auto* const values = reinterpret_cast<float*>(shared + (size_t{CodedEntries::kBytes} << view.table_bits));
  const uint32_t rings = first_ring(values + 256);
  const auto spell = [](uint32_t pair) { return pair; };
  const CodedEntries entries(view, shared,
                             [](uint32_t first, uint32_t second) { return first | second << 8; });
  for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) values[i] = w.values[i];
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  CodedPlace place = coded_place(view, warp, static_cast<int>(blockDim.x / 32));
  place.row_block += first_block;
  if (place.row_block >= view.row_blocks ||
      int64_t{kCodedRowsOfBlock} * place.row_block >= first_row + rows) {
    return;
  }
  CodedWarp stream(view, entries, rings + static_cast<uint32_t>(warp) * kRingBytes,
                   static_cast<int64_t>(place.row_block) * view.splits + place.split, lane);
  const int64_t row = int64_t{kCodedRowsOfBlock} * place.row_block + lane / 4;
  float scales[2] = {};
  const auto load_scales = [&](int64_t column) {
    scales[0] = w.scale_at(row, column);
    scales[1] = w.scale_at(row + 8, column);
  };
  int group_end = 0;
  if (kScales == CodedScales::rows) load_scales(0);
  for (int block = place.first; block < place.end; ++block) {
    if (kScales == CodedScales::blocks && block >= group_end) {
      const auto group_blocks = static_cast<int>(w.columns_per_scale / kCodedColumnsOfBlock);
      group_end = (block / group_blocks + 1) * group_blocks;
      load_scales(int64_t{kCodedColumnsOfBlock} * block);
    }
    uint32_t payload[8];
    stream.decode(payload, spell);
    const int64_t column = int64_t{kCodedColumnsOfBlock} * block + 8 * (lane % 4);
    if (column >= w.k) continue;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (row + 8 * s < first_row || row + 8 * s >= first_row + rows) continue;
      alignas(16) Out run[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scale = kScales == CodedScales::any ? w.scale_at(row + 8 * s, column + i) : scales[s];
        const uint32_t pair = payload[2 * (i / 2) + s];
        round_to(values[i % 2 == 0 ? pair & 0xffU : pair >> 8 & 0xffU] * scale, run[i]);
      }
      Out* to = out + (row + 8 * s - first_row) * stride + column;
      if (vector) {
#pragma unroll
        for (size_t i = 0; i < sizeof(run) / 16; ++i) {
          reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(run)[i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (column + i < w.k) to[i] = run[i];
        }
      }
    }
  }
}

}  // namespace quantloom::cuda
