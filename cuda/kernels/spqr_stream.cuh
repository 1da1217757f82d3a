// "spqr_stream", "spqr_partials": the streaming loop (stream_loop.cuh) with the walk of the format "spqr".
#pragma once

#include "kernels/spqr_product.hpp"
#include "kernels/spqr_walk.cuh"
#include "kernels/spqr_walk_tokens.cuh"
#include "kernels/stream_loop.cuh"

namespace quantloom::cuda {

template <int kBits, bool kWide, class T>
void launch_spqr_stream_of(const ProductLaunch& launch) {
  constexpr bool kFew = spqr_few_warps(kBits);
  if (launch.arguments.m == 1) {
    launch_stream_kernel<SpqrFragments<kBits, kWide, 1, kFew>, T, 1, true, kFew>(launch);
  } else {
    launch_stream_kernel<SpqrFragments<kBits, kWide, 8, kFew>, T, 8, true, kFew>(launch);
  }
}

template <int kBits>
void launch_spqr_stream(const ProductLaunch& launch, bool wide) {
  if (launch.dtype == DType::f16) {
    wide ? launch_spqr_stream_of<kBits, true, __half>(launch)
         : launch_spqr_stream_of<kBits, false, __half>(launch);
  } else {
    wide ? launch_spqr_stream_of<kBits, true, __nv_bfloat16>(launch)
         : launch_spqr_stream_of<kBits, false, __nv_bfloat16>(launch);
  }
}

}  // namespace quantloom::cuda
