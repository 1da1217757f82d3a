// Decoder of trellis codes for the loop of many tokens: the float16 weights that the format defines. Columns
// change places within a block of 64: input 16 t + 8 h + 2 s + c is what the tensor core meets as column
// 8 h + 2 t + c of step s.
//
// uniform_fragments.cuh says what a decoder offers.
#pragma once

#include "kernels/group_scales.cuh"
#include "kernels/trellis_operands.cuh"

namespace quantloom::cuda {

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

// None: scales belong to the rotations. A branch after each step that is hardly ever taken keeps its
// fragments from being made while its products are issued, for which ptxas would have each product wait for
// the last.
template <int kBits, TrellisHash kHash, class T>
class GroupScales<TrellisFragments<kBits, kHash>, T, false> {
 public:
  __device__ __forceinline__ void begin(const FragmentMatrix& w, int /*row_block*/, int /*begin*/,
                                        int /*end*/, int /*lane*/) {
    left_ = w.group_steps;
  }
  __device__ __forceinline__ void apply(int /*unit*/, uint32_t (&/*a*/)[4]) const {}
  __device__ __forceinline__ void advance(const FragmentMatrix& w) {
    if (--left_ > 0) return;
    left_ = w.group_steps;
    asm volatile("fence.acq_rel.cta;" ::: "memory");
  }
  __device__ __forceinline__ float factor(int /*i*/) const { return 1.0F; }

 private:
  int left_ = 0;
};

}  // namespace quantloom::cuda
