// The activations of one token as digits, for products on integers.
//
// A stretch is 128 columns. Its activations are rounded to multiples of a power of two that is 2^-23 of the
// largest or less: integers of four digits to the base of 256, from -128 to 127. Products of the digits with
// codes and their sums over a stretch are exact integers. A stretch with an activation that is not finite
// makes NaN.
//
// Codes may lie some bits up in the bytes of a word (Decoder::step_position); the activations they meet are
// divided by that power of two.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// In shared memory, for each stretch of a window: digits [2 blocks][digit][lane % 4][step][4 columns], the
// factor, and 12 bytes that keep the stretches in different banks. The digits of the odd block change places
// in pairs, so that they are written without conflicts.
class ActivationDigits {
 public:
  ActivationDigits() = default;
  // For the `count` blocks from column block `first` on.
  __device__ __forceinline__ ActivationDigits(void* shared, int first, int count, int column_blocks)
      : shared_(static_cast<unsigned char*>(shared)),
        all_((column_blocks + 1) / 2),
        first_(count >= column_blocks ? 0 : first / 2),
        count_(stretches_met(first, count, column_blocks)) {}

  // Activations on their way: half a warp takes a stretch, a lane 8 columns of it, some stretches at once.
  static constexpr int kAtOnce = 2;
  struct Batch {
    uint4 raw[kAtOnce];
  };

  // The thread's first, once the previous kernel's results can be read.
  template <class T>
  __device__ __forceinline__ Batch load_first(const ProductArguments& p) const {
    return load_batch<T>(p, first_of_warp());
  }

