// Settings of run-time dispatch, to be included before any header of Highway: every source with SIMD loops
// and every test that walks through the instruction sets must see the same list.
#pragma once

// Instruction sets of AVX-512 with VNNI and VBMI, which Highway leaves out unless asked.
#ifndef HWY_WANT_AVX3_DL
#define HWY_WANT_AVX3_DL
#endif
// The loops hold vectors in arrays, which vectors of unknown size cannot be: such processors run the
// fixed-size code (NEON, or portable on RISC-V).
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)

#include <hwy/targets.h>
