// Scales and zero points of a group, as the lanes of a warp need them: those of eight rows each.
#pragma once

#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// The parameters of a lane, as they are stored, loaded ahead of their use; float32 scales, which are twice as
// long, only when they are used.
struct RawParameters {
  uint4 scales;
  uint2 zeros;

  // `at`: the first of the lane's eight parameters, a multiple of 8.
  __device__ __forceinline__ void load(const FragmentMatrix& w, int64_t at) {
    if (w.scale_dtype != DType::f32) scales = __ldg(static_cast<const uint4*>(w.scales) + at / 8);
    if (w.zeros != nullptr) zeros = __ldg(reinterpret_cast<const uint2*>(w.zeros + at));
  }

  // Scale of row `i` of the lane's eight: lane / 4 + 8 * i.
  __device__ __forceinline__ float scale(const FragmentMatrix& w, int64_t at, int i) const {
    if (w.scale_dtype == DType::f32) return __ldg(static_cast<const float*>(w.scales) + at + i);
    const uint32_t word = i / 2 == 0 ? scales.x : i / 2 == 1 ? scales.y : i / 2 == 2 ? scales.z : scales.w;
    if (w.scale_dtype == DType::bf16) return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
    return __half2float(
        __ushort_as_half(static_cast<unsigned short>(i % 2 == 0 ? word & 0xFFFFU : word >> 16)));
  }

  __device__ __forceinline__ float zero(int i) const {
    const uint32_t word = i < 4 ? zeros.x : zeros.y;
    return static_cast<float>((word >> (i % 4 * 8)) & 0xFFU);
  }
};

}  // namespace quantloom::cuda
