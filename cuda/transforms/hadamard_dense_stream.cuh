// The same as hadamard_dense.cuh for orders up to 176 (float32: up to 28), at the speed of a copy. A thread
// block works through many blocks of the matrix, and copies the next ones to shared memory while it works on
// this one. Bits of the column are worked off in two passes with one exchange of float32 sums between them:
//
//   column: [ high: log chunks bits | parts: log parts bits | 3 bits ]
//   pass 1: a warp multiplies M by a chunk's columns with tensor cores, exactly, as elements were read. A
//     thread then holds all parts and bit 0 of the sums of its rows, and transforms those bits.
//   pass 2: a thread holds the high bits of 8 neighbours: bits 1, 2 and high, then the results, 16 bytes
//   each.
#pragma once

#include <algorithm>

#include "transforms/hadamard_dense.cuh"

namespace quantloom::cuda {

// For the order 8 * kHalves - 4 if kHalves is 4 or less, else for orders of at most 8 * kHalves.
template <class T, int kHalves, int kPower, int kChosenGroups = 0>
struct DenseStream {
  static constexpr int kLogVector = HadamardValues<T>::kLogVector;
  static constexpr int kSplits = std::is_same_v<T, float> ? 3 : 1;  // parts of an element for tensor cores
  static constexpr int kTiles = (kHalves + 1) / 2;
  static constexpr bool kHeld = kTiles <= 2;                  // the matrix stays in registers
  static constexpr int kOrder = kHeld ? 8 * kHalves - 4 : 0;  // 0: any
  static constexpr int kLogParts = kPower >= 10 ? kPower - 6 : std::min(kPower - 3, kTiles <= 4 ? 3 : 2);
  static constexpr int kParts = 1 << kLogParts;
  static constexpr int kLogChunks = kPower - 3 - kLogParts;
  static constexpr int kChunks = 1 << kLogChunks;
  static constexpr int kChunk = 8 * kParts;  // columns
  static constexpr int kValues = 8 * kChunks;
  // Warps that share a chunk, each with other rows: so many that blocks of threads have 8 warps where two of
  // them fit a processor, else 16.
  static constexpr int kGroups = kChosenGroups != 0 ? kChosenGroups
                                 : kHeld            ? (kPower == 9 ? 1 : kTiles)
                                 : kChunks <= 2     ? 4
                                 : kChunks == 4     ? (kTiles <= 4 ? 1 : 2)
                                                    : 2;
  static constexpr int kOwn = kHeld ? kTiles / kGroups : 1;  // row tiles at once
  static constexpr int kThreads = 32 * kChunks * kGroups;
  // What registers allow, at 80, 128 or 255 each.
  static constexpr int kResident = std::max(1, (kParts == 32                                        ? 256
                                                : kHeld && kParts <= 8 && kOwn == 1 && kChunks <= 4 ? 768
                                                                                                    : 512) /
                                                   kThreads);
  static constexpr int kRawStride = (1 << kPower) + (1 << kLogVector);  // elements
  static constexpr int kSumStride = (1 << kPower) + 8;                  // floats
  static constexpr int kZeroBytes = 16 * kParts;
  static constexpr int kSignBytes = kHeld ? 0 : 4 * DenseSigns<kTiles>::kWords;
  static constexpr int kQuads = (kParts + 3) / 4;
  static constexpr int kFlipWords = (kTiles * kQuads + 1) / 2;

