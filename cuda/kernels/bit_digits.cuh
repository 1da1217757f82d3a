// The activations of one token as bits, for products with planes of bits on the tensor cores.
//
// A stretch is 128 columns. Its activations are rounded to multiples of a power of two that is 2^-21 of the
// largest or less: integers of 24 bits, two's complement. The bits of one weight are one column of the tensor
// core's product, so that products with a plane are counts, exact. A stretch with an activation that is not
// finite makes NaN.
//
// The eight columns of a product hold eight of the 24 bits, three products make a set: column 2 t + e of
// product s has bit 6 t + 2 s + e, so that the six counts that lane t of four receives are those of six bits
// in a row.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/bit_plane_launch.hpp"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// Eight activations of a token, one by one: those at places [column, column + 8) of the matrix.
template <class T>
__device__ __noinline__ uint4 gather_eight(const ProductArguments& p, const T* x, int64_t column) {
  uint32_t pairs[4];
  for (int i = 0; i < 8; ++i) {
    const int64_t from = p.w.source != nullptr ? __ldg(p.w.source + column + i) : column + i;
    unsigned short bits = 0;
    if (from >= 0 && from < p.w.k) asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(x + from));
    pairs[i / 2] = i % 2 == 0 ? bits : pairs[i / 2] | static_cast<uint32_t>(bits) << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// In shared memory, for each stretch of a window: bits [product][column][lane % 4] of 32 activations, twice
// the power of two, the sum of the activations, two words of padding, and the sums of each 32.
class BitDigits {
 public:
  static constexpr int kProducts = 3;

  // For the `count` blocks from column block `first` on.
  __device__ __forceinline__ BitDigits(void* shared, int first, int count, int column_blocks)
      : shared_(static_cast<unsigned char*>(shared)),
        all_(column_blocks),
        first_(count >= column_blocks ? 0 : first),
        count_(max(min(count, column_blocks), 0)) {}

  // The thread's first activations, once the previous kernel's results can be read: half a warp takes a
  // stretch, a lane 8 columns of it.
  template <class T>
  __device__ __forceinline__ uint4 load_first(const ProductArguments& p) const {
    const int at = first_of_warp();
    return at < count_ ? load<T>(p, at) : make_uint4(0, 0, 0, 0);
  }

  // By all threads of a block; to be read after a barrier.
  template <class T>
  __device__ __forceinline__ void fill(const ProductArguments& p, uint4 raw) const {
    const auto step = static_cast<int>(blockDim.x / 16);
    for (int at = first_of_warp(); at < count_; at += step) {
      uint4 next{};
      if (at + step < count_) next = load<T>(p, at + step);
      write<T>(at, raw);
      raw = next;
    }
  }

  // Walks through the bits of a lane, from the stretch of column block `block` on.
  class Reader {
   public:
    Reader() = default;
    __device__ __forceinline__ Reader(const BitDigits& digits, int block, int lane)
        : lane_at_(lane * 4),
          begin_(digits.shared_),
          end_(digits.shared_ + digits.all_ * kBitStretchBytes),
          at_(digits.shared_ + digits.place(block) * kBitStretchBytes) {}
    template <int kProduct>
    __device__ __forceinline__ uint32_t bits() const {
      return *reinterpret_cast<const uint32_t*>(at_ + kProduct * 128 + lane_at_);
    }
    __device__ __forceinline__ float twice_unit() const { return *reinterpret_cast<const float*>(at_ + 384); }
    __device__ __forceinline__ float sum() const { return *reinterpret_cast<const float*>(at_ + 388); }
    __device__ __forceinline__ float4 word_sums() const {
      return *reinterpret_cast<const float4*>(at_ + 400);
    }
    // To the next stretch; the last of a row is followed by the first.
    __device__ __forceinline__ void advance() {
      at_ += kBitStretchBytes;
      if (at_ == end_) at_ = begin_;
    }

   private:
    int lane_at_ = 0;
    const unsigned char* begin_ = nullptr;
    const unsigned char* end_ = nullptr;
    const unsigned char* at_ = nullptr;
  };

 private:
  // Of a stretch of the matrix, in the window.
  __device__ __forceinline__ int place(int stretch) const {
    const int at = stretch - first_;
    return at < 0 ? at + all_ : at;
  }

  static __device__ __forceinline__ int first_of_warp() { return static_cast<int>(threadIdx.x / 32) * 2; }
  // The lane's eight activations of stretch `at` of the window or, in the upper half of the warp, `at` + 1.
  template <class T>
  __device__ __forceinline__ uint4 load(const ProductArguments& p, int at) const {
    int stretch = first_ + at + static_cast<int>(threadIdx.x % 32 / 16);
    if (stretch >= all_) stretch -= all_;
    const int64_t column =
        int64_t{stretch} * bit_planes::kBlockColumns + static_cast<int>(threadIdx.x % 16) * 8;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (p.x_in_pieces) {
      if (column < p.w.k) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                     : "l"(static_cast<const T*>(p.x) + column));
      }
    } else if (column < int64_t{all_} * bit_planes::kBlockColumns) {
      raw = gather_eight(p, static_cast<const T*>(p.x), column);
    }
    return raw;
  }

  template <class T>
  __device__ __forceinline__ void write(int at, const uint4& raw) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int sixteenth = lane % 16;
    at += lane / 16;
    uint32_t largest = __vmaxu2(__vmaxu2(raw.x & 0x7FFF7FFFU, raw.y & 0x7FFF7FFFU),
                                __vmaxu2(raw.z & 0x7FFF7FFFU, raw.w & 0x7FFF7FFFU));
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      largest = __vmaxu2(largest, __shfl_xor_sync(~0U, largest, distance));
    }
    const uint32_t top = max(largest & 0xFFFFU, largest >> 16);
    constexpr uint32_t kInfinity = HalfPair<T>::kMantissa == 10 ? 0x7C00U : 0x7F80U;
    const bool finite = top < kInfinity;
    // 2^exponent <= the largest < 2^(exponent + 1). Tinier than 2^-97 are as good as zero.
    const uint32_t top_bits = __float_as_uint(HalfPair<T>::low(top));
    const int exponent = max(static_cast<int>(top_bits >> 23) - 127, -97);
    const int up = finite ? 21 - exponent : 0;
    const float scale = power_of_two(up);
    const uint32_t values[8] = {
        integer(HalfPair<T>::low(raw.x), scale), integer(HalfPair<T>::high(raw.x), scale),
        integer(HalfPair<T>::low(raw.y), scale), integer(HalfPair<T>::high(raw.y), scale),
        integer(HalfPair<T>::low(raw.z), scale), integer(HalfPair<T>::high(raw.z), scale),
        integer(HalfPair<T>::low(raw.w), scale), integer(HalfPair<T>::high(raw.w), scale)};
    uint32_t word_sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) word_sum += values[i];
    word_sum += __shfl_xor_sync(~0U, word_sum, 1);
    word_sum += __shfl_xor_sync(~0U, word_sum, 2);
    uint32_t sum = word_sum;
    sum += __shfl_xor_sync(~0U, sum, 4);
    sum += __shfl_xor_sync(~0U, sum, 8);
    if (at >= count_) return;
    unsigned char* const to = shared_ + at * kBitStretchBytes;
    const float unit = finite ? power_of_two(-up) : __uint_as_float(0x7FC00000U);
    if (sixteenth % 4 == 0) {
      *reinterpret_cast<float*>(to + 400 + sixteenth) = static_cast<float>(static_cast<int>(word_sum)) * unit;
    }
    if (sixteenth == 1) {
      *reinterpret_cast<float2*>(to + 384) =
          make_float2(2.0F * unit, static_cast<float>(static_cast<int>(sum)) * unit);
    }
    write_byte<0>(values, to + sixteenth);
    write_byte<1>(values, to + sixteenth);
    write_byte<2>(values, to + sixteenth);
  }

  // value * scale, rounded; less than 2^22 in magnitude.
  static __device__ __forceinline__ uint32_t integer(float value, float scale) {
    return __float_as_uint(fmaf(value, scale, 12582912.0F)) - 0x4B400000U;
  }

  // Bits 8 * kByte ... of eight activations, each in a byte of its own.
  template <int kByte>
  static __device__ __forceinline__ void write_byte(const uint32_t (&values)[8], unsigned char* to) {
    constexpr unsigned kPair = kByte | (kByte + 4) << 4;
    uint32_t low = __byte_perm(__byte_perm(values[0], values[1], kPair),
                               __byte_perm(values[2], values[3], kPair), 0x5410);
    uint32_t high = __byte_perm(__byte_perm(values[4], values[5], kPair),
                                __byte_perm(values[6], values[7], kPair), 0x5410);
    // The 8 x 8 bits change places: byte j, bit b becomes byte b, bit j.
    low = swapped<7, 0x00AA00AAU>(low);
    high = swapped<7, 0x00AA00AAU>(high);
    low = swapped<14, 0x0000CCCCU>(low);
    high = swapped<14, 0x0000CCCCU>(high);
    const uint32_t across = (low >> 4 ^ high) & 0x0F0F0F0FU;
    low ^= across << 4;
    high ^= across;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      const int bit = 8 * kByte + b;
      const int product = bit % 6 / 2;
      const int column = bit / 6 * 2 + bit % 2;
      to[product * 128 + column * 16] = static_cast<unsigned char>((b < 4 ? low : high) >> (b % 4 * 8));
    }
  }

  template <int kDistance, uint32_t kMask>
  static __device__ __forceinline__ uint32_t swapped(uint32_t word) {
    const uint32_t change = (word >> kDistance ^ word) & kMask;
    return word ^ change ^ change << kDistance;
  }

  static __device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((127 + exponent) << 23);
  }

  unsigned char* shared_;
  int all_;    // stretches of a row
  int first_;  // of the window, which goes on at 0 past the last
  int count_;
};

}  // namespace quantloom::cuda
