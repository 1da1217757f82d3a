#include "quantloom/random.hpp"

#include <cmath>
#include <numbers>

#include "quantloom/error.hpp"

namespace quantloom {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53;
  constexpr uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9;
  constexpr uint32_t kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0];
    const uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

namespace {

std::array<uint32_t, 4> block(uint64_t seed, uint64_t index) {
  return philox4x32({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0},
                    {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

uint64_t join(uint32_t low, uint32_t high) {
  return (static_cast<uint64_t>(high) << 32) | low;
}
double unit(uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace

uint64_t CounterRandom::bits(uint64_t index) const {
  const auto words = block(seed_, index);
  return join(words[0], words[1]);
}

double CounterRandom::uniform(uint64_t index) const {
  return unit(bits(index));
}

double CounterRandom::normal(uint64_t index) const {
  const auto words = block(seed_, index);
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit(join(words[0], words[1]))));
  return radius * std::cos(2.0 * std::numbers::pi * unit(join(words[2], words[3])));
}

uint64_t CounterRandom::below(uint64_t index, uint64_t bound) const {
  if (bound == 0) throw InvalidArgument("bound", "0", "a positive bound");
  // The high half of a 128-bit product; the bias is below bound / 2^64.
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits(index)) * bound) >> 64);
}

}  // namespace quantloom