  // Zeros, signs of M, sums and then `stages` raw blocks.
  static constexpr __host__ __device__ int sum_bytes(int order) { return 4 * order * kSumStride; }
  static constexpr __host__ __device__ int raw_bytes(int order) {
    return static_cast<int>(sizeof(T)) * order * kRawStride;
  }
  static constexpr __host__ __device__ int bytes(int order, int stages) {
    return kZeroBytes + kSignBytes + sum_bytes(order) + stages * raw_bytes(order);
  }
};

// One block as it is; every thread takes part.
template <class T, class S, int kPower>
__device__ __forceinline__ void request_block(const HadamardArguments& a, int order, T* raw,
                                              HadamardPlace at) {
  constexpr int kLogVectors = kPower - S::kLogVector;  // in a row of the block
  constexpr int kStep = S::kThreads >> kLogVectors;
  static_assert(kStep > 0);
  const int row = static_cast<int>(threadIdx.x) >> kLogVectors;
  const int column = (static_cast<int>(threadIdx.x) & ((1 << kLogVectors) - 1)) << S::kLogVector;
  const T* from = static_cast<const T*>(a.x) + at.row * a.x_stride + at.column + (row << kPower) + column;
  T* to = raw + row * S::kRawStride + column;
  if (!a.vectors) {
    for (int i = row; i < order; i += kStep, from += kStep << kPower, to += kStep * S::kRawStride) {
      *reinterpret_cast<uint4*>(to) = load_vector(from, false);
    }
  } else if constexpr (S::kOrder != 0) {
#pragma unroll
    for (int step = 0; step * kStep < S::kOrder; ++step) {
      if ((step + 1) * kStep <= S::kOrder || row + step * kStep < S::kOrder) {
        copy_async(to + step * kStep * S::kRawStride, from + (step * kStep << kPower));
      }
    }
  } else {
#pragma unroll 4
    for (int i = row; i < order; i += kStep, from += kStep << kPower, to += kStep * S::kRawStride) {
      copy_async(to, from);
    }
  }
}

// The signs of this thread's elements of fragments B, two elements in a register: of those of `part` at
// `tile` and `half`, bit 8 * (part % 2) + 2 * (part / 2 % 2) + half + 4 * (slot % 2) and the same of the
// upper 16, in word slot / 2 with slot = kQuads * tile + part / 4.
template <class S, int kPower>
__device__ __forceinline__ void load_flips(const HadamardArguments& a, int order, int first, int64_t column,
                                           uint32_t (&flips)[S::kFlipWords]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  // The signs of 8 columns are a byte.
  const uint8_t* signs = a.signs + ((column + first) >> 3);
  const bool aligned = reinterpret_cast<uintptr_t>(signs) % 4 == 0;
#pragma unroll
  for (int i = 0; i < S::kFlipWords; ++i) flips[i] = 0;
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * tile + 8 * half + 2 * t;
      if (row >= order) continue;
#pragma unroll
      for (int quad = 0; quad < S::kQuads; ++quad) {
        uint32_t bits = 0;
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint8_t* from = signs + ((row + next) << kPower >> 3) + 4 * quad;
          uint32_t bytes = 0;
          if (S::kParts >= 4 && aligned) {
            bytes = *reinterpret_cast<const uint32_t*>(from);
          } else {
#pragma unroll
            for (int i = 0; i < S::kParts && i < 4; ++i) bytes |= static_cast<uint32_t>(from[i]) << (8 * i);
          }
          const uint32_t own = (bytes >> g) & 0x01010101U;
          bits |= ((own | own >> 14) & 0x0505U) << (16 * next);
        }
        const int slot = S::kQuads * tile + quad;
        flips[slot / 2] |= bits << (half + 4 * (slot % 2));
      }
    }
  }
}

template <class S>
__device__ __forceinline__ uint32_t flip_of(const uint32_t (&flips)[S::kFlipWords], int tile, int part,
                                            int half) {
  const int slot = S::kQuads * tile + part / 4;
  const int bit = 8 * (part % 2) + 2 * (part / 2 % 2) + half + 4 * (slot % 2);
  return (flips[slot / 2] << (15 - bit)) & 0x80008000U;
}

// What a thread of pass 1 reads and writes.
template <class T>
struct DenseChunk {
  const T* raw;  // where this lane begins to read the chunk's columns of tile 0
  const T* zeros;
  float* sums;  // of the chunk's first column and row g of tile 0
  int order;
};

// Four 8 x 8 matrices of B: rows of `tile`, parts 2 * pair and 2 * pair + 1, two halves of rows each.
// Elements of float32 are split; the sum of their parts is exact.
template <class T, class S, bool kNegates>
__device__ __forceinline__ void load_columns(const DenseChunk<T>& chunk, int tile, int pair,
                                             const uint32_t (&flips)[S::kFlipWords],
                                             uint32_t (&words)[S::kSplits][4]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (S::kSplits == 1) {
    const T* from =
        16 * tile + (lane & 15) < chunk.order ? chunk.raw + 16 * tile * S::kRawStride : chunk.zeros;
    load_transposed(words[0], from + 16 * pair);
    if constexpr (kNegates) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[0][i] ^= flip_of<S>(flips, tile, 2 * pair + i / 2, i % 2);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * tile + 8 * (i % 2);
      uint32_t low = 0;
      uint32_t high = 0;
      if (row + 2 * (lane & 3) < chunk.order) {
        const T* from = chunk.raw + row * S::kRawStride + 8 * (2 * pair + i / 2);
        low = __float_as_uint(from[0]);
        high = __float_as_uint(from[S::kRawStride]);
      }
      if constexpr (kNegates) {
        const uint32_t flip = flip_of<S>(flips, tile, 2 * pair + i / 2, i % 2);
        low ^= flip << 16;
        high ^= flip & 0x80000000U;
      }
      uint32_t parts[S::kSplits];
      split_pair<T>(__uint_as_float(low), __uint_as_float(high), parts);
#pragma unroll
      for (int part = 0; part < S::kSplits; ++part) words[part][i] = parts[part];
    }
  }
}

