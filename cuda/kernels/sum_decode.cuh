// The decode loop (decode_loop.cuh) for decoders of sums, which float16 does not hold: values are float32
// sums times their scale, rounded once.
#pragma once

#include "formats/sum_fragments.cuh"
#include "kernels/decode_loop.cuh"

namespace quantloom::cuda {

// Taken by decode_fragments() in the place of the one for decoders whose values are float16.
template <class Decoder, class Out, int kHalf>
requires Decoder::kSums __device__ __forceinline__ void decode_half(
    const FragmentMatrix& w, const Decoder& decoder, const uint4 (&pieces)[Decoder::kBits],
    const RawParameters (&parameters)[2], int lane, int64_t rows, Out* out, int64_t stride) {
  float scales[2][8];
#pragma unroll
  for (int step = 0; step < 2; ++step) parameters[step].all_scales(w.scale_dtype, scales[step]);
#pragma unroll
  for (int unit = 0; unit < fragments::kUnits; ++unit) {
    uint32_t words[Decoder::kBits];
    words_of_unit<Decoder::kBits>(pieces, unit, words);
    float2 sums[2][4];
    decoder.template sums<2 * kHalf>(words, sums[0]);
    decoder.template sums<2 * kHalf + 1>(words, sums[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 2 * unit + r;
      float values[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          values[step][2 * j] = __fmul_rn(scales[step][i], sums[step][r + 2 * j].x);
          values[step][2 * j + 1] = __fmul_rn(scales[step][i], sums[step][r + 2 * j].y);
        }
      }
      store_steps(values, out + (8 * i) * stride + 32 * kHalf, lane, 8 * i < rows);
    }
  }
}

}  // namespace quantloom::cuda