  // By all threads of a block; to be read after a barrier.
  template <class Decoder, class T>
  __device__ __forceinline__ void fill(const ProductArguments& p, Batch batch) const {
    int at = first_of_warp();
    while (at < count_) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * at_once() < count_) write<Decoder, T>(at + i * at_once(), batch.raw[i]);
      }
      at += kAtOnce * at_once();
      if (at < count_) batch = load_batch<T>(p, at);
    }
  }

  // Walks through the digits of a lane, from the stretch of column block `block` on.
  class Reader {
   public:
    Reader() = default;
    __device__ __forceinline__ Reader(const ActivationDigits& digits, int block, int lane)
        : lane_at_((lane / 8 * 4 + lane % 4) * 16),
          end_(digits.shared_ + digits.all_ * kStretchBytes),
          begin_(digits.shared_),
          at_(digits.shared_ + digits.place(block / 2) * kStretchBytes) {}
    // Of block 0 or 1 of the stretch: words of the four steps.
    template <int kBlock>
    __device__ __forceinline__ uint4 digits() const {
      return *reinterpret_cast<const uint4*>(at_ + kBlock * 256 + (lane_at_ ^ (kBlock * 64)));
    }
    __device__ __forceinline__ float factor() const { return *reinterpret_cast<const float*>(at_ + 2 * 256); }
    // To the next stretch; the last of a row is followed by the first.
    __device__ __forceinline__ void advance() {
      at_ += kStretchBytes;
      if (at_ == end_) at_ = begin_;
    }

   private:
    int lane_at_ = 0;
    const unsigned char* end_ = nullptr;
    const unsigned char* begin_ = nullptr;
    const unsigned char* at_ = nullptr;
  };

 private:
  // Of a stretch of the matrix, in the window.
  __device__ __forceinline__ int place(int stretch) const {
    const int at = stretch - first_;
    return at < 0 ? at + all_ : at;
  }

  static __device__ __forceinline__ int first_of_warp() {
    return static_cast<int>(threadIdx.x / 32) * 2;
  }
  // Stretches that a block of threads takes at a time.
  static __device__ __forceinline__ int at_once() {
    return static_cast<int>(blockDim.x / 16);
  }

  template <class T>
  __device__ __forceinline__ Batch load_batch(const ProductArguments& p, int at) const {
    Batch batch;
    if (p.x_in_pieces) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        batch.raw[i] = make_uint4(0, 0, 0, 0);
        const int64_t column = column_of(at + i * at_once());
        if (at + i * at_once() < count_ && column < p.w.k) {
          asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(batch.raw[i].x), "=r"(batch.raw[i].y), "=r"(batch.raw[i].z),
                         "=r"(batch.raw[i].w)
                       : "l"(static_cast<const T*>(p.x) + column));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * at_once() >= count_) break;
        const int64_t column = column_of(at + i * at_once());
        const uint2 low = gather<T>(p, column);
        const uint2 high = gather<T>(p, column + 4);
        batch.raw[i] = make_uint4(low.x, low.y, high.x, high.y);
      }
    }
    return batch;
  }

  // The lane's first of eight columns, of stretch `at` of the window or, in the upper half of the warp,
  // `at` + 1.
  __device__ __forceinline__ int64_t column_of(int at) const {
    int stretch = first_ + at + static_cast<int>(threadIdx.x % 32 / 16);
    if (stretch >= all_) stretch -= all_;
    return int64_t{stretch} * kStretchColumns + threadIdx.x % 16 * 8;
  }

  // Four activations, one by one.
  template <class T>
  static __device__ __noinline__ uint2 gather(const ProductArguments& p, int64_t column) {
    const T* const x = static_cast<const T*>(p.x);
    uint32_t four[4];
    for (int i = 0; i < 4; ++i) {
      int64_t from = column + i;
      if (p.w.source != nullptr) {
        from = from < int64_t{p.w.column_blocks} * fragments::kBlockColumns ? __ldg(p.w.source + from) : -1;
      }
      unsigned short bits = 0;
      if (from >= 0 && from < p.w.k) {
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(x + from));
      }
      four[i] = bits;
    }
    return make_uint2(four[0] | four[1] << 16, four[2] | four[3] << 16);
  }

  template <class Decoder, class T>
  __device__ __forceinline__ void write(int at, const uint4& raw) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    at += lane / 16;
    uint32_t largest = __vmaxu2(__vmaxu2(raw.x & 0x7FFF7FFFU, raw.y & 0x7FFF7FFFU),
                                __vmaxu2(raw.z & 0x7FFF7FFFU, raw.w & 0x7FFF7FFFU));
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      largest = __vmaxu2(largest, __shfl_xor_sync(~0U, largest, distance));
    }
    if (at >= count_) return;
    const uint32_t bits = max(largest & 0xFFFFU, largest >> 16);
    // 2^exponent <= the largest. Tinier than 2^-97 are as good as zero.
    constexpr uint32_t kInfinity = HalfPair<T>::kMantissa == 10 ? 0x7C00U : 0x7F80U;
    const float top = HalfPair<T>::to_float(from_bits<T>(bits));
    const int exponent = max(static_cast<int>(__float_as_uint(top) >> 23) - 127, -97);
    const int up = bits >= kInfinity ? 0 : 29 - exponent;
    unsigned char* const to = shared_ + at * kStretchBytes;
    if (lane % 16 == 0) {
      *reinterpret_cast<float*>(to + 2 * 256) =
          bits >= kInfinity ? __uint_as_float(0x7FC00000U) : power_of_two(-up);
    }
    const int step = lane / 2 % 4;
    const int position = Decoder::step_position(1) * (step & 1) + Decoder::step_position(2) * (step / 2);
    const float scale = power_of_two(up - position);
    const int odd = lane / 8 % 2;
    unsigned char* const four = to + odd * 256 + lane % 2 * 32 + step * 4;
    write_four<T>(raw.x, raw.y, scale, four, odd * 64);
    write_four<T>(raw.z, raw.w, scale, four + 16, odd * 64);
  }

  // The digits of four columns. `swapped`: 64 if digits change places in pairs.
  template <class T>
  static __device__ __forceinline__ void write_four(uint32_t low, uint32_t high, float scale,
                                                    unsigned char* to, int swapped) {
    const uint32_t digits[4] = {
        digits_of(HalfPair<T>::low(low) * scale), digits_of(HalfPair<T>::high(low) * scale),
        digits_of(HalfPair<T>::low(high) * scale), digits_of(HalfPair<T>::high(high) * scale)};
    // Columns in the order of byte_of(): 0, 2, 1, 3.
    const uint32_t low02 = __byte_perm(digits[0], digits[2], 0x5140);
    const uint32_t low13 = __byte_perm(digits[1], digits[3], 0x5140);
    const uint32_t high02 = __byte_perm(digits[0], digits[2], 0x7362);
    const uint32_t high13 = __byte_perm(digits[1], digits[3], 0x7362);
    unsigned char* const even = to + swapped;
    unsigned char* const odd = to + (64 - swapped);
    *reinterpret_cast<uint32_t*>(even) = __byte_perm(low02, low13, 0x5410);
    *reinterpret_cast<uint32_t*>(odd) = __byte_perm(low02, low13, 0x7632);
    *reinterpret_cast<uint32_t*>(even + 128) = __byte_perm(high02, high13, 0x5410);
    *reinterpret_cast<uint32_t*>(odd + 128) = __byte_perm(high02, high13, 0x7632);
  }

  template <class T>
  static __device__ __forceinline__ T from_bits(uint32_t bits) {
    const auto half = static_cast<unsigned short>(bits);
    return __builtin_bit_cast(T, half);
  }

  static __device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((127 + exponent) << 23);
  }

  // The digits of the integer nearest to `value`, lowest in the lowest byte.
  static __device__ __forceinline__ uint32_t digits_of(float value) {
    return (static_cast<uint32_t>(__float2int_rn(value)) + 0x00808080U) ^ 0x00808080U;
  }

  unsigned char* shared_;
  int all_;    // stretches of a row
  int first_;  // of the window, which goes on at 0 past the last
  int count_;
};

}  // namespace quantloom::cuda
