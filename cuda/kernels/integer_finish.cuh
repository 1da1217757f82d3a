// What follows the sums of integer products (integer_product.cuh): zero points, scales, bias, rounding, and
// the way to memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/shared_memory.cuh"
#include "kernels/integer_tile.cuh"

namespace quantloom::cuda {

__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
// Two or four 8 x 8 matrices of 16 bits, transposed: lane i brings the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t row, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(first),
               "r"(second)
               : "memory");
}

// A float32 or int32, without passing through registers.
__device__ __forceinline__ void copy_word_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void store_piece(void* global, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Rounds sums and writes them: the part of one warpgroup.
template <class Tile>
class IntegerFinish {
 public:
  static constexpr int kTokens = Tile::kOwnTokens;

  // `row`: the first of the warpgroup's outputs; those of the tokens from `token` to `end` - 1 that exist are
  // written.
  __device__ __forceinline__ IntegerFinish(const IntegerArguments& p, unsigned char* memory, uint32_t shared,
                                           int warpgroup, int64_t row, int64_t token, int64_t end)
      : p_(&p),
        barrier_(warpgroup),
        row_(row),
        token_(token),
        end_(min(end, p.m)),
        terms_(Tile::kTerms + warpgroup * Tile::kTermBytes),
        results_(Tile::kResults + warpgroup * Tile::kResultBytes),
        memory_(memory),
        shared_(shared) {}

  // The terms of the tokens, to shared memory; those of the outputs.
  __device__ __forceinline__ void fetch_terms() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_ + thread() / 32 * 16 + lane() / 4 + 8 * i;
      scale_[i] = p_->rows[row].scale;
      bias_[i] = p_->bias != nullptr && row < p_->n ? load_half(p_->bias, row) : 0.0F;
    }
    for (int i = thread(); i < kTokens; i += kWarpgroupThreads) {
      if (token_ + i >= end_) break;
      const integers::TokenTerms* const from = p_->terms + token_ + i;
      copy_word_async(shared_ + terms_ + 4 * i, &from->scale);
      if (!p_->has_zeros) continue;
      const uint32_t pair = shared_ + terms_ + 4 * kTokens + 8 * i;
      copy_word_async(pair, &from->zero);
      copy_word_async(pair + 4, &from->sum);
    }
  }

  // Waits for the terms, and takes zero points out of the sums.
  __device__ __forceinline__ void begin(int (&sum)[kTokens / 2]) {
    await_terms();
    if (!p_->has_zeros) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowTerms terms = terms_of_row(i);
      const int2* const pairs = token_pairs();
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int2 token = pairs[8 * j + c];
          sum[4 * j + 2 * i + c] -= token.x * terms.sum + terms.zero * token.y;
        }
      }
    }
  }

  // sum := the scaled sums, as float32 in the same registers.
  __device__ __forceinline__ void scale(int (&sum)[kTokens / 2]) const {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 token = token_scales(j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int* const pair = sum + 4 * j + 2 * i;
        pair[0] = __float_as_int(__fmul_rn(__fmul_rn(static_cast<float>(pair[0]), scale_[i]), token.x));
        pair[1] = __float_as_int(__fmul_rn(__fmul_rn(static_cast<float>(pair[1]), scale_[i]), token.y));
      }
    }
  }

  // Scales the sums unless scale() has, adds the bias, rounds and writes.
  __device__ __forceinline__ void write(const int (&sum)[kTokens / 2]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk > 0 && token_ + chunk * Tile::kChunk >= end_) break;
      round_chunk(sum, chunk);
      copy_chunk(chunk);
    }
    warpgroup_barrier(barrier_);
  }

  // The whole in pieces, one after the other.
  static constexpr int kPieces = 1 + 2 * (kTokens / Tile::kChunk);
  __device__ __forceinline__ void piece(int index, int (&sum)[kTokens / 2]) {
    if (index == 0) {
      if constexpr (!Tile::kOutliers) begin(sum);
    } else if (index % 2 == 1) {
      round_chunk(sum, index / 2);
    } else {
      copy_chunk(index / 2 - 1);
    }
  }

 protected:
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  }
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }

  // Of tokens 8 j + 2 t and the next.
  __device__ __forceinline__ float2 token_scales(int j) const {
    return reinterpret_cast<const float2*>(memory_ + terms_)[4 * j + lane() % 4];
  }
  // Zero points and sums of tokens 2 t ...
  __device__ __forceinline__ const int2* token_pairs() const {
    return reinterpret_cast<const int2*>(memory_ + terms_ + 4 * kTokens) + lane() % 4 * 2;
  }
  __device__ __forceinline__ void await_terms() const {
    wait_for_copies();
    warpgroup_barrier(barrier_);
  }
  __device__ __forceinline__ const RowTerms& terms_of_row(int i) const {
    return p_->rows[row_ + thread() / 32 * 16 + lane() / 4 + 8 * i];
  }

  const IntegerArguments* p_;

 private:
  __device__ __forceinline__ float finished(int sum, int i, float token_scale) const {
    if constexpr (Tile::kOutliers) return __int_as_float(sum) + bias_[i];
    return __fmaf_rn(__fmul_rn(static_cast<float>(sum), scale_[i]), token_scale, bias_[i]);
  }
  __device__ __forceinline__ uint32_t round_pair(float first, float second) const {
    return p_->bfloat16 ? bits_of(__floats2bfloat162_rn(first, second))
                        : bits_of(__floats2half2_rn(first, second));
  }
  template <class Pair>
  static __device__ __forceinline__ uint32_t bits_of(Pair pair) {
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ __forceinline__ float load_half(const void* values, int64_t i) const {
    return p_->bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i])
                        : __half2float(static_cast<const __half*>(values)[i]);
  }

  static constexpr int kChunks = kTokens / Tile::kChunk;

  // To shared memory, once the chunk before has been read.
  __device__ __forceinline__ void round_chunk(const int (&sum)[kTokens / 2], int chunk) const {
    constexpr int kChunkTiles = Tile::kChunk / 8;
    uint32_t words[2 * kChunkTiles];
#pragma unroll
    for (int j = 0; j < kChunkTiles; ++j) {
      const float2 token = Tile::kOutliers ? float2{1.0F, 1.0F} : token_scales(chunk * kChunkTiles + j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 4 * (chunk * kChunkTiles + j) + 2 * i;
        words[2 * j + i] = round_pair(finished(sum[at], i, token.x), finished(sum[at + 1], i, token.y));
      }
    }
    if (chunk > 0 || Tile::kDeferred) warpgroup_barrier(barrier_);
    store_chunk(words);
  }

  // Rows of 128 bytes, whose pieces of 16 are swizzled against conflicts of banks.
  static __device__ __forceinline__ int piece_at(int token, int piece) {
    return token * 128 + ((piece ^ (token & 7)) << 4);
  }
  template <int kWords>
  __device__ __forceinline__ void store_chunk(const uint32_t (&words)[kWords]) const {
    const int matrix = lane() / 8;
    const int piece = thread() / 32 * 2 + matrix % 2;
    if constexpr (kWords == 2) {
      store_transposed(shared_ + results_ + piece_at(lane() % 8, piece), words[0], words[1]);
    } else {
      const uint32_t first = shared_ + results_ + piece_at(8 * (matrix / 2) + lane() % 8, piece);
#pragma unroll
      for (int j = 0; j < kWords / 2; j += 2) {
        const uint32_t four[4] = {words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]};
        store_transposed(first + 1024 * j, four);
      }
    }
  }
  // From there to memory.
  __device__ __forceinline__ void copy_chunk(int chunk) const {
    warpgroup_barrier(barrier_);
    const int64_t first = token_ + chunk * Tile::kChunk;
    const int piece = thread() % 8;
    const int64_t column = row_ + 8 * piece;
    const auto width = static_cast<int>(min(int64_t{8}, p_->n - column));
    const auto tokens = static_cast<int>(min(int64_t{Tile::kChunk}, end_ - first));
    const unsigned char* from =
        memory_ + results_ + piece_at(thread() / 8, piece);  // 16 tokens on: the same place
    uint16_t* to = static_cast<uint16_t*>(p_->y) + (first + thread() / 8) * p_->y_stride + column;
    if (width == 8 && p_->y_in_pieces) {
#pragma unroll
      for (int step = 0; step < (Tile::kChunk + 15) / 16; ++step) {
        if (thread() / 8 + 16 * step < tokens)
          store_piece(to, *reinterpret_cast<const uint4*>(from + 2048 * step));
        to += 16 * p_->y_stride;
      }
      return;
    }
    for (int token = thread() / 8; token < tokens; token += 16, from += 2048, to += 16 * p_->y_stride) {
      for (int i = 0; i < width; ++i) to[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
  }

  int barrier_;
  int64_t row_;
  int64_t token_;
  int64_t end_;
  int terms_;  // places in shared memory
  int results_;
  unsigned char* memory_;
  uint32_t shared_;
  float scale_[2] = {};
  float bias_[2] = {};
};

}  // namespace quantloom::cuda
