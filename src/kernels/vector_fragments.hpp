// The scalar reference of vector codes in fragment order.
#pragma once

#include <span>

#include "kernels/fragment_layout.hpp"

namespace quantloom {

// From the codes of packed rows to the words of the plane "codes", and back. `source`: empty unless
// layout.gathered.
void prepare_vector_codes(const FragmentLayout& layout, std::span<const uint32_t> codes,
                          std::span<const int32_t> source, std::span<uint32_t> words);
void unprepare_vector_codes(const FragmentLayout& layout, std::span<const uint32_t> words,
                            std::span<const int32_t> source, std::span<uint32_t> codes);

}  // namespace quantloom
