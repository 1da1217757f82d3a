// The product loop for few tokens: weights stream from memory into registers once, as fast as it gives them.
//
// A warp owns 64 rows and a run of columns. Its lanes load the codes in fragment order, several blocks ahead
// and past the caches, decode them, and multiply on the tensor cores, 8 or 16 tokens at a time; scales are
// applied to the float32 sums, once per group. The eight warps of a block of threads split its columns; the
// blocks of a cluster split the rest. All parts are added in a fixed order.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "kernels/fragment_order.hpp"
#include "kernels/fragment_parameters.cuh"
#include "kernels/overlap.cuh"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = 32 * kStreamWarps;

// Codes are read once: they should not push anything else out of the caches.
__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Eight activations of one token from column `column` on, in the order of the fragments.
template <class T>
__device__ __noinline__ uint4 gather_activations(const ProductArguments& p, const T* row, int64_t column) {
  alignas(16) T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int64_t from = column + i;
    if (p.w.source != nullptr) from = __ldg(p.w.source + from);
    values[i] = from >= 0 && from < p.w.k ? row[from] : HalfPair<T>::from_float(0.0F);
  }
  return *reinterpret_cast<const uint4*>(values);
}

// The part of a product that one warp adds up: 64 rows, 8 * kTiles tokens, columns of blocks [begin, end).
template <class Decoder, class T, int kTiles, int kStages>
class WarpProduct {
 public:
  static constexpr int kBits = Decoder::kBits;

  __device__ __forceinline__ WarpProduct(const ProductArguments& p, const Decoder& decoder, int row_block,
                                         int begin, int end)
      : p_(p), decoder_(decoder), lane_(static_cast<int>(threadIdx.x) % 32), begin_(begin), end_(end) {
    codes_ = p.w.codes + (static_cast<int64_t>(row_block) * p.w.column_blocks * kBits) * 32 + lane_;
    parameters_ = static_cast<int64_t>(row_block) * p.w.group_count * 64 + lane_ / 4 * 8;
    const int step = begin * 4;
    group_ = step / p.w.group_steps;
    group_left_ = p.w.group_steps - step % p.w.group_steps;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (begin + s < end) load_codes(s, begin + s);
    }
    if (begin < end) load_parameters();
  }

  // After the previous kernel's results can be read.
  __device__ __forceinline__ void run() {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (begin_ + s < end_) load_activations(s, begin_ + s);
    }
    for (int block = begin_; block < end_; block += kStages) {
#pragma unroll
      for (int s = 0; s < kStages; ++s) {
        if (block + s < end_) {
          multiply(s);
          if (block + s + kStages < end_) {
            load_codes(s, block + s + kStages);
            load_activations(s, block + s + kStages);
          }
        }
      }
    }
    if (begin_ < end_ && group_left_ != p_.w.group_steps) flush();
  }

  // Sum of row lane / 4 + 8 * i and token 8 * tile + 2 * (lane % 4) + c.
  __device__ __forceinline__ float sum(int tile, int i, int c) const {
    return total_[tile][i / 2][i % 2 * 2 + c];
  }

 private:
  __device__ __forceinline__ void load_codes(int stage, int block) {
    const uint4* from = codes_ + static_cast<int64_t>(block) * (kBits * 32);
#pragma unroll
    for (int i = 0; i < kBits; ++i) codes_of_[stage][i] = load_streaming(from + i * 32);
  }

  __device__ __forceinline__ void load_activations(int stage, int block) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = tile * 8 + lane_ / 4;
      const T* row = static_cast<const T*>(p_.x) + token * p_.x_stride;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = static_cast<int64_t>(block) * 64 + half * 32 + lane_ % 4 * 8;
        uint4 values = make_uint4(0, 0, 0, 0);
        if (token < p_.m) {
          if (!p_.x_in_pieces) {
            values = gather_activations(p_, row, column);
          } else if (column < p_.w.k) {
            values = __ldg(reinterpret_cast<const uint4*>(row + column));
          }
        }
        x_[stage][tile][half] = values;
      }
    }
  }

  // The parameters of this group and the next.
  __device__ __forceinline__ void load_parameters() {
    raw_.load(p_.w, parameters_ + static_cast<int64_t>(group_) * 64);
    next_raw_.load(p_.w, parameters_ + static_cast<int64_t>(min(group_ + 1, p_.w.group_count - 1)) * 64);
  }

  __device__ __forceinline__ void multiply(int stage) {
    multiply_step<0>(stage);
    multiply_step<1>(stage);
    multiply_step<2>(stage);
    multiply_step<3>(stage);
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_step(int stage) {
    uint32_t b[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4& x = x_[stage][tile][kStep / 2];
      b[tile][0] = kStep % 2 == 0 ? x.x : x.z;
      b[tile][1] = kStep % 2 == 0 ? x.y : x.w;
    }
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      uint32_t words[kBits];
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        const int at = unit * kBits + i;
        const uint4& piece = codes_of_[stage][at / 4];
        words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
      }
      uint32_t a[4];
      decoder_.template fragment<T, kStep>(words, a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(sum_[tile][unit], a, b[tile][0], b[tile][1]);
      }
    }
    if (p_.w.zeros != nullptr) {
      const uint32_t ones[4] = {HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(x_sum_[tile], ones, b[tile][0], b[tile][1]);
      }
    }
    if (--group_left_ == 0) {
      flush();
      group_left_ = p_.w.group_steps;
      ++group_;
      raw_ = next_raw_;
      next_raw_.load(p_.w, parameters_ + static_cast<int64_t>(min(group_ + 1, p_.w.group_count - 1)) * 64);
    }
  }

  // Adds the group's sums, scaled, to the totals.
  __device__ __forceinline__ void flush() {
    const bool with_zeros = p_.w.zeros != nullptr;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = raw_.scale(p_.w.scale_dtype, i);
      const float unit_scale = scale * Decoder::kUnit;
      const float offset = with_zeros ? scale * (Decoder::kCenter - raw_.zero(i)) : 0.0F;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& total = total_[tile][i / 2][i % 2 * 2 + c];
          float& sum = sum_[tile][i / 2][i % 2 * 2 + c];
          total = fmaf(unit_scale, sum, total);
          if (with_zeros) total = fmaf(offset, x_sum_[tile][c], total);
          sum = 0.0F;
        }
      }
    }
    if (with_zeros) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x_sum_[tile][c] = 0.0F;
      }
    }
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  const uint4* codes_;
  int64_t parameters_;
  int lane_;
  int begin_;
  int end_;
  int group_;
  int group_left_;
  RawParameters raw_;
  RawParameters next_raw_;
  uint4 codes_of_[kStages][kBits];
  uint4 x_[kStages][kTiles][2];
  float sum_[kTiles][fragments::kUnits][4] = {};
  float total_[kTiles][fragments::kUnits][4] = {};
  float x_sum_[kTiles][4] = {};
};

