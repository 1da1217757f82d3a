// How streams store the model of their coder: numbers that change little from one code to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/formats/entropy.hpp"

namespace quantloom::entropy {

std::vector<std::byte> pack_model(std::span<const uint32_t> model, EntropyCoder coder);
// The inverse; `alphabet` numbers. Throws FileFormatError for bytes that pack_model() does not write.
std::vector<uint32_t> unpack_model(std::span<const std::byte> bytes, int64_t alphabet, EntropyCoder coder);
// As version 1 of the stream had them: groups of 7 bits, lowest first, the highest bit set in all but the
// last.
std::vector<uint32_t> unpack_model_1(std::span<const std::byte> bytes, int64_t alphabet);

}  // namespace quantloom::entropy
