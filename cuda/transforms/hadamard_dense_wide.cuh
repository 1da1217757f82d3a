// The Hadamard transform of blocks of m * 2^power elements with m above 256: power is at most 6, so that a
// warp holds whole rows of the block, and transforms them by tensor cores and then in registers and between
// lanes. M is read from memory. Not at the speed of a copy: M takes more of the tensor cores than that.
#pragma once

#include "transforms/hadamard_dense_stream.cuh"

namespace quantloom::cuda {

// As DenseStream, whose functions take it.
template <class T, int kPower>
struct DenseWide {
  static constexpr int kLogVector = HadamardValues<T>::kLogVector;
  static constexpr int kSplits = std::is_same_v<T, float> ? 3 : 1;
  static constexpr int kOrder = 0;
  static constexpr int kLogParts = kPower - 3;
  static constexpr int kParts = 1 << kLogParts;
  static constexpr int kThreads = 256;
  static constexpr int kOwn = 2;  // row tiles at once
  static constexpr int kRawStride = (1 << kPower) + (1 << kLogVector);
  static constexpr int kZeroBytes = 16 * kParts;
  static constexpr int kFlipWords = 1;
  static constexpr int kQuads = 1;
  static constexpr int bytes(int order) {
    return kZeroBytes + static_cast<int>(sizeof(T)) * order * kRawStride;
  }
};

// Random signs, in shared memory.
template <class T, class S, int kPower>
__device__ __forceinline__ void negate_block(const uint8_t* signs, int order, T* raw) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  for (int i = static_cast<int>(threadIdx.x); i < order << (kPower - 3); i += S::kThreads) {
    auto* to = reinterpret_cast<Bits*>(raw + (i >> (kPower - 3)) * S::kRawStride) +
               8 * (i & ((1 << (kPower - 3)) - 1));
    const uint32_t bits = signs[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      to[j] = static_cast<Bits>(to[j] ^ static_cast<Bits>((bits >> j & 1U) << (8 * sizeof(T) - 1)));
    }
  }
}

// All bits of the column of the row tile, and the results. Bit 0 of the column is bit 0 of the index of
// `sum`, bits 1 and 2 are those of the lane, the others those of the part; rows g and g + 8 are bit 1.
template <class T, class S, int kPower>
__device__ __forceinline__ void write_rows(const HadamardArguments& a, int order, int row_tile,
                                           float (&sum)[4 * S::kParts], T* to, int64_t column) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  butterflies<0, 1>(sum);
  lane_butterflies(sum, lane, 0);
  lane_butterflies(sum, lane, 1);
  butterflies<2, S::kLogParts>(sum);
  const int row = 16 * row_tile + (lane >> 2);
  const int col = 2 * (lane & 3);
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    if (row + 8 * lower >= order) continue;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      float pair[2] = {sum[4 * part + 2 * lower], sum[4 * part + 2 * lower + 1]};
      const int element = ((row + 8 * lower) << kPower) + 8 * part + col;
      finish(a, pair, column + element, [](int j) { return j; });
      store_values(to + element, pair, a.vectors);
    }
  }
}

// `signs` as DenseSigns has them, for ceil(order / 16) tiles.
template <class T, int kPower>
__global__ void __launch_bounds__((DenseWide<T, kPower>::kThreads), 2)
    dense_wide_kernel(const HadamardArguments a, const int order, const uint32_t* __restrict__ signs) {
  using S = DenseWide<T, kPower>;
  using Operand = DenseOperand<T>;
  auto* zeros = dynamic_shared_memory<unsigned char>();
  T* raw = reinterpret_cast<T*>(zeros + S::kZeroBytes);
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int tiles = (order + 15) / 16;
  const int groups = (tiles + 3) / 4;
  for (int i = thread; i < S::kZeroBytes / 16; i += S::kThreads) {
    reinterpret_cast<uint4*>(zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  DenseChunk<T> chunk{nullptr, reinterpret_cast<const T*>(zeros), nullptr, order};
  chunk.raw = S::kSplits == 1 ? raw + (lane & 15) * S::kRawStride + 8 * (lane >> 4)
                              : raw + 2 * (lane & 3) * S::kRawStride + (lane >> 2);
  const uint32_t no_flips[1] = {};
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    const HadamardPlace at = place_of(a, unit, order << kPower);
    __syncthreads();  // the block before has been read
    request_block<T, S, kPower>(a, order, raw, at);
    wait_for_copies();
    __syncthreads();
    if (a.signs != nullptr && !a.inverse) {
      negate_block<T, S, kPower>(a.signs + (at.column >> 3), order, raw);
      __syncthreads();
    }
    T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
#pragma unroll 1
    for (int row_tile = S::kOwn * (thread >> 5); row_tile < tiles; row_tile += S::kOwn * S::kThreads / 32) {
      float sum[S::kOwn][4 * S::kParts] = {};
      const uint32_t* first_word = signs + static_cast<int64_t>(row_tile) * groups * 32 + lane;
      const int second = row_tile + 1 < tiles ? groups * 32 : 0;  // no row of it is written otherwise
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const uint32_t word[S::kOwn] = {first_word[group * 32], first_word[group * 32 + second]};
#pragma unroll
        for (int inner = 0; inner < 4; ++inner) {
          const int tile = 4 * group + inner;
          if (tile >= tiles) break;
          uint32_t m[S::kOwn][4];
#pragma unroll
          for (int i = 0; i < 4 * S::kOwn; ++i) {
            m[i / 4][i % 4] =
                ((word[i / 4] << (15 - (4 * inner + i % 4))) & 0x80008000U) | HalfPair<Operand>::kOne;
          }
#pragma unroll
          for (int pair = 0; pair < S::kParts / 2; ++pair) {
            uint32_t b[S::kSplits][4];
            load_columns<T, S, false>(chunk, tile, pair, no_flips, b);
#pragma unroll
            for (int i = 0; i < 2 * S::kOwn; ++i) {
              float* at_sum = sum[i / 2] + 4 * (2 * pair + i % 2);
              float four[4] = {at_sum[0], at_sum[1], at_sum[2], at_sum[3]};
              // The smallest part first.
#pragma unroll
              for (int split = S::kSplits - 1; split >= 0; --split) {
                multiply_accumulate<Operand>(four, m[i / 2], b[split][2 * (i % 2)],
                                             b[split][2 * (i % 2) + 1]);
              }
#pragma unroll
              for (int j = 0; j < 4; ++j) at_sum[j] = four[j];
            }
          }
        }
      }
#pragma unroll
      for (int own = 0; own < S::kOwn; ++own) {
        write_rows<T, S, kPower>(a, order, row_tile + own, sum[own], to, at.column);
      }
    }
  }
}

}  // namespace quantloom::cuda
