// Scales and zero points of a group, as the lanes of a warp need them: those of eight rows each.
#pragma once

#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// The raw bytes of a lane's parameters, loaded ahead of their use.
struct RawParameters {
  uint4 scales[2];  // the second only for float32
  uint2 zeros;

  // `at`: the first of the lane's eight parameters, a multiple of 8.
  __device__ __forceinline__ void load(const FragmentMatrix& w, int64_t at) {
    const auto* pieces = static_cast<const uint4*>(w.scales);
    if (w.scale_dtype == DType::f32) {
      scales[0] = __ldg(pieces + at / 4);
      scales[1] = __ldg(pieces + at / 4 + 1);
    } else {
      scales[0] = __ldg(pieces + at / 8);
    }
    if (w.zeros != nullptr) zeros = __ldg(reinterpret_cast<const uint2*>(w.zeros + at));
  }

  // Scale of row `i` of the lane's eight: lane / 4 + 8 * i.
  __device__ __forceinline__ float scale(DType dtype, int i) const {
    const uint32_t words[8] = {scales[0].x, scales[0].y, scales[0].z, scales[0].w,
                               scales[1].x, scales[1].y, scales[1].z, scales[1].w};
    if (dtype == DType::f32) return __uint_as_float(words[i]);
    const uint32_t half = i % 2 == 0 ? words[i / 2] & 0xFFFFU : words[i / 2] >> 16;
    if (dtype == DType::bf16) return __uint_as_float(half << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  }

  // All eight, with one look at the type.
  __device__ __forceinline__ void all_scales(DType dtype, float (&all)[8]) const {
    if (dtype == DType::f16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) all[i] = scale(DType::f16, i);
    } else if (dtype == DType::bf16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) all[i] = scale(DType::bf16, i);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) all[i] = scale(DType::f32, i);
    }
  }

  __device__ __forceinline__ float zero(int i) const {
    const uint32_t word = i < 4 ? zeros.x : zeros.y;
    return static_cast<float>((word >> (i % 4 * 8)) & 0xFFU);
  }
};

}  // namespace quantloom::cuda
