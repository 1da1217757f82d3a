// The Hadamard transform of blocks of m * 2^power elements, m a multiple of 4 up to 256 and power at least 4:
// read once, written once. A thread block holds a whole block in shared memory as float32, [m][2^power].
//
// The matrix of order m comes first, on the elements as they were read, so that tensor cores take them
// without rounding: float16 and bfloat16 as they are, float32 as the sum of three bfloat16 numbers. Then
// butterflies.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/half_pairs.cuh"
#include "common/shared_memory.cuh"
#include "quantloom/transforms/hadamard.hpp"
#include "transforms/hadamard_values.cuh"

namespace quantloom::cuda {

// Signs of M in the order of fragments A of mma.m16n8k16: word [row tile][column tile / 4][lane], of which
// bit 4 * (column tile % 4) + r + 16 * h belongs to half h of register r.
template <int kTiles>
struct DenseSigns {
  static constexpr int kGroups = (kTiles + 3) / 4;
  static constexpr int kWords = kTiles * kGroups * 32;
  uint32_t words[kWords];
};

// Entries of M as DenseSigns has them, [tiles][ceil(tiles / 4)][32]; of its transpose for the inverse.
inline std::vector<uint32_t> sign_words(int64_t order, bool transposed, int tiles) {
  const std::vector<int8_t> base = hadamard_base(order);
  const int groups = (tiles + 3) / 4;
  std::vector<uint32_t> words(static_cast<size_t>(tiles) * static_cast<size_t>(groups) * 32, 0);
  for (int row_tile = 0; row_tile < tiles; ++row_tile) {
    for (int tile = 0; tile < tiles; ++tile) {
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t& word = words[static_cast<size_t>((row_tile * groups + tile / 4) * 32 + lane)];
        for (int r = 0; r < 4; ++r) {
          for (int half = 0; half < 2; ++half) {
            const int64_t row = 16 * row_tile + lane / 4 + 8 * (r % 2);
            const int64_t col = 16 * tile + 2 * (lane % 4) + half + 8 * (r / 2);
            if (row >= order || col >= order) continue;
            const int64_t entry = transposed ? col * order + row : row * order + col;
            if (base[static_cast<size_t>(entry)] < 0) word |= 1U << (4 * (tile % 4) + r + 16 * half);
          }
        }
      }
    }
  }
  return words;
}

template <int kTiles>
DenseSigns<kTiles> dense_signs(int64_t order, bool transposed) {
  const std::vector<uint32_t> words = sign_words(order, transposed, kTiles);
  DenseSigns<kTiles> signs{};
  std::copy(words.begin(), words.end(), signs.words);
  return signs;
}

struct DenseShape {
  int order = 0;
  int power = 0;
};

constexpr int kDensePadding = 4;  // floats between rows: keeps the lanes of a fragment in different banks

template <class T>
using DenseOperand = std::conditional_t<std::is_same_v<T, float>, __nv_bfloat16, T>;

__device__ __forceinline__ uint32_t pair_bits(__half low, __half high) {
  const __half2 pair = __halves2half2(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pair_bits(__nv_bfloat16 low, __nv_bfloat16 high) {
  const __nv_bfloat162 pair = __halves2bfloat162(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Two elements of fragment B, exactly: one register, or three whose sum they are.
template <class T, int kParts>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    parts[0] = pair_bits(HadamardValues<T>::from_float(low), HadamardValues<T>::from_float(high));
  } else {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      // Cut, not rounded: the rest is exact, and an infinite value has none.
      const uint32_t low_bits = __float_as_uint(low) & 0xffff0000U;
      const uint32_t high_bits = __float_as_uint(high) & 0xffff0000U;
      parts[i] = low_bits >> 16 | high_bits;
      low = isfinite(low) ? low - __uint_as_float(low_bits) : 0.0F;
      high = isfinite(high) ? high - __uint_as_float(high_bits) : 0.0F;
    }
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void multiply_dense(const DenseShape& shape, const uint32_t* signs, float* shared,
                                               int stride) {
  using Operand = DenseOperand<T>;
  constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;
  constexpr int kGroups = DenseSigns<kTiles>::kGroups;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  const int chunks = (1 << shape.power) / 8;
  // Each warp takes 8 columns of all m rows, and puts the product in their place.
  for (int chunk = static_cast<int>(threadIdx.x) >> 5; chunk < chunks;
       chunk += static_cast<int>(blockDim.x) >> 5) {
    float* columns = shared + chunk * 8;
    uint32_t b[kTiles][2][kParts];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * tile + 8 * half + 2 * t;
        const bool exists = row < shape.order;
        const float low = exists ? columns[row * stride + g] : 0.0F;
        const float high = exists ? columns[(row + 1) * stride + g] : 0.0F;
        split_pair<T>(low, high, b[tile][half]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int row_tile = 0; row_tile < kTiles; ++row_tile) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t word = signs[(row_tile * kGroups + group) * 32 + lane];
#pragma unroll
        for (int inner = 0; inner < 4; ++inner) {
          const int tile = 4 * group + inner;
          if (tile >= kTiles) break;
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a[r] = ((word << (15 - (4 * inner + r))) & 0x80008000U) | HalfPair<Operand>::kOne;
          }
          // The smallest part first.
#pragma unroll
          for (int part = kParts - 1; part >= 0; --part) {
            multiply_accumulate<Operand>(sum, a, b[tile][0][part], b[tile][1][part]);
          }
        }
      }
      const int row = 16 * row_tile + g;
      if (row < shape.order) {
        *reinterpret_cast<float2*>(columns + row * stride + 2 * t) = make_float2(sum[0], sum[1]);
      }
      if (row + 8 < shape.order) {
        *reinterpret_cast<float2*>(columns + (row + 8) * stride + 2 * t) = make_float2(sum[2], sum[3]);
      }
    }
  }
}

