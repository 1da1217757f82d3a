// The same as hadamard_dense.cuh for float16, bfloat16 and orders up to 64, with half the traffic through
// shared memory: elements are copied there as they are, a warp transforms 32 columns of all rows by tensor
// cores and then bits 0 to 4 of the column in registers, and the last pass writes its results at once. A
// thread block works through many blocks of the matrix and copies the next one while the last pass of this
// one runs.
#pragma once

#include "transforms/hadamard_dense.cuh"

namespace quantloom::cuda {

constexpr int kRawPadding = 8;  // elements between raw rows: rows stay multiples of 16 bytes
constexpr int kSumPadding = 8;  // floats between rows of sums: pairs of lanes' rows stay in different banks
constexpr int kAheadThreads = 512;

// Behind the signs, which come first.
struct DenseAheadLayout {
  int raw_stride;  // elements
  int sum_stride;  // floats
  int raw_offset;  // bytes from the sums, behind them; then 16 bytes of zeros
  int zero_offset;
  int bytes;
};

constexpr __host__ __device__ DenseAheadLayout dense_ahead_layout(DenseShape shape) {
  DenseAheadLayout layout{};
  layout.raw_stride = (1 << shape.power) + kRawPadding;
  layout.sum_stride = (1 << shape.power) + kSumPadding;
  layout.raw_offset = 4 * shape.order * layout.sum_stride;
  layout.zero_offset = layout.raw_offset + 2 * shape.order * layout.raw_stride;
  layout.bytes = layout.zero_offset + 16;
  return layout;
}

// Copies one block to shared memory as it is.
template <class T>
__device__ __forceinline__ void copy_block(const HadamardArguments& a, const DenseShape& shape, T* raw,
                                           int raw_stride, int64_t unit) {
  const int size = shape.order << shape.power;
  const int columns = 1 << shape.power;
  const HadamardPlace at = place_of(a, unit, size);
  const T* from = static_cast<const T*>(a.x) + at.row * a.x_stride + at.column;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < size; i += static_cast<int>(blockDim.x) * 8) {
    T* to = raw + (i >> shape.power) * raw_stride + (i & (columns - 1));
    if (a.vectors) {
      copy_async(to, from + i);
    } else {
      *reinterpret_cast<uint4*>(to) = load_vector(from + i, false);
    }
  }
}

// M and bits 0 to 4 (or 3) of the column, from raw elements to sums.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_ahead(const HadamardArguments& a, const DenseShape& shape,
                                               const uint32_t* signs, const T* raw, int raw_stride,
                                               const T* zeros, float* sums, int sum_stride, int64_t column) {
  constexpr int kGroups = DenseSigns<kTiles>::kGroups;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  const int columns = 1 << shape.power;
  const bool whole = columns >= 32;  // else 16
  const bool negates = a.signs != nullptr && !a.inverse;
  for (int first = (static_cast<int>(threadIdx.x) >> 5) * 32; first < columns;
       first += static_cast<int>(blockDim.x)) {
    uint32_t b[kTiles][4][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int row = 16 * tile + (lane & 15);
        const int from = first + 16 * pair + 8 * (lane >> 4);
        const bool exists = row < shape.order && from < columns;
        uint32_t words[4];
        load_transposed(words, exists ? raw + row * raw_stride + from : zeros);
        b[tile][2 * pair][0] = words[0];
        b[tile][2 * pair][1] = words[1];
        b[tile][2 * pair + 1][0] = words[2];
        b[tile][2 * pair + 1][1] = words[3];
      }
      if (negates) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * tile + 8 * half + 2 * t;
          if (row >= shape.order) continue;
          // The signs of 8 columns are a byte.
          const uint8_t* low = a.signs + ((column + (static_cast<int64_t>(row) << shape.power) + first) >> 3);
          const uint8_t* high = low + (columns >> 3);
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            if (part >= 2 && !whole) break;
            b[tile][part][half] ^= ((low[part] >> g) & 1U) << 15 | ((high[part] >> g) & 1U) << 31;
          }
        }
      }
    }