// Bits of parts and bit 0 of one row tile, then its sums to shared memory. kLower: rows g + 8 exist.
template <class T, class S, bool kLower>
__device__ __forceinline__ void finish_sums(const DenseChunk<T>& chunk, int row_tile,
                                            float (&sum)[4 * S::kParts]) {
  // Bit 0 of the column is bit 0 of the index, rows g and g + 8 are bit 1.
  butterflies<0, 1>(sum);
  butterflies<2, S::kLogParts>(sum);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  const int row = 16 * row_tile + g;
  // The halves of 8 columns change places in a pattern, so that pass 2 meets no bank twice.
  float* even = chunk.sums + 16 * row_tile * S::kSumStride + 2 * t;
  float* odd = chunk.sums + 16 * row_tile * S::kSumStride + (2 * t ^ 4);
  if (S::kLogParts < 3 && (g & 1) != 0) even = odd;
#pragma unroll
  for (int part = 0; part < S::kParts; ++part) {
    float* to = (S::kLogParts >= 3 && part / 4 % 2 != 0 ? odd : even) + 8 * part;
    if (row < chunk.order) *reinterpret_cast<float2*>(to) = make_float2(sum[4 * part], sum[4 * part + 1]);
    if (kLower && row + 8 < chunk.order) {
      *reinterpret_cast<float2*>(to + 8 * S::kSumStride) = make_float2(sum[4 * part + 2], sum[4 * part + 3]);
    }
  }
}

// Row tiles group, group + kGroups, ... whose entries of M are `matrix`.
template <class T, class S, bool kLower, bool kNegates>
__device__ __forceinline__ void multiply_held(const DenseChunk<T>& chunk, int group,
                                              const uint32_t (&flips)[S::kFlipWords],
                                              const uint32_t (&matrix)[S::kOwn][S::kTiles][4]) {
  float sum[S::kOwn][4 * S::kParts];
#pragma unroll
  for (int pair = 0; pair < S::kParts / 2; ++pair) {
    uint32_t b[S::kTiles][S::kSplits][4];
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      load_columns<T, S, kNegates>(chunk, tile, pair, flips, b[tile]);
    }
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float four[4] = {0, 0, 0, 0};
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile) {
          // The smallest part first.
#pragma unroll
          for (int split = S::kSplits - 1; split >= 0; --split) {
            multiply_accumulate<DenseOperand<T>>(four, matrix[own][tile], b[tile][split][2 * part],
                                                 b[tile][split][2 * part + 1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[own][4 * (2 * pair + part) + i] = four[i];
      }
    }
  }
#pragma unroll
  for (int own = 0; own < S::kOwn; ++own) {
    if (own < S::kOwn - 1) {
      finish_sums<T, S, true>(chunk, group + own * S::kGroups, sum[own]);
    } else {
      finish_sums<T, S, kLower>(chunk, group + own * S::kGroups, sum[own]);
    }
  }
}

// Row tiles group, group + kGroups, ...; entries of M come from shared memory.
template <class T, class S, bool kNegates>
__device__ __forceinline__ void multiply_read(const DenseChunk<T>& chunk, int group,
                                              const uint32_t (&flips)[S::kFlipWords], const uint32_t* signs) {
  constexpr int kWordGroups = DenseSigns<S::kTiles>::kGroups;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  static_assert(S::kSplits == 1);
  uint32_t b[S::kTiles][S::kParts / 2][1][4];
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
    for (int pair = 0; pair < S::kParts / 2; ++pair) {
      load_columns<T, S, kNegates>(chunk, tile, pair, flips, b[tile][pair]);
    }
  }
#pragma unroll 1
  for (int row_tile = group; 16 * row_tile < chunk.order; row_tile += S::kGroups) {
    float sum[4 * S::kParts] = {};
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      const uint32_t word = signs[(row_tile * kWordGroups + tile / 4) * 32 + lane];
      uint32_t m[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        m[r] = ((word << (15 - (4 * (tile % 4) + r))) & 0x80008000U) | HalfPair<T>::kOne;
      }
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {
        float four[4] = {sum[4 * part], sum[4 * part + 1], sum[4 * part + 2], sum[4 * part + 3]};
        multiply_accumulate<T>(four, m, b[tile][part / 2][0][2 * (part % 2)],
                               b[tile][part / 2][0][2 * (part % 2) + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[4 * part + i] = four[i];
      }
    }
    finish_sums<T, S, true>(chunk, row_tile, sum);
  }
}