// Butterflies of bits [first, first + kBits) of the column, first >= 5 so that lanes read neighbours.
template <int kBits>
__device__ __forceinline__ void column_pass(const DenseShape& shape, float* shared, int stride, int first) {
  const int rest_bits = shape.power - kBits;
  for (int i = static_cast<int>(threadIdx.x); i < shape.order << rest_bits;
       i += static_cast<int>(blockDim.x)) {
    const int rest = i & ((1 << rest_bits) - 1);
    const int column = (rest & ((1 << first) - 1)) | (rest >> first) << (first + kBits);
    float* at = shared + (i >> rest_bits) * stride + column;
    float values[1 << kBits];
#pragma unroll
    for (int j = 0; j < 1 << kBits; ++j) values[j] = at[j << first];
    butterflies<0, kBits>(values);
#pragma unroll
    for (int j = 0; j < 1 << kBits; ++j) at[j << first] = values[j];
  }
  __syncthreads();
}

__device__ __forceinline__ void column_passes(const DenseShape& shape, float* shared, int stride) {
  switch (shape.power - 5) {
    case 1:
      return column_pass<1>(shape, shared, stride, 5);
    case 2:
      return column_pass<2>(shape, shared, stride, 5);
    case 3:
      return column_pass<3>(shape, shared, stride, 5);
    case 4:
      return column_pass<4>(shape, shared, stride, 5);
    case 5:
      return column_pass<5>(shape, shared, stride, 5);
    case 6:
      column_pass<3>(shape, shared, stride, 5);
      return column_pass<3>(shape, shared, stride, 8);
    default:
      return;
  }
}

constexpr int kDenseThreads = 512;

template <class T, int kTiles>
__global__ void __launch_bounds__(kDenseThreads)
    dense_kernel(const HadamardArguments a, const DenseShape shape,
                 const __grid_constant__ DenseSigns<kTiles> signs) {
  constexpr int kVector = 1 << HadamardValues<T>::kLogVector;
  auto* sign_words = dynamic_shared_memory<uint32_t>();
  auto* shared = dynamic_shared_memory<float>() + DenseSigns<kTiles>::kWords;
  const int columns = 1 << shape.power;
  const int stride = columns + kDensePadding;
  const int size = shape.order << shape.power;
  const auto threads = static_cast<int>(blockDim.x);
  const auto thread = static_cast<int>(threadIdx.x);
  const HadamardPlace at = place_of(a, blockIdx.x, size);
  const T* from = static_cast<const T*>(a.x) + at.row * a.x_stride + at.column;

#pragma unroll 4
  for (int i = thread * kVector; i < size; i += threads * kVector) {
    float vector[kVector];
    HadamardValues<T>::unpack(load_vector(from + i, a.vectors), vector);
    if (a.signs != nullptr && !a.inverse) negate(vector, sign_bits(a.signs, at.column + i));
    float* to = shared + (i >> shape.power) * stride + (i & (columns - 1));
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      *reinterpret_cast<float4*>(to + j) =
          make_float4(vector[j], vector[j + 1], vector[j + 2], vector[j + 3]);
    }
  }
  for (int i = thread; i < DenseSigns<kTiles>::kWords; i += threads) sign_words[i] = signs.words[i];
  __syncthreads();
  multiply_dense<T, kTiles>(shape, sign_words, shared, stride);
  __syncthreads();
  column_passes(shape, shared, stride);

  // Bits 0 to 2 in registers, 3 and 4 between lanes, which hold consecutive vectors of 8. Whole warps take
  // part in the shuffles; size / 8 is a multiple of 8, so that vectors exist by fours.
  T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
  for (int begin = (thread & ~31) * 8; begin < size; begin += threads * 8) {
    const int i = begin + (thread & 31) * 8;
    const bool exists = i < size;
    float values[8] = {};
    if (exists) {
      const float* at_values = shared + (i >> shape.power) * stride + (i & (columns - 1));
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = at_values[j];
    }
    butterflies<0, 3>(values);
    lane_butterflies(values, thread, 0);
    if (shape.power >= 5) lane_butterflies(values, thread, 1);
    if (!exists) continue;
    finish(a, values, at.column + i, [](int j) { return j; });
    store_values(to + i, values, a.vectors);
  }
}

}  // namespace quantloom::cuda