#pragma unroll 1
    for (int row_tile = 0; row_tile < kTiles; ++row_tile) {
      if (16 * row_tile >= shape.order) break;
      float sum[16] = {};  // [part][rows g and g + 8][columns 2 t and 2 t + 1]
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t word = signs[(row_tile * kGroups + group) * 32 + lane];
#pragma unroll
        for (int inner = 0; inner < 4; ++inner) {
          const int tile = 4 * group + inner;
          if (tile >= kTiles) break;
          uint32_t m[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            m[r] = ((word << (15 - (4 * inner + r))) & 0x80008000U) | HalfPair<T>::kOne;
          }
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            float four[4] = {sum[4 * part], sum[4 * part + 1], sum[4 * part + 2], sum[4 * part + 3]};
            multiply_accumulate<T>(four, m, b[tile][part][0], b[tile][part][1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[4 * part + i] = four[i];
          }
        }
      }
      // Bit 0 of the column is bit 0 of the index of `sum`, bits 1 and 2 those of the lane, 3 and 4 of the
      // part.
      butterflies<0, 1>(sum);
      lane_butterflies(sum, lane, 0);
      lane_butterflies(sum, lane, 1);
      butterflies<2, 1>(sum);
      if (whole) butterflies<3, 1>(sum);
      const int row = 16 * row_tile + g;
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        if (part >= 2 && !whole) break;
        float* to = sums + row * sum_stride + first + 8 * part + 2 * t;
        if (row < shape.order) *reinterpret_cast<float2*>(to) = make_float2(sum[4 * part], sum[4 * part + 1]);
        if (row + 8 < shape.order) {
          *reinterpret_cast<float2*>(to + 8 * sum_stride) = make_float2(sum[4 * part + 2], sum[4 * part + 3]);
        }
      }
    }
  }
}

// Bits [5, 5 + kBits) of the column, and the results. Lanes hold neighbours.
template <class T, int kBits>
__device__ __forceinline__ void last_pass(const HadamardArguments& a, const DenseShape& shape,
                                          const float* sums, int sum_stride, T* to, int64_t column) {
  constexpr int kValues = 1 << kBits;
  const int rest_bits = shape.power - kBits;
  for (int i = static_cast<int>(threadIdx.x); i < shape.order << rest_bits;
       i += static_cast<int>(blockDim.x)) {
    const int rest = i & ((1 << rest_bits) - 1);
    const int col = (rest & 31) | (rest >> 5) << (5 + kBits);
    const int row = i >> rest_bits;
    const float* from = sums + row * sum_stride + col;
    float values[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) values[j] = from[j << 5];
    butterflies<0, kBits>(values);
    const int element = (row << shape.power) + col;
    finish(a, values, column + element, [](int j) { return j << 5; });
#pragma unroll
    for (int j = 0; j < kValues; ++j) to[element + (j << 5)] = HadamardValues<T>::from_float(values[j]);
  }
}

template <class T>
__device__ __forceinline__ void last_passes(const HadamardArguments& a, const DenseShape& shape, float* sums,
                                            int sum_stride, T* to, int64_t column) {
  switch (shape.power - 5) {
    case 1:
      return last_pass<T, 1>(a, shape, sums, sum_stride, to, column);
    case 2:
      return last_pass<T, 2>(a, shape, sums, sum_stride, to, column);
    case 3:
      return last_pass<T, 3>(a, shape, sums, sum_stride, to, column);
    case 4:
      return last_pass<T, 4>(a, shape, sums, sum_stride, to, column);
    case 5:
      return last_pass<T, 5>(a, shape, sums, sum_stride, to, column);
    case 6:
      column_pass<1>(shape, sums, sum_stride, 10);
      return last_pass<T, 5>(a, shape, sums, sum_stride, to, column);
    default:  // 2^power of 16 or 32: nothing is left to transform
      return last_pass<T, 0>(a, shape, sums, sum_stride, to, column);
  }
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kAheadThreads, 2)
    dense_ahead_kernel(const HadamardArguments a, const DenseShape shape,
                       const __grid_constant__ DenseSigns<kTiles> signs) {
  const DenseAheadLayout layout = dense_ahead_layout(shape);
  auto* sign_words = dynamic_shared_memory<uint32_t>();
  auto* sums = dynamic_shared_memory<float>() + DenseSigns<kTiles>::kWords;
  auto* bytes = reinterpret_cast<unsigned char*>(sums);
  T* raw = reinterpret_cast<T*>(bytes + layout.raw_offset);
  auto* zeros = reinterpret_cast<uint4*>(bytes + layout.zero_offset);
  const int size = shape.order << shape.power;
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < DenseSigns<kTiles>::kWords; i += static_cast<int>(blockDim.x)) {
    sign_words[i] = signs.words[i];
  }
  if (thread == 0) *zeros = make_uint4(0, 0, 0, 0);
  copy_block(a, shape, raw, layout.raw_stride, blockIdx.x);
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    const HadamardPlace at = place_of(a, unit, size);
    wait_for_copies();
    __syncthreads();  // the block is here, and the sums of the one before have been read
    multiply_ahead<T, kTiles>(a, shape, sign_words, raw, layout.raw_stride, reinterpret_cast<const T*>(zeros),
                              sums, layout.sum_stride, at.column);
    __syncthreads();
    if (unit + gridDim.x < a.units) copy_block(a, shape, raw, layout.raw_stride, unit + gridDim.x);
    T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
    last_passes<T>(a, shape, sums, layout.sum_stride, to, at.column);
  }
}

}  // namespace quantloom::cuda
