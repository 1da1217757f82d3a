// Decoder of the format "vector_codebook" in fragment order (src/formats/vector_order.hpp): each code is one
// look at a table of vectors. uniform_fragments.cuh says what a decoder offers.
//
// Tables of up to 4096 vectors lie in shared memory, in as many copies as fit kCopyBytes: lanes of a warp
// then meet in fewer banks. Larger ones are read where they are, through the caches.
#pragma once

#include "common/half_pairs.cuh"
#include "formats/vector_order.hpp"

namespace quantloom::cuda {

// kDim: weights of a vector, 2, 4 or 8. kWords: bits of a weight. kInShared: the table is in shared memory.
template <int kDim, int kWords, bool kInShared>
class VectorFragments {
 public:
  static constexpr int kBits = kWords;
  static constexpr float kUnit = 1.0F;
  static constexpr float kCenter = 0.0F;
  static constexpr bool kHasZeros = false;
  static constexpr bool kQuads = false;
  static constexpr int kFieldBits = kDim * kWords;
  static constexpr int kEntries = 1 << (kFieldBits < 12 ? kFieldBits : 12);
  static constexpr int kEntryBytes = 2 * kDim;
  static constexpr int kCopyBytes = 64 << 10;
  // Copies that keep all lanes apart which read at the same time.
  static constexpr int kMostCopies = kDim == 2 ? 32 : kDim == 4 ? 16 : 8;
  static constexpr int kFittingCopies = kCopyBytes / (kEntries * kEntryBytes);
  static constexpr int kCopies = kFittingCopies < kMostCopies ? kFittingCopies : kMostCopies;
  static constexpr int kSharedBytes = kInShared ? kEntries * kEntryBytes * kCopies : 0;

  // table: float16 [entries][kDim], aligned to 16 bytes; codes past it decode to 0 (in shared memory) or to
  // the last vector. shared: kSharedBytes, aligned to 16.
  template <class T>
  __device__ __forceinline__ void prepare(const void* table, int entries, void* shared) {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    if constexpr (kInShared) {
      // 16 bytes to a thread at a time, next to those of its neighbours. Several loads are on their way at
      // once.
      constexpr int kBatch = 4;
      constexpr int kPieces = kSharedBytes / 16;
      constexpr int kEntryPieces = kEntryBytes * kCopies / 16;
      const auto stride = static_cast<int>(blockDim.x);
      for (auto first = static_cast<int>(threadIdx.x); first < kPieces; first += kBatch * stride) {
        uint4 batch[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int entry = (first + b * stride) / kEntryPieces;
          batch[b] = entry < entries ? copies_of<T>(table, entry) : make_uint4(0U, 0U, 0U, 0U);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (first + b * stride < kPieces) static_cast<uint4*>(shared)[first + b * stride] = batch[b];
        }
      }
      const int copy = (kDim == 8 ? lane / 2 : lane) % kCopies;
      place_ = static_cast<const unsigned char*>(shared) + copy * kEntryBytes;
    } else {
      last_ = static_cast<uint32_t>(entries - 1);
      place_ = static_cast<const unsigned char*>(table);
    }
    if constexpr (kDim == 8) {
      odd_ = lane % 2 == 1;
      place_ += odd_ ? 8 : 0;
    }
  }

  // Registers a[0..3] of step kStep: the table's values, rounded to T.
  template <class T, int kStep>
  __device__ __forceinline__ void fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    if constexpr (kDim == 2) {
      a[0] = look_up_pair<T>(field<4 * kStep>(words));
      a[1] = look_up_pair<T>(field<4 * kStep + 1>(words));
      a[2] = look_up_pair<T>(field<4 * kStep + 2>(words));
      a[3] = look_up_pair<T>(field<4 * kStep + 3>(words));
    } else {
      uint32_t low;
      uint32_t high;
      if constexpr (kDim == 4) {
        low = field<2 * kStep>(words);
        high = field<2 * kStep + 1>(words);
      } else {
        const uint32_t own = field<kStep>(words);
        const uint32_t other = __shfl_xor_sync(~0U, own, 1);
        low = odd_ ? other : own;
        high = odd_ ? own : other;
      }
      const uint2 first = look_up_four<T>(low);
      const uint2 second = look_up_four<T>(high);
      a[0] = first.x;
      a[1] = second.x;
      a[2] = first.y;
      a[3] = second.y;
    }
  }

