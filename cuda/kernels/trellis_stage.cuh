// Trellis codes decoded to float16 in shared memory, 128 x 128 weights at a time, for the kernels that rotate
// them.
#pragma once

#include <cuda_fp16.h>

#include "kernels/trellis_dense_launch.hpp"
#include "kernels/trellis_layout.hpp"
#include "kernels/trellis_operands.cuh"

namespace quantloom::cuda {

constexpr int kTileSide = 128;
constexpr int kStageRowBytes = 2 * kTileSide + 16;  // eight rows' pieces of 16 bytes lie in different banks
constexpr int kStageBytes = kTileSide * kStageRowBytes;

// The words of a lane of unit `unit` of a block of 64 x 64.
template <int kBits>
__device__ __forceinline__ void load_unit(const uint4* codes, int64_t block, int unit, int lane,
                                          uint32_t (&words)[kBits]) {
  const auto* const from = reinterpret_cast<const uint32_t*>(codes + block * (kBits * 32) + lane);
  const int first = unit * kBits;
  if constexpr (kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 4) {
      const uint4 piece = __ldg(reinterpret_cast<const uint4*>(from + (first + i) / 4 * 128));
      words[i] = piece.x;
      words[i + 1] = piece.y;
      words[i + 2] = piece.z;
      words[i + 3] = piece.w;
    }
  } else if constexpr (kBits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kBits; i += 2) {
      const uint2 piece =
          __ldg(reinterpret_cast<const uint2*>(from + (first + i) / 4 * 128 + (first + i) % 4));
      words[i] = piece.x;
      words[i + 1] = piece.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = __ldg(from + (first + i) / 4 * 128 + (first + i) % 4);
  }
}

// Whole bits in fragment order. Of each eight positions of a lane, the first four are of row lane / 4 of its
// unit, the others eight rows on: columns 2 a, 2 a + 1, 2 a + 8 and 2 a + 9 of the tile.
template <int kBits, TrellisHash kHash>
struct FragmentStage {
  static constexpr int kWordBytes = 0;  // of shared memory beside the rows

  template <int kWarps>
  static __device__ __forceinline__ void decode(const TrellisDense& w, int band, int span,
                                                unsigned char* rows) {
    using Decoder = TrellisExact<kBits, kHash>;
    constexpr int kJobs = 16 / kWarps;  // units of a warp
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int first = static_cast<int>(threadIdx.x / 32) * kJobs;
    uint32_t words[kJobs][kBits];
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
      const int block = (first + i) / 4;
      load_unit<kBits>(w.codes, (int64_t{2} * band + block / 2) * w.column_blocks + 2 * span + block % 2,
                       (first + i) % 4, lane, words[i]);
    }
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
      const int block = (first + i) / 4;
      const typename Decoder::Windows windows(words[i]);
      unsigned char* const to = rows + (block / 2 * 64 + (first + i) % 4 * 16 + lane / 4) * kStageRowBytes +
                                block % 2 * 128 + lane % 4 * 32;
      store<Decoder, 0>(windows, w.map, to);
      store<Decoder, 2>(windows, w.map, to + 8 * kStageRowBytes);
    }
  }

 private:
  // Sixteen columns of a row: words kFirst + 4 a and the next.
  template <class Decoder, int kFirst>
  static __device__ __forceinline__ void store(const typename Decoder::Windows& windows,
                                               const TrellisMap& map, unsigned char* to) {
    auto* const pieces = reinterpret_cast<uint4*>(to);
    pieces[0] = make_uint4(
        Decoder::template word<kFirst>(windows, map), Decoder::template word<kFirst + 4>(windows, map),
        Decoder::template word<kFirst + 8>(windows, map), Decoder::template word<kFirst + 12>(windows, map));
    pieces[1] = make_uint4(
        Decoder::template word<kFirst + 1>(windows, map), Decoder::template word<kFirst + 5>(windows, map),
        Decoder::template word<kFirst + 9>(windows, map), Decoder::template word<kFirst + 13>(windows, map));
  }
};

// Two weights from one state or two, as the format defines them: float16 bits, the first in the low half.
template <TrellisCode kCode>
__device__ __forceinline__ uint32_t weight_pair(const TrellisDense& w, uint32_t first, uint32_t second) {
  constexpr uint32_t kBytes = 0x01010101U;
  if constexpr (kCode == TrellisCode::octagon) {
    return octagon_pair(second * w.map.multiplier);
  } else if constexpr (kCode == TrellisCode::hyb) {
    const uint32_t hash = trellis::hyb_hash(second);
    return __ldg(reinterpret_cast<const uint32_t*>(w.table) + trellis::hyb_entry(hash)) ^
           trellis::hyb_sign(hash);
  } else if constexpr (kCode == TrellisCode::table) {
    if (w.ring.weights_per_step == 2) return __ldg(reinterpret_cast<const uint32_t*>(w.table) + second);
    return __ldg(w.table + first) | static_cast<uint32_t>(__ldg(w.table + second)) << 16;
  } else {
    const uint32_t a = first * w.map.multiplier + w.map.addend;
    const uint32_t b = second * w.map.multiplier + w.map.addend;
    if constexpr (kCode == TrellisCode::one_mad) {
      // The quotients by 147.8..., rounded to float32 and then to float16, are those of one rounding for all
      // 1021 sums, also with the inverse.
      constexpr float kInverse = 1.0F / 147.800537109375F;
      const __half2 pair =
          __floats2half2_rn(__fmul_rn(static_cast<float>(__dp4a(a, kBytes, 0U)) - 510.0F, kInverse),
                            __fmul_rn(static_cast<float>(__dp4a(b, kBytes, 0U)) - 510.0F, kInverse));
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      return kCode == TrellisCode::mul1 ? byte_sum_pair(a, b) : halves_pair(a, b);
    }
  }
}

