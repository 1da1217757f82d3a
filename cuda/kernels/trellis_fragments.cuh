// Decoder of trellis codes for the loop of many tokens: the float16 weights that the format defines. Columns
// change places within a block of 64: see trellis_column().
//
// uniform_fragments.cuh says what a decoder offers.
#pragma once

#include "kernels/trellis_operands.cuh"

namespace quantloom::cuda {

// The column of its block of 64 that a lane's decoder puts at column `place` of fragment order: of step s,
// lane t and number j the input 2 s + j % 2 + 8 (j / 2) of tile t.
__host__ __device__ constexpr int trellis_column(int place) {
  const int step = place / 16;
  const int tile = place / 4 % 4;
  const int j = place % 4;
  return 16 * tile + 2 * step + j % 2 + 8 * (j / 2);
}

template <int kCodeBits, TrellisHash kHash>
class TrellisFragments {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr float kUnit = 1.0F;
  static constexpr float kCenter = 0.0F;
  static constexpr bool kHasZeros = false;
  static constexpr bool kQuads = false;
  static constexpr int kSharedBytes = 0;

  // There is no table: `multiplier` is that of the hash.
  template <class T>
  __device__ __forceinline__ void prepare(const void* /*table*/, int multiplier, void* /*shared*/) {
    map_.multiplier = static_cast<uint32_t>(multiplier);
    map_.addend = map_.multiplier == trellis::kLcgMultiplier ? trellis::kLcgAddend : 0U;
  }

  // By all lanes of a warp.
  template <class T, int kStep>
  __device__ __forceinline__ void fragment(const uint32_t (&words)[kBits], uint32_t (&a)[4]) const {
    static_assert(std::is_same_v<T, __half>);
    using Exact = TrellisExact<kBits, kHash>;
    const typename Exact::Windows windows(words);
    a[0] = Exact::template word<4 * kStep>(windows, map_);
    a[1] = Exact::template word<4 * kStep + 2>(windows, map_);
    a[2] = Exact::template word<4 * kStep + 1>(windows, map_);
    a[3] = Exact::template word<4 * kStep + 3>(windows, map_);
  }

 private:
  TrellisMap map_;
};

}  // namespace quantloom::cuda
