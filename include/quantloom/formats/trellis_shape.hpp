// What a trellis is made of, in plain numbers that host and device code share: the codebooks by name, and
// the geometry of a ring.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUANTLOOM_TRELLIS __host__ __device__ constexpr
#else
#define QUANTLOOM_TRELLIS constexpr
#endif

namespace quantloom {

// How a state becomes weights. QTIP (Tseng et al. 2024) calls the first 3INST, the fourth 1MAD.
enum class TrellisCode : uint8_t {
  lcg,      // 89226354 s + 64248484, masked to two float16 numbers that are added
  mcg,      // the same with multiplier * s and no addition
  mul1,     // multiplier * s, the sum of its four bytes by one float16 FMA
  one_mad,  // 34038481 s + 76625530, the sum of its four bytes, less 510, over 147.800537109375
  hyb,      // s^2 + s looks up a pair in a table of 512, one bit of it turns a sign
  table,    // the state looks up its weights: 2^window entries
  octagon,  // the four bytes of multiplier * s are steps along axes at 0, 90, 45, 135 degrees: two weights
};

// A ring of `length` weights. Each step takes weights_per_step weights from a state of `window` bits, and
// adds weights_per_step * half_bits / 2 fresh bits to the next state; at half-integer rates with one weight
// per step, odd steps (the second, the fourth, ...) take the extra bit. The state of a step is the `window`
// bits of the ring that end where the step's fresh bits end, the first one most significant, around the
// ring's end.
struct TrellisShape {
  int window = 16;           // 1 ... 24
  int half_bits = 4;         // bits per weight, in halves: 2 ... 16
  int weights_per_step = 1;  // 1 or 2
  int length = 256;          // weights; a multiple of 2 * weights_per_step

  QUANTLOOM_TRELLIS int steps() const { return length / weights_per_step; }
  // The fresh bits of steps 0 ... step - 1.
  QUANTLOOM_TRELLIS int first_bit(int step) const { return step * half_bits * weights_per_step / 2; }
  QUANTLOOM_TRELLIS int step_bits(int step) const { return first_bit(step + 1) - first_bit(step); }
  QUANTLOOM_TRELLIS int ring_bits() const { return first_bit(steps()); }
  // 32-bit words of a ring; rings of 256 weights fill them.
  QUANTLOOM_TRELLIS int words() const { return (ring_bits() + 31) / 32; }
  friend constexpr bool operator==(const TrellisShape&, const TrellisShape&) = default;
};

}  // namespace quantloom