// Pass 1. `matrix` or `signs`, whichever holds M.
template <class T, int kHalves, class S, bool kNegates>
__device__ __forceinline__ void multiply_chunk(const DenseChunk<T>& chunk, int group,
                                               const uint32_t (&flips)[S::kFlipWords],
                                               const uint32_t (&matrix)[S::kOwn][S::kTiles][4],
                                               const uint32_t* signs) {
  if constexpr (!S::kHeld) {
    multiply_read<T, S, kNegates>(chunk, group, flips, signs);
  } else if constexpr (kHalves % 2 == 0) {
    multiply_held<T, S, true, kNegates>(chunk, group, flips, matrix);
  } else if (group == S::kGroups - 1) {
    multiply_held<T, S, false, kNegates>(chunk, group, flips, matrix);
  } else {
    multiply_held<T, S, true, kNegates>(chunk, group, flips, matrix);
  }
}

// Butterflies of one bit of the index, times `factor`.
template <int kBit, int kSize>
__device__ __forceinline__ void scaled_butterflies(float (&values)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if ((i >> kBit & 1) == 0) {
      const float a = values[i];
      const float b = values[i | 1 << kBit] * factor;
      values[i] = __fmaf_rn(a, factor, b);
      values[i | 1 << kBit] = __fmaf_rn(a, factor, -b);
    }
  }
}

// Pass 2: from sums to results.
template <class T, class S, int kPower>
__device__ __forceinline__ void write_results(const HadamardArguments& a, int order, const float* sums, T* to,
                                              int64_t column) {
  for (int i = static_cast<int>(threadIdx.x); i < order << S::kLogParts; i += S::kThreads) {
    const int row = i >> S::kLogParts;
    const int part = i & (S::kParts - 1);
    const int swapped = S::kLogParts >= 3 ? part >> 2 & 1 : row & 1;
    const float* from = sums + row * S::kSumStride + 8 * part;
    const float* lower = from + 4 * swapped;
    const float* upper = from + 4 * (1 - swapped);
    float values[S::kValues];
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      const float4 four = *reinterpret_cast<const float4*>(lower + chunk * S::kChunk);
      const float4 next = *reinterpret_cast<const float4*>(upper + chunk * S::kChunk);
      const float eight[8] = {four.x, four.y, four.z, four.w, next.x, next.y, next.z, next.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) values[8 * chunk + j] = eight[j];
    }
    butterflies<1, 1 + S::kLogChunks>(values);
    scaled_butterflies<2 + S::kLogChunks>(values, a.factor);
    const int element = (row << kPower) + 8 * part;
    if (a.channels != nullptr) {
      const float* channels = a.channels + column + element;
#pragma unroll
      for (int j = 0; j < S::kValues; ++j) values[j] *= channels[(j >> 3) * S::kChunk + (j & 7)];
    }
    constexpr int kWords = 2 * static_cast<int>(sizeof(T));  // of 8 neighbours
    uint32_t words[S::kChunks][kWords];
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        if constexpr (S::kSplits == 1) {
          words[chunk][j] = HadamardValues<T>::pair(values[8 * chunk + 2 * j], values[8 * chunk + 2 * j + 1]);
        } else {
          words[chunk][j] = __float_as_uint(values[8 * chunk + j]);
        }
      }
    }
    if (a.signs != nullptr && a.inverse) {
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        const uint32_t bits = a.signs[(column + element + chunk * S::kChunk) >> 3];
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          if constexpr (S::kSplits == 1) {
            words[chunk][j] ^= (bits << (15 - 2 * j) & 0x8000U) | (bits << (30 - 2 * j) & 0x80000000U);
          } else {
            words[chunk][j] ^= bits << (31 - j) & 0x80000000U;
          }
        }
      }
    }
    if (a.vectors) {
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        auto* vectors = reinterpret_cast<uint4*>(to + element + chunk * S::kChunk);
#pragma unroll
        for (int j = 0; j < kWords; j += 4) {
          vectors[j / 4] =
              make_uint4(words[chunk][j], words[chunk][j + 1], words[chunk][j + 2], words[chunk][j + 3]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < S::kValues; ++j) {
        T* one = to + element + (j >> 3) * S::kChunk + (j & 7);
        if constexpr (S::kSplits == 1) {
          const auto bits = static_cast<uint16_t>(words[j / 8][j % 8 / 2] >> (16 * (j % 2)));
          *one = *reinterpret_cast<const T*>(&bits);
        } else {
          *one = __uint_as_float(words[j / 8][j % 8]);
        }
      }
    }
  }
}