// Any rings. Eight positions of a ring, whose bits lie together, to a thread at a time.
struct RingStage {
  static constexpr int kWordBytes = 64 * 64 * 4;  // of 64 rings of 8 bits a weight

  template <int kWarps>
  static __device__ __forceinline__ void decode(const TrellisDense& w, int band, int span,
                                                unsigned char* rows) {
    auto* const words = reinterpret_cast<uint32_t*>(rows + kStageBytes);
    const auto* const from = reinterpret_cast<const uint32_t*>(w.codes);
    const int ring_words = w.ring.words();
    for (int i = static_cast<int>(threadIdx.x); i < 64 * ring_words; i += 32 * kWarps) {
      const int tile = i / ring_words;
      words[i] =
          __ldg(from + trellis_place(w.fragments, ring_words, w.column_blocks, int64_t{8} * band + tile / 8,
                                     int64_t{8} * span + tile % 8, i - tile * ring_words));
    }
    __syncthreads();
    switch (w.code) {
      case TrellisCode::lcg:
      case TrellisCode::mcg:
        return decode_rings<TrellisCode::mcg, kWarps>(w, words, rows);
      case TrellisCode::mul1:
        return decode_rings<TrellisCode::mul1, kWarps>(w, words, rows);
      case TrellisCode::octagon:
        return decode_rings<TrellisCode::octagon, kWarps>(w, words, rows);
      case TrellisCode::one_mad:
        return decode_rings<TrellisCode::one_mad, kWarps, 0>(w, words, rows);
      case TrellisCode::hyb:
        return decode_rings<TrellisCode::hyb, kWarps, 0>(w, words, rows);
      default:
        return decode_rings<TrellisCode::table, kWarps, 0>(w, words, rows);
    }
  }

 private:
  // Bits in halves as constants.
  template <TrellisCode kCode, int kWarps>
  static __device__ __forceinline__ void decode_rings(const TrellisDense& w, const uint32_t* words,
                                                      unsigned char* rows) {
    constexpr bool kPairs = kCode == TrellisCode::octagon;
    switch (w.ring.window == 16 ? w.ring.half_bits : 0) {
      case 3:
        return decode_rings<kCode, kWarps, 3>(w, words, rows);
      case 5:
        return decode_rings<kCode, kWarps, 5>(w, words, rows);
      case 7:
        return decode_rings<kCode, kWarps, 7>(w, words, rows);
      case 9:
        return decode_rings < kCode, kWarps, kPairs ? 0 : 9 > (w, words, rows);
      case 11:
        return decode_rings < kCode, kWarps, kPairs ? 0 : 11 > (w, words, rows);
      case 13:
        return decode_rings < kCode, kWarps, kPairs ? 0 : 13 > (w, words, rows);
      case 15:
        return decode_rings < kCode, kWarps, kPairs ? 0 : 15 > (w, words, rows);
      default:
        return decode_rings<kCode, kWarps, 0>(w, words, rows);
    }
  }

  // kHalfBits: of a weight, with a window of 16; 0 for any.
  template <TrellisCode kCode, int kWarps, int kHalfBits>
  static __device__ __forceinline__ void decode_rings(const TrellisDense& w, const uint32_t* words,
                                                      unsigned char* rows) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int half_bits = kHalfBits > 0 ? kHalfBits : w.ring.half_bits;
    const int window = kHalfBits > 0 ? 16 : w.ring.window;
    const int ring_words = 4 * half_bits;
    // Where the state before the first one of the lane begins; the eight weights add up to 64 bits to it.
    int begin = 4 * half_bits * lane - window;
    if (begin < 0) begin += 32 * ring_words;
    int at[4];
    at[0] = begin / 32;
    for (int i = 1; i < 4; ++i) at[i] = at[i - 1] + 1 < ring_words ? at[i - 1] + 1 : 0;
    unsigned char* const to = rows + lane / 4 * kStageRowBytes + lane % 4 * 4;
    for (int tile = static_cast<int>(threadIdx.x / 32); tile < 64; tile += kWarps) {
      const uint32_t* const ring = words + tile * ring_words;
      uint32_t stream[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        stream[i] = __funnelshift_l(ring[at[i + 1]], ring[at[i]], static_cast<uint32_t>(begin % 32));
      }
      const auto state = [&](int offset) {
        const uint32_t high = offset < 32 ? stream[0] : offset < 64 ? stream[1] : stream[2];
        const uint32_t low = offset < 32 ? stream[1] : offset < 64 ? stream[2] : 0U;
        return __funnelshift_l(low, high, static_cast<uint32_t>(offset % 32)) >> (32 - window);
      };
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        // With two weights a step the first state is not used.
        *reinterpret_cast<uint32_t*>(to + (tile / 8 * 16 + pair / 2 * 8) * kStageRowBytes + tile % 8 * 32 +
                                     pair % 2 * 16) =
            weight_pair<kCode>(w, state((2 * pair + 1) * half_bits / 2), state((pair + 1) * half_bits));
      }
    }
  }
};

}  // namespace quantloom::cuda
