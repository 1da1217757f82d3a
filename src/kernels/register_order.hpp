// Integers in the order in which they become register operands of the tensor cores of a CUDA device
// ("register order"): weights of 4 bits and less, and weights with scales for groups of columns.
//
// A matrix [n, k] is stored as [ceil(n/64), ceil(k/128)] records, each of 64 rows and 128 columns: codes,
// then what the groups of these columns need. Codes lie as the four warps of a warpgroup hold a matrix of 64
// x 32 (m64k32 of wgmma): thread t of the 128 has, of step s of 32 columns, rows g and g + 8 of its warp's 16
// and the columns 4 q ... and 16 + 4 q ..., g = t % 32 / 4, q = t % 4. A record's codes are
//   of a byte   [4 steps, 128 threads, 16 bytes]
//   of 4 bits   [2 pairs of steps, 128 threads, 16 bytes]: bytes with row g in the low half, g + 8 in the
//   high
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUANTLOOM_BOTH __host__ __device__
#else
#define QUANTLOOM_BOTH
#endif

namespace quantloom::registers {

inline constexpr int kRows = 64;      // of a record
inline constexpr int kColumns = 128;  // of a record
inline constexpr int kThreads = 128;

struct CodePlace {
  int byte;   // in the record
  int shift;  // of the lowest bit
};

// Where the code of a row and a column of a record lies.
QUANTLOOM_BOTH constexpr CodePlace place_of_code(int row, int column, bool nibbles) {
  const int step = column / 32;
  const int half = column % 32 / 16;
  const int thread = row / 16 * 32 + row % 8 * 4 + column % 16 / 4;
  const int lower = row % 16 / 8;  // of rows g and g + 8
  if (nibbles) {
    return {(step / 2 * kThreads + thread) * 16 + (step % 2 * 2 + half) * 4 + column % 4, 4 * lower};
  }
  return {(step * kThreads + thread) * 16 + (2 * half + lower) * 4 + column % 4, 0};
}

QUANTLOOM_BOTH constexpr int code_bytes(bool nibbles) {
  return nibbles ? 4096 : 8192;
}

// What follows the codes: for each run of `step` columns with one scale (steps to a record), a float32 for
// each row, or pairs of it and a word.
QUANTLOOM_BOTH constexpr int place_of_term(int row, int step, bool nibbles, bool pairs) {
  return code_bytes(nibbles) + (step * kRows + row) * (pairs ? 8 : 4);
}
QUANTLOOM_BOTH constexpr int record_bytes(bool nibbles, int steps, bool pairs) {
  return place_of_term(0, steps, nibbles, pairs);
}

}  // namespace quantloom::registers

#undef QUANTLOOM_BOTH
