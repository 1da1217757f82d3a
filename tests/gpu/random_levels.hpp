// Random codes into levels of scales and tables of the format "additive".
#pragma once

#include <string>
#include <vector>

#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {

// Each row of the plane is a stream.
template <class Draws>
void draw_level_codes(Draws& draws, const Additive& format, const std::string& name, int64_t k,
                      Tensor& plane) {
  const bool scales = name == "scale_codes";
  const int bits = scales ? format.levels.scale_bits : format.levels.table_bits;
  const auto words = static_cast<size_t>(plane.shape()[1]);
  std::vector<uint16_t> codes(
      static_cast<size_t>(scales ? format.scale_count(k) : format.entries() * format.dim()));
  for (size_t at = 0; at < plane.values<uint32_t>().size(); at += words) {
    for (uint16_t& code : codes) code = static_cast<uint16_t>(draws.below(int64_t{1} << bits));
    pack_wide_bits(codes, bits, plane.values<uint32_t>().subspan(at, words));
  }
}

}  // namespace quantloom
