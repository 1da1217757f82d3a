// How trellis codes meet the tensor cores: a word that comes from a state is four bytes or two float16
// numbers in the 16-row operand, and the activations of the words' weights are the other operand.
//
// The hash word of a state is not decoded to a weight: the tensor core adds up its bytes (or halves), each
// times the activation. An activation is two digits, in neighbouring columns of the operand: of eight bits
// each for bytes, the float16 number nearest to it and the float16 nearest to the rest for halves.
#pragma once

#include <cuda_fp16.h>

#include "common/half_pairs.cuh"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_windows.cuh"
#include "kernels/trellis_launch.hpp"

namespace quantloom::cuda {

// Sums of the tensor core for one unit of 16 rows, 8 columns: two digits of four tokens.
template <bool kHalves>
struct TrellisSums;

template <>
struct TrellisSums<false> {
  uint32_t sum[4];
  __device__ __forceinline__ void clear() { sum[0] = sum[1] = sum[2] = sum[3] = 0; }
  __device__ __forceinline__ void add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bytes(sum, a, b0, b1, sum);
  }
  // Of row lane / 4 + 8 * kRow, the lane's token: its digits put together.
  template <int kRow>
  __device__ __forceinline__ float value() const {
    return fmaf(256.0F, static_cast<float>(static_cast<int>(sum[2 * kRow + 1])),
                static_cast<float>(static_cast<int>(sum[2 * kRow])));
  }
};

template <>
struct TrellisSums<true> {
  float sum[4];
  __device__ __forceinline__ void clear() { sum[0] = sum[1] = sum[2] = sum[3] = 0.0F; }
  __device__ __forceinline__ void add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_accumulate<__half>(sum, a, b0, b1);
  }
  template <int kRow>
  __device__ __forceinline__ float value() const {
    return sum[2 * kRow + 1] + sum[2 * kRow];
  }
};

// The integer digits of an activation.
struct ByteDigits {
  static constexpr float kLargest = 32639.0F;  // 127 * 256 + 127
  static __device__ __forceinline__ float unit_of(float largest) { return largest * (1.0F / kLargest); }
  static __device__ __forceinline__ float inverse_of(float largest) {
    return largest > 0.0F ? kLargest / largest : 0.0F;
  }
};

// MUL1 and 1MAD: one weight a state, the sum of the four bytes of its hash. kMultiplier: that of the hash,
// which then adds nothing; 0 if it is known at run time. An immediate operand leaves more of the registers'
// ports to the tensor cores.
template <int kBits_, uint32_t kMultiplier = 0>
struct TrellisBytes {
  static constexpr int kBits = kBits_;
  static constexpr int kWeights = 1;  // of a word
  static constexpr bool kHalves = false;
  using Windows = TrellisWindows<kBits, kBits>;

  template <int kWord>
  static __device__ __forceinline__ uint32_t word(const Windows& windows, const TrellisMap& map) {
    if constexpr (kMultiplier != 0) return windows.template state<kWord>() * kMultiplier;
    return windows.template state<kWord>() * map.multiplier + map.addend;
  }
};

// trellis::halves_of() by one instruction.
__device__ __forceinline__ uint32_t halves_of_hash(uint32_t hash) {
  uint32_t halves;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;"
      : "=r"(halves)
      : "r"(hash), "r"(trellis::kHalvesMask), "r"(trellis::kHalvesFlip));
  return halves;
}

// 3INST: one weight a state, the sum of two float16 numbers.
template <int kBits_>
struct TrellisHalves {
  static constexpr int kBits = kBits_;
  static constexpr int kWeights = 1;
  static constexpr bool kHalves = true;
  using Windows = TrellisWindows<kBits, kBits>;

  template <int kWord>
  static __device__ __forceinline__ uint32_t word(const Windows& windows, const TrellisMap& map) {
    return halves_of_hash(windows.template state<kWord>() * map.multiplier + map.addend);
  }
};

