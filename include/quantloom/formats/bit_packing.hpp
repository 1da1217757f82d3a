// Packs unsigned codes of 1 to 8 bits into a dense stream of 32-bit words: code i occupies bits
// [i*bits, (i+1)*bits) of the stream, counted from the lowest bit of word 0. Unused top bits are 0.
#pragma once

#include <cstdint>
#include <span>

#include "quantloom/checked_math.hpp"

namespace quantloom {

// Words that `count` codes take: ceil(count * bits / 32).
inline int64_t packed_words(int64_t count, int bits) {
  return ceil_div(checked_mul(count, bits), 32);
}

// codes: values below 2^bits (higher bits are ignored). words: packed_words(codes.size(), bits).
void pack_bits(std::span<const uint8_t> codes, int bits, std::span<uint32_t> words);
// Unpacks codes [first, first + codes.size()) of the stream.
void unpack_bits(std::span<const uint32_t> words, int bits, int64_t first, std::span<uint8_t> codes);
// The same for codes of 1 to 16 bits.
void pack_wide_bits(std::span<const uint16_t> codes, int bits, std::span<uint32_t> words);
void unpack_wide_bits(std::span<const uint32_t> words, int bits, int64_t first, std::span<uint16_t> codes);

}  // namespace quantloom