  template <class T>
  static constexpr bool kHasOffset = false;

  template <class T, int kStep>
  __device__ __forceinline__ void raw_fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    fragment<T, kStep>(words, a);
  }

 private:
  // Bits of a field that a code in shared memory can have.
  static constexpr uint32_t kMask = kInShared ? kEntries - 1U : (1U << kFieldBits) - 1U;

  template <int kField>
  static __device__ __forceinline__ uint32_t field(const uint32_t (&words)[kBits]) {
    constexpr int kWord = kField * kFieldBits / 32;
    constexpr int kShift = kField * kFieldBits % 32;
    if constexpr (kFieldBits == 8 && kMask == 0xFFU) {
      return __byte_perm(words[kWord], 0U, 0x4440U | (kShift / 8));
    } else if constexpr (kShift + kFieldBits <= 32) {
      return (words[kWord] >> kShift) & kMask;
    } else {
      return __funnelshift_r(words[kWord], words[kWord + 1], kShift) & kMask;
    }
  }

  // A pair of float16 as a pair of T.
  template <class T>
  static __device__ __forceinline__ uint32_t in_type(uint32_t pair) {
    if constexpr (HalfPair<T>::kMantissa == 10) {
      return pair;
    } else {
      const auto one = [](uint32_t bits) {
        const auto half = static_cast<unsigned short>(bits);
        const T rounded = HalfPair<T>::from_float(__half2float(*reinterpret_cast<const __half*>(&half)));
        return static_cast<uint32_t>(*reinterpret_cast<const unsigned short*>(&rounded));
      };
      return one(pair) | one(pair >> 16) << 16;
    }
  }

  // As many copies of an entry as 16 bytes hold.
  template <class T>
  static __device__ __forceinline__ uint4 copies_of(const void* table, int entry) {
    static_assert(kEntryBytes * kCopies % 16 == 0);
    if constexpr (kDim == 2) {
      const uint32_t pair = in_type<T>(__ldg(static_cast<const uint32_t*>(table) + entry));
      return make_uint4(pair, pair, pair, pair);
    } else if constexpr (kDim == 4) {
      const uint2 four = __ldg(static_cast<const uint2*>(table) + entry);
      const uint32_t low = in_type<T>(four.x);
      const uint32_t high = in_type<T>(four.y);
      return make_uint4(low, high, low, high);
    } else {
      const uint4 eight = __ldg(static_cast<const uint4*>(table) + entry);
      return make_uint4(in_type<T>(eight.x), in_type<T>(eight.y), in_type<T>(eight.z), in_type<T>(eight.w));
    }
  }

  template <class T>
  __device__ __forceinline__ uint32_t look_up_pair(uint32_t code) const {
    static_assert(kInShared || kDim != 2);
    return *reinterpret_cast<const uint32_t*>(place_ + code * (kEntryBytes * kCopies));
  }

  template <class T>
  __device__ __forceinline__ uint2 look_up_four(uint32_t code) const {
    if constexpr (kInShared) {
      return *reinterpret_cast<const uint2*>(place_ + code * (kEntryBytes * kCopies));
    } else {
      const uint32_t inside = code < last_ ? code : last_;
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(place_ + inside * kEntryBytes));
      return make_uint2(in_type<T>(four.x), in_type<T>(four.y));
    }
  }

  const unsigned char* place_ = nullptr;
  uint32_t last_ = 0;
  bool odd_ = false;
};

}  // namespace quantloom::cuda