// octagon: two weights a state, sums of the four bytes of its hash along four axes. The bytes meet what the
// two activations are along the axes.
template <int kBits_, uint32_t kMultiplier = 0>
struct TrellisOctagon {
  static constexpr int kBits = kBits_;
  static constexpr int kWeights = 2;
  static constexpr bool kHalves = false;
  using Windows = TrellisWindows<kBits, 2 * kBits>;

  template <int kWord>
  static __device__ __forceinline__ uint32_t word(const Windows& windows, const TrellisMap& map) {
    if constexpr (kMultiplier != 0) return windows.template state<kWord>() * kMultiplier;
    return windows.template state<kWord>() * map.multiplier;
  }
};

// Weights as the float16 numbers that the format defines, two in a word: of two hashes, or of one.
__device__ __forceinline__ uint32_t halves_pair(uint32_t first, uint32_t second) {
  const uint32_t a = halves_of_hash(first);
  const uint32_t b = halves_of_hash(second);
  return HalfPair<__half>::add(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
}
__device__ __forceinline__ uint32_t byte_sum_pair(uint32_t first, uint32_t second) {
  // 1024 + the sum of the bytes, as float16 bits.
  const uint32_t a = __dp4a(first, 0x01010101U, 0x6400U);
  const uint32_t b = __dp4a(second, 0x01010101U, 0x6400U);
  constexpr uint32_t kSlope = uint32_t{trellis::kMul1Slope} * 0x10001U;
  constexpr uint32_t kOffset = uint32_t{trellis::kMul1Offset} * 0x10001U;
  return HalfPair<__half>::multiply_add(__byte_perm(a, b, 0x5410), kSlope, kOffset);
}
// The sum of the bytes of `hash`, times those of `steps`, which have signs.
__device__ __forceinline__ int bytes_along(uint32_t hash, int steps) {
  int sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(hash), "r"(steps), "r"(0));
  return sum;
}
__device__ __forceinline__ uint32_t octagon_pair(uint32_t hash) {
  // Twice the bytes along the axes of either weight, less 255 times what the bytes count for.
  constexpr int kAxis = trellis::kOctagonAxis;
  constexpr int kDiagonal = trellis::kOctagonDiagonal;
  const int first = bytes_along(hash, kAxis | kDiagonal << 16 | kDiagonal << 24);
  const int second = bytes_along(hash, kAxis << 8 | kDiagonal << 16 | (256 - kDiagonal) << 24);
  // Exact until they are rounded: integers of 24 bits.
  constexpr float kUnit = static_cast<float>(trellis::kOctagonSlope) * 0x1p-22F;
  const __half2 pair =
      __floats2half2_rn(fmaf(static_cast<float>(first), 2 * kUnit, -255 * (kAxis + 2 * kDiagonal) * kUnit),
                        fmaf(static_cast<float>(second), 2 * kUnit, -255 * kAxis * kUnit));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int kBits_, TrellisHash kHash>
struct TrellisExact {
  static constexpr int kBits = kBits_;
  static constexpr int kWeights = 2;
  static constexpr bool kHalves = true;
  using Windows = TrellisWindows<kBits, kHash == TrellisHash::octagon ? 2 * kBits : kBits>;

  template <int kWord>
  static __device__ __forceinline__ uint32_t word(const Windows& windows, const TrellisMap& map) {
    if constexpr (kHash == TrellisHash::octagon) {
      return octagon_pair(windows.template state<kWord>() * map.multiplier);
    } else {
      const uint32_t first = windows.template state<2 * kWord>() * map.multiplier + map.addend;
      const uint32_t second = windows.template state<2 * kWord + 1>() * map.multiplier + map.addend;
      return kHash == TrellisHash::halves ? halves_pair(first, second) : byte_sum_pair(first, second);
    }
  }
};

// The operand of the activations in shared memory, for each piece of 64 columns:
// [kPieces][2 * kTokens columns][4 tiles][16 bytes]. One token's words are stored as they are needed; of
// several, digits are stored once and spread over a word in registers.
//
// Activation 2 a + 8 b + c of a tile of 16 (a 0 ... 3; b, c 0 or 1) is number 4 a + 2 b + c.
template <class Decoder, int kTokens>
class TrellisOperand {
 public:
  static constexpr bool kSpread = kTokens == 1 && Decoder::kWeights == 1;
  static constexpr int kWords = kSpread ? 16 : Decoder::kHalves || Decoder::kWeights == 2 ? 8 : 4;
  static constexpr int kPieces = kWords / 4;
  static constexpr int kColumns = 2 * kTokens;
  // What the digits of two activations are of: of them, or of four directions.
  static constexpr int kDigits = Decoder::kWeights == 2 && !Decoder::kHalves ? 4 : 2;
  static constexpr int kPieceBytes = kColumns * 4 * 16;
  static constexpr int kBytes = kPieces * kPieceBytes;

  // Of column lane / 4, or one that it repeats.
  static __device__ __forceinline__ int lane_place(int lane) {
    return (lane / 4 % kColumns * 4 + lane % 4) * 16;
  }
  __device__ __forceinline__ void load(const unsigned char* from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces_[i] = *reinterpret_cast<const uint4*>(from + i * kPieceBytes);
  }
  // The word that meets word `kIndex` of each weight's.
  template <int kIndex>
  __device__ __forceinline__ uint32_t word() const {
    if constexpr (kSpread || Decoder::kWeights == 2) {
      return stored<kIndex>();
    } else if constexpr (Decoder::kHalves) {
      return __byte_perm(stored<kIndex / 2>(), 0, kIndex % 2 == 0 ? 0x1010 : 0x3232);
    } else {
      return __byte_perm(stored<kIndex / 4>(), 0, 0x1111 * (kIndex % 4));
    }
  }

  // Stores the digits of two activations, numbers 2 * pair and 2 * pair + 1 of tile `tile`. digits: of the
  // bytes, or float16 bits, [activation][digit]. Of an octagon, of what they are along the four axes.
  static __device__ __forceinline__ void store(unsigned char* piece, int token, int tile, int pair,
                                               const uint32_t (&digits)[kDigits][2]) {
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      const uint32_t x = digits[0][d];
      const uint32_t y = digits[1][d];
      unsigned char* const to = piece + ((2 * token + d) * 4 + tile) * 16;
      if constexpr (kSpread) {
        constexpr uint32_t kSelect = Decoder::kHalves ? 0x1010 : 0x0000;
        *reinterpret_cast<uint2*>(to + pair / 2 * kPieceBytes + pair % 2 * 8) =
            make_uint2(__byte_perm(x, 0, kSelect), __byte_perm(y, 0, kSelect));
      } else if constexpr (Decoder::kHalves) {
        *reinterpret_cast<uint32_t*>(to + pair / 4 * kPieceBytes + pair % 4 * 4) = __byte_perm(x, y, 0x5410);
      } else if constexpr (kDigits == 4) {
        *reinterpret_cast<uint32_t*>(to + pair / 4 * kPieceBytes + pair % 4 * 4) =
            __byte_perm(__byte_perm(x, y, 0x0040), __byte_perm(digits[2][d], digits[3][d], 0x0040), 0x5410);
      } else {
        *reinterpret_cast<uint16_t*>(to + pair * 2) = static_cast<uint16_t>(__byte_perm(x, y, 0x0040));
      }
    }
  }

 private:
  template <int kIndex>
  __device__ __forceinline__ uint32_t stored() const {
    const uint4& piece = pieces_[kIndex / 4];
    return kIndex % 4 == 0 ? piece.x : kIndex % 4 == 1 ? piece.y : kIndex % 4 == 2 ? piece.z : piece.w;
  }

  uint4 pieces_[kPieces];
};

}  // namespace quantloom::cuda
