// Decoder of the format "codebook" in fragment order: codes are looked up in shared memory. Each of the 32
// banks has a copy of the table of its own, so that the lanes of a warp never wait for each other. Up to 4
// bits an entry is a pair of values, and both codes of a pair one index.
//
// uniform_fragments.cuh says what a decoder offers.
#pragma once

#include "common/half_pairs.cuh"
#include "formats/fragment_order.hpp"

namespace quantloom::cuda {

template <int kCodeBits>
class CodebookFragments {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr float kUnit = 1.0F;
  static constexpr float kCenter = 0.0F;
  static constexpr bool kHasZeros = false;
  static constexpr bool kQuads = false;
  static constexpr int kSharedBytes = 128 << (kCodeBits <= 4 ? 2 * kCodeBits : kCodeBits);

  // table: float16 [entries]; codes past it decode to 0. shared: kSharedBytes, aligned to 4.
  template <class T>
  __device__ __forceinline__ void prepare(const void* table, int entries, void* shared) {
    const auto value = [&](int code) {
      const float v = code < entries ? __half2float(static_cast<const __half*>(table)[code]) : 0.0F;
      const T rounded = HalfPair<T>::from_float(v);
      return static_cast<uint32_t>(*reinterpret_cast<const unsigned short*>(&rounded));
    };
    // Eight lanes write the 32 copies of an entry. Several loads are on their way at once.
    constexpr int kBatch = 4;
    const auto stride = static_cast<int>(blockDim.x) / 8;
    for (int first = static_cast<int>(threadIdx.x) / 8; first < kEntries; first += kBatch * stride) {
      uint32_t batch[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int index = (first + b * stride) % kEntries;
        batch[b] = kPairs ? value(index % (1 << kBits)) | value(index >> kBits) << 16 : value(index);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int index = first + b * stride;
        if (index >= kEntries) break;
        static_cast<uint4*>(shared)[index * 8 + static_cast<int>(threadIdx.x) % 8] =
            make_uint4(batch[b], batch[b], batch[b], batch[b]);
      }
    }
    own_copy_ = static_cast<const unsigned char*>(shared) + threadIdx.x % 32 * 4;
  }

  // Registers a[0..3] of step kStep: the table's values, rounded to T.
  template <class T, int kStep>
  __device__ __forceinline__ void fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    a[0] = pair<4 * kStep>(words);
    a[1] = pair<4 * kStep + 1>(words);
    a[2] = pair<4 * kStep + 2>(words);
    a[3] = pair<4 * kStep + 3>(words);
  }

  template <class T>
  static constexpr bool kHasOffset = false;

  template <class T, int kStep>
  __device__ __forceinline__ void raw_fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    fragment<T, kStep>(words, a);
  }

 private:
  static constexpr bool kPairs = kBits <= 4;
  static constexpr int kEntries = 1 << (kPairs ? 2 * kBits : kBits);

  // `kCount` bits from bit kFirst of the unit's stream on.
  template <int kFirst, int kCount>
  static __device__ __forceinline__ uint32_t field(const uint32_t (&words)[kBits]) {
    constexpr int kWord = kFirst / 32;
    constexpr int kShift = kFirst % 32;
    if constexpr (kCount == 8) return __byte_perm(words[kWord], 0U, 0x4440U | (kShift / 8));
    constexpr uint32_t kMask = (1U << kCount) - 1U;
    if constexpr (kShift + kCount <= 32) return (words[kWord] >> kShift) & kMask;
    if constexpr (kShift + kCount > 32)
      return __funnelshift_r(words[kWord], words[kWord + 1], kShift) & kMask;
  }

  __device__ __forceinline__ uint32_t look_up(uint32_t index) const {
    return *reinterpret_cast<const uint32_t*>(own_copy_ + index * 128);
  }

  template <int kPair>
  __device__ __forceinline__ uint32_t pair(const uint32_t (&words)[kBits]) const {
    if constexpr (kPairs) {
      return look_up(field<kPair * 2 * kBits, 2 * kBits>(words));
    } else {
      return __byte_perm(look_up(field<2 * kPair * kBits, kBits>(words)),
                         look_up(field<(2 * kPair + 1) * kBits, kBits>(words)), 0x5410U);
    }
  }

  const unsigned char* own_copy_ = nullptr;
};

}  // namespace quantloom::cuda
