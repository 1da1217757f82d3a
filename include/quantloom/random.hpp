// Counter-based random numbers: the value at (seed, index) is a pure function, so that streams need no
// state and do not depend on the order or the number of threads. Philox4x32-10 (Salmon et al., SC'11).
#pragma once

#include <array>
#include <cstdint>

namespace quantloom {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

class CounterRandom {
 public:
  explicit CounterRandom(uint64_t seed) : seed_(seed) {}
  uint64_t bits(uint64_t index) const;                   // uniform over all 64-bit values
  double uniform(uint64_t index) const;                  // in [0, 1), 53 bits
  double normal(uint64_t index) const;                   // standard normal (Box-Muller)
  uint64_t below(uint64_t index, uint64_t bound) const;  // in [0, bound), bound > 0

 private:
  uint64_t seed_;
};

}  // namespace quantloom
