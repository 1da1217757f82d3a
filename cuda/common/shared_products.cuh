// Warpgroup products (wgmma, sm_90a) of operands in shared memory, each as rows of 128 bytes in integer
// order (src/activations/integer_order.hpp): 64 rows of weights times kTokens tokens; or of weights in
// registers, in register order (src/kernels/register_order.hpp). See warpgroup.cuh for
// what brackets them.
//
// A lane's sums: of rows g and g + 8 of its warp's 16 (g = lane / 4) and tokens 8 j + 2 t and + 1 (t = lane %
// 4), those of (g, first), (g, second), (g + 8, first), (g + 8, second) lie at 4 j.
#pragma once

#include "common/warpgroup.cuh"

namespace quantloom::cuda {

__device__ __forceinline__ void hold(int& sum) {
  asm volatile("" : "+r"(sum)::"memory");
}

#define QUANTLOOM_NAMES_4 "%0, %1, %2, %3"
#define QUANTLOOM_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QUANTLOOM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QUANTLOOM_NAMES_32                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QUANTLOOM_NAMES_64                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QUANTLOOM_NAMES_128                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QUANTLOOM_SUMS_4(kind, i) kind(sum[i]), kind(sum[(i) + 1]), kind(sum[(i) + 2]), kind(sum[(i) + 3])
#define QUANTLOOM_SUMS_8(kind, i) QUANTLOOM_SUMS_4(kind, i), QUANTLOOM_SUMS_4(kind, (i) + 4)
#define QUANTLOOM_SUMS_16(kind, i) QUANTLOOM_SUMS_8(kind, i), QUANTLOOM_SUMS_8(kind, (i) + 8)
#define QUANTLOOM_SUMS_32(kind, i) QUANTLOOM_SUMS_16(kind, i), QUANTLOOM_SUMS_16(kind, (i) + 16)
#define QUANTLOOM_SUMS_64(kind, i) QUANTLOOM_SUMS_32(kind, i), QUANTLOOM_SUMS_32(kind, (i) + 32)
#define QUANTLOOM_SUMS_128(kind, i) QUANTLOOM_SUMS_64(kind, i), QUANTLOOM_SUMS_64(kind, (i) + 64)
// `place`, `next`, `last`: the numbers of the operands after the sums.
#define QUANTLOOM_PRODUCT(shape, types, kind, count, place, next, last, tail)               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #last                                   \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned." shape "." types " {" QUANTLOOM_NAMES_##count \
               "}, %" #place ", %" #next ", p" tail ";\n}"                                  \
               : QUANTLOOM_SUMS_##count(kind, 0)                                            \
               : "l"(w), "l"(x), "r"(add))
#define QUANTLOOM_INTEGERS(tokens, count, place, next, last) \
  QUANTLOOM_PRODUCT("m64n" #tokens "k32", "s32.s8.s8", "+r", count, place, next, last, "")
#define QUANTLOOM_HALVES(tokens, count, place, next, last) \
  QUANTLOOM_PRODUCT("m64n" #tokens "k16", "f32.f16.f16", "+r", count, place, next, last, ", 1, 1, 0, 0")
#define QUANTLOOM_PRODUCTS(kernel)                           \
  if constexpr (kTokens == 8) kernel(8, 4, 4, 5, 6);         \
  if constexpr (kTokens == 16) kernel(16, 8, 8, 9, 10);      \
  if constexpr (kTokens == 32) kernel(32, 16, 16, 17, 18);   \
  if constexpr (kTokens == 64) kernel(64, 32, 32, 33, 34);   \
  if constexpr (kTokens == 128) kernel(128, 64, 64, 65, 66); \
  if constexpr (kTokens == 256) kernel(256, 128, 128, 129, 130)

// sum = w x, plus sum if `add` is not 0: 32 columns of int8, from the descriptors' places on.
template <int kTokens>
__device__ __forceinline__ void multiply_integers(int (&sum)[kTokens / 2], uint64_t w, uint64_t x, int add) {
  QUANTLOOM_PRODUCTS(QUANTLOOM_INTEGERS);
}
// The same of 16 columns of float16.
template <int kTokens>
__device__ __forceinline__ void multiply_halves(int (&sum)[kTokens / 2], uint64_t w, uint64_t x, int add) {
  QUANTLOOM_PRODUCTS(QUANTLOOM_HALVES);
}

// sum = w x, plus sum if `add` is not 0: 32 columns of int8, `w` being a thread's part of 64 x 32 weights.
#define QUANTLOOM_OF_REGISTERS(tokens, count, w0, w1, w2, w3, place, last)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #last                                            \
               ", 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.s8.s8 {" QUANTLOOM_NAMES_##count \
               "}, {%" #w0 ", %" #w1 ", %" #w2 ", %" #w3 "}, %" #place ", p;\n}"                     \
               : QUANTLOOM_SUMS_##count("+r", 0)                                                     \
               : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(add))
template <int kTokens>
__device__ __forceinline__ void multiply_registers(int (&sum)[kTokens / 2], const uint32_t (&w)[4],
                                                   uint64_t x, int add) {
  if constexpr (kTokens == 16) QUANTLOOM_OF_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13);
  if constexpr (kTokens == 32) QUANTLOOM_OF_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21);
  if constexpr (kTokens == 64) QUANTLOOM_OF_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37);
  if constexpr (kTokens == 128) QUANTLOOM_OF_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69);
  if constexpr (kTokens == 256) QUANTLOOM_OF_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133);
}

#undef QUANTLOOM_OF_REGISTERS
#undef QUANTLOOM_PRODUCTS
#undef QUANTLOOM_HALVES
#undef QUANTLOOM_INTEGERS
#undef QUANTLOOM_PRODUCT
#undef QUANTLOOM_SUMS_128
#undef QUANTLOOM_NAMES_128
#undef QUANTLOOM_SUMS_64
#undef QUANTLOOM_NAMES_64
#undef QUANTLOOM_SUMS_32
#undef QUANTLOOM_NAMES_32
#undef QUANTLOOM_SUMS_16
#undef QUANTLOOM_NAMES_16
#undef QUANTLOOM_SUMS_8
#undef QUANTLOOM_NAMES_8
#undef QUANTLOOM_SUMS_4
#undef QUANTLOOM_NAMES_4

}  // namespace quantloom::cuda