// `stages` raw blocks fit in the shared memory: 1 or 2.
template <class T, int kHalves, int kPower, int kChosenGroups = 0>
__global__ void __launch_bounds__((DenseStream<T, kHalves, kPower, kChosenGroups>::kThreads),
                                  (DenseStream<T, kHalves, kPower, kChosenGroups>::kResident))
    dense_stream_kernel(const HadamardArguments a, const int given_order, const int stages,
                        const __grid_constant__ DenseSigns<(kHalves + 1) / 2> signs) {
  using S = DenseStream<T, kHalves, kPower, kChosenGroups>;
  const int order = S::kOrder != 0 ? S::kOrder : given_order;
  auto* zeros = dynamic_shared_memory<unsigned char>();
  auto* sign_words = reinterpret_cast<uint32_t*>(zeros + S::kZeroBytes);
  auto* sums = reinterpret_cast<float*>(zeros + S::kZeroBytes + S::kSignBytes);
  auto* raw = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(sums) + S::sum_bytes(order));
  const int raw_size = order * S::kRawStride;
  const int size = order << kPower;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int chunk_index = (thread >> 5) & (S::kChunks - 1);
  const int group = thread >> (5 + S::kLogChunks);
  const int first = chunk_index * S::kChunk;

  // Places of the blocks that have been requested: of this one, and with two stages of the next.
  HadamardPlace here = place_of(a, blockIdx.x, size);
  HadamardPlace next{};
  int64_t ahead = blockIdx.x + gridDim.x;
  request_block<T, S, kPower>(a, order, raw, here);
  commit_copies();
  if (stages == 2) {
    if (ahead < a.units) {
      next = place_of(a, ahead, size);
      request_block<T, S, kPower>(a, order, raw + raw_size, next);
    }
    ahead += gridDim.x;
    commit_copies();
  }
  for (int i = thread; i < S::kZeroBytes / 16; i += S::kThreads) {
    reinterpret_cast<uint4*>(zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  uint32_t matrix[S::kOwn][S::kTiles][4];
  if constexpr (S::kHeld) {
#pragma unroll
    for (int own = 0; own < S::kOwn; ++own) {
      const uint32_t word = signs.words[(group + own * S::kGroups) * 32 + lane];
#pragma unroll
      for (int i = 0; i < 4 * S::kTiles; ++i) {
        matrix[own][i / 4][i % 4] = ((word << (15 - i)) & 0x80008000U) | HalfPair<DenseOperand<T>>::kOne;
      }
    }
  } else {
    for (int i = thread; i < DenseSigns<S::kTiles>::kWords; i += S::kThreads) sign_words[i] = signs.words[i];
  }
  DenseChunk<T> chunk{nullptr, reinterpret_cast<const T*>(zeros), sums + (lane >> 2) * S::kSumStride + first,
                      order};
  const bool negates = a.signs != nullptr && !a.inverse;
  uint32_t flips[S::kFlipWords] = {};
  int64_t column = -1;  // that `flips` belong to
  int stage = 0;
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    const HadamardPlace at = here;
    if (negates && at.column != column) {
      column = at.column;
      load_flips<S, kPower>(a, order, first, column, flips);
    }
    if (stages == 2) {
      wait_for_copies_but<1>();
    } else {
      wait_for_copies_but<0>();
    }
    __syncthreads();  // the block is here, and the sums of the one before have been read
    T* block = raw + stage * raw_size;
    if constexpr (S::kSplits == 1) {
      chunk.raw = block + (lane & 15) * S::kRawStride + first + 8 * (lane >> 4);
    } else {
      chunk.raw = block + 2 * (lane & 3) * S::kRawStride + first + (lane >> 2);
    }
    if (negates) {
      multiply_chunk<T, kHalves, S, true>(chunk, group, flips, matrix, sign_words);
    } else {
      multiply_chunk<T, kHalves, S, false>(chunk, group, flips, matrix, sign_words);
    }
    __syncthreads();
    here = next;
    if (ahead < a.units) {
      next = place_of(a, ahead, size);
      request_block<T, S, kPower>(a, order, block, next);
    }
    ahead += gridDim.x;
    commit_copies();
    if (stages == 2) {
      stage ^= 1;
    } else {
      here = next;
    }
    write_results<T, S, kPower>(a, order, sums, static_cast<T*>(a.out) + at.row * a.out_stride + at.column,
                                at.column);
  }
}

}  // namespace quantloom::cuda