// Grid: splits * row_blocks blocks; the splits of a row block are one cluster, unless p.partial is given.
template <class Decoder, class T, int kTiles, int kStages>
__global__ void __launch_bounds__(kStreamThreads, 2)
    multiply_stream(const __grid_constant__ ProductArguments p, int splits) {
  constexpr int kRows = fragments::kBlockRows;
  __shared__ float parts[kStreamWarps][8 * kTiles][kRows];
  extern __shared__ __align__(16) unsigned char decoder_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_block = static_cast<int>(blockIdx.x) / splits;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int64_t warps = static_cast<int64_t>(splits) * kStreamWarps;
  const int64_t place = static_cast<int64_t>(split) * kStreamWarps + warp;
  const int begin = static_cast<int>(p.w.column_blocks * place / warps);
  const int end = static_cast<int>(p.w.column_blocks * (place + 1) / warps);

  let_next_begin();
  Decoder decoder;
  WarpProduct<Decoder, T, kTiles, kStages> product(p, decoder, row_block, begin, end);
  decoder.prepare(p.w.table, p.w.table_entries, decoder_memory);
  if constexpr (Decoder::kSharedBytes > 0) __syncthreads();
  wait_for_previous();
  product.run();

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * tile + lane % 4 * 2 + c;
        if (token < p.m) parts[warp][token][lane / 4 + 8 * i] = product.sum(tile, i, c);
      }
    }
  }
  __syncthreads();

  const int count = p.m * kRows;
  const auto sum_of_warps = [&](int i) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += parts[w][i / kRows][i % kRows];
    return sum;
  };
  const auto store = [&](int i, float sum) {
    const int64_t row = static_cast<int64_t>(row_block) * kRows + i % kRows;
    if (row >= p.w.n) return;
    if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
    static_cast<T*>(p.y)[i / kRows * p.y_stride + row] = HalfPair<T>::from_float(sum);
  };
  if (p.partial != nullptr) {
    float* partial = p.partial + static_cast<int64_t>(split) * p.m * p.w.row_blocks * kRows;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kStreamThreads) {
      const int64_t row = static_cast<int64_t>(row_block) * kRows + i % kRows;
      partial[static_cast<int64_t>(i / kRows) * p.w.row_blocks * kRows + row] = sum_of_warps(i);
    }
  } else if (splits == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kStreamThreads) store(i, sum_of_warps(i));
  } else {
#if __CUDA_ARCH__ >= 900
    // Each block adds its warps' parts, then takes its share of the results, adding the blocks' parts.
    namespace cg = cooperative_groups;
    const auto cluster = cg::this_cluster();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kStreamThreads) {
      parts[0][i / kRows][i % kRows] = sum_of_warps(i);
    }
    cluster.sync();
    for (int i = split * kStreamThreads + static_cast<int>(threadIdx.x); i < count;
         i += splits * kStreamThreads) {
      float sum = 0.0F;
      for (int s = 0; s < splits; ++s) {
        sum += *cluster.map_shared_rank(&parts[0][i / kRows][i % kRows], static_cast<unsigned>(s));
      }
      store(i, sum);
    }
    cluster.sync();
