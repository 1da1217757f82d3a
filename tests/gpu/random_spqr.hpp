// Random codes, and the random planes of the format "spqr".
#pragma once

#include <cmath>
#include <string_view>
#include <vector>

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/spqr.hpp"

namespace quantloom {

// Rows of random codes of `bits` bits, below `limit`, the padding of each row zero.
template <class Draws>
void draw_codes(Draws& draws, Tensor& plane, int64_t count, int bits, int64_t limit) {
  if (plane.element_count() == 0) return;
  const auto words = static_cast<size_t>(plane.shape()[1]);
  const auto all = plane.values<uint32_t>();
  const int64_t used = count * bits % 32;
  std::vector<uint8_t> codes(static_cast<size_t>(limit < int64_t{1} << bits ? count : 0));
  for (size_t at = 0; at < all.size(); at += words) {
    if (!codes.empty()) {
      for (uint8_t& code : codes) code = static_cast<uint8_t>(draws.below(limit));
      pack_bits(codes, bits, all.subspan(at, words));
      continue;
    }
    for (size_t i = 0; i < words; ++i) all[at + i] = static_cast<uint32_t>(draws.word() >> 32);
    if (used != 0) all[at + words - 1] &= (1U << used) - 1U;
  }
}

// Grids of scales or of zero points: steps and zeros. If `exact`, scales and zero points are whole numbers,
// of scales times 2^lowest; the caller sees to it that products are exact. Else weights stay below 8.
template <class Draws>
void fill_grids(const Spqr& format, bool scales, bool exact, int lowest, Draws& draws, Tensor& plane) {
  const auto numbers = plane.values<uint16_t>();
  const float codes = std::ldexp(1.0F, format.bits);
  const float levels = std::ldexp(1.0F, scales ? format.scale_bits : format.zero_bits) + 2;
  for (size_t i = 0; i < numbers.size(); i += 2) {
    float step = scales ? std::ldexp(1.0F, lowest) : 1.0F;
    float zero = static_cast<float>(draws.below(3) - 1);
    if (!exact) {
      step = (0.2F + 0.8F * draws.uniform()) * (scales ? 3 / codes : codes) / levels;
      zero = 4 * draws.uniform() - 2;
    }
    numbers[i] = f16_from_float(step);
    numbers[i + 1] = f16_from_float(zero);
  }
}

// Fills the plane `name`, if it is one of scales or zero points.
template <class Draws>
bool fill_spqr(const Spqr& format, std::string_view name, int64_t n, bool exact, int lowest, Draws& draws,
               Tensor& plane) {
  if (name.ends_with("_grids")) {
    fill_grids(format, name == "scale_grids", exact, lowest, draws, plane);
  } else if (name == "scales" || name == "zeros") {
    const int bits = name == "scales" ? format.scale_bits : format.zero_bits;
    draw_codes(draws, plane, n, bits, int64_t{1} << bits);
  } else {
    return false;
  }
  return true;
}

}  // namespace quantloom