#endif
  }
}

// Adds the parts that multiply_stream left in memory.
template <class T>
__global__ void add_partials(const __grid_constant__ ProductArguments p, int splits) {
  wait_for_previous();
  const int64_t rows = static_cast<int64_t>(p.w.row_blocks) * fragments::kBlockRows;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i % rows;
  const int64_t token = i / rows;
  if (token >= p.m || row >= p.w.n) return;
  float sum = 0.0F;
  for (int s = 0; s < splits; ++s) sum += p.partial[(static_cast<int64_t>(s) * p.m + token) * rows + row];
  if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
  static_cast<T*>(p.y)[token * p.y_stride + row] = HalfPair<T>::from_float(sum);
}

// Blocks of codes that a warp keeps in flight: as many as the registers hold.
constexpr int stream_stages(int bits, int tiles) {
  if (bits <= 2) return tiles == 1 ? 4 : 2;
  if (bits <= 4) return 2;
  return bits <= 6 && tiles == 1 ? 2 : 1;
}

template <class Decoder, class T, int kTiles>
void launch_stream_tiles(const ProductLaunch& launch) {
  const ProductArguments& p = launch.arguments;
  const bool in_memory = p.partial != nullptr;
  LaunchSettings settings(dim3(static_cast<unsigned>(p.w.row_blocks * launch.splits)), dim3(kStreamThreads),
                          launch.stream, launch.overlap, in_memory ? 1 : launch.splits);
  settings.config.dynamicSmemBytes = Decoder::kSharedBytes;
  const auto kernel = multiply_stream<Decoder, T, kTiles, stream_stages(Decoder::kBits, kTiles)>;
  if constexpr (Decoder::kSharedBytes > 0) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Decoder::kSharedBytes),
        "matmul_cuda: shared memory of multiply_stream");
  }
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p, launch.splits),
             "matmul_cuda: launch of multiply_stream");
  if (!in_memory) return;
  const int64_t count = static_cast<int64_t>(p.m) * p.w.row_blocks * fragments::kBlockRows;
  LaunchSettings add(dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), launch.stream,
                     launch.overlap, 1);
  check_cuda(cudaLaunchKernelEx(&add.config, add_partials<T>, p, launch.splits),
             "matmul_cuda: launch of add_partials");
}

// m up to 16. Defined for each decoder in a translation unit of its own.
template <class Decoder>
void launch_stream(const ProductLaunch& launch) {
  const bool one_tile = launch.arguments.m <= 8;
  if (launch.dtype == DType::f16) {
    one_tile ? launch_stream_tiles<Decoder, __half, 1>(launch)
             : launch_stream_tiles<Decoder, __half, 2>(launch);
  } else {
    one_tile ? launch_stream_tiles<Decoder, __nv_bfloat16, 1>(launch)
             : launch_stream_tiles<Decoder, __nv_bfloat16, 2>(launch);
  }
}

}  // namespace quantloom::cuda
