#include "quantloom/formats/bit_packing.hpp"

#include <algorithm>

#include "formats/row_packing.hpp"

namespace quantloom {
namespace {

void require_bits(int bits, int most) {
  if (bits < 1 || bits > most) throw InvalidArgument("bits", text_of(bits), text_of("1 to ", most));
}

void require_words(std::span<uint32_t> words, int64_t count, int bits) {
  if (static_cast<int64_t>(words.size()) != packed_words(count, bits)) {
    throw InvalidArgument("words", text_of(words.size(), " words"),
                          text_of(packed_words(count, bits), " for ", count, " codes of ", bits, " bits"));
  }
}

void require_range(std::span<const uint32_t> words, int64_t first, int64_t count, int bits) {
  if (first < 0 || packed_words(checked_add(first, count), bits) > static_cast<int64_t>(words.size())) {
    throw InvalidArgument("codes", text_of("[", first, ", ", first, " + ", count, ") of ", bits, " bits"),
                          text_of("a range inside ", words.size(), " words"));
  }
}

uint8_t code_at(const uint32_t* words, int bits, int64_t index) {
  const int64_t bit = index * bits;
  const int64_t word = bit / 32;
  const int offset = static_cast<int>(bit % 32);
  uint32_t code = words[word] >> offset;
  // A code that crosses into the next word; never past the last word, as its bits end inside.
  if (offset + bits > 32) code |= words[word + 1] << (32 - offset);
  return static_cast<uint8_t>(code & ((1U << bits) - 1U));
}

// 32 codes fill exactly Bits words, so that all shifts are constants.
template <int Bits>
void unpack_block(const uint32_t* words, uint8_t* codes) {
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    const int word = i * Bits / 32;
    const int offset = i * Bits % 32;
    uint32_t code = words[word] >> offset;
    if (offset + Bits > 32) code |= words[word + 1] << (32 - offset);
    codes[i] = static_cast<uint8_t>(code & ((1U << Bits) - 1U));
  }
}

template <int Bits>
void pack_block(const uint8_t* codes, uint32_t* words) {
  for (int w = 0; w < Bits; ++w) words[w] = 0;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    const int word = i * Bits / 32;
    const int offset = i * Bits % 32;
    const uint32_t code = codes[i] & ((1U << Bits) - 1U);
    words[word] |= code << offset;
    if (offset + Bits > 32) words[word + 1] |= code >> (32 - offset);
  }
}

template <int Bits>
void pack_blocks(const uint8_t* codes, int64_t blocks, uint32_t* words) {
  for (int64_t b = 0; b < blocks; ++b) pack_block<Bits>(codes + b * 32, words + b * Bits);
}

template <int Bits>
void unpack_blocks(const uint32_t* words, int64_t blocks, uint8_t* codes) {
  for (int64_t b = 0; b < blocks; ++b) unpack_block<Bits>(words + b * Bits, codes + b * 32);
}

using PackBlocks = void (*)(const uint8_t*, int64_t, uint32_t*);
using UnpackBlocks = void (*)(const uint32_t*, int64_t, uint8_t*);
constexpr PackBlocks kPackBlocks[8] = {pack_blocks<1>, pack_blocks<2>, pack_blocks<3>, pack_blocks<4>,
                                       pack_blocks<5>, pack_blocks<6>, pack_blocks<7>, pack_blocks<8>};
constexpr UnpackBlocks kUnpackBlocks[8] = {unpack_blocks<1>, unpack_blocks<2>, unpack_blocks<3>,
                                           unpack_blocks<4>, unpack_blocks<5>, unpack_blocks<6>,
                                           unpack_blocks<7>, unpack_blocks<8>};

}  // namespace

void pack_bits(std::span<const uint8_t> codes, int bits, std::span<uint32_t> words) {
  require_bits(bits, 8);
  const auto count = static_cast<int64_t>(codes.size());
  require_words(words, count, bits);
  const int64_t blocks = count / 32;
  kPackBlocks[bits - 1](codes.data(), blocks, words.data());
  std::fill(words.begin() + blocks * bits, words.end(), 0U);
  for (int64_t i = blocks * 32; i < count; ++i) {
    const int64_t bit = i * bits;
    const int64_t word = bit / 32;
    const int offset = static_cast<int>(bit % 32);
    const uint32_t code = codes[static_cast<size_t>(i)] & ((1U << bits) - 1U);
    words[word] |= code << offset;
    if (offset + bits > 32) words[word + 1] |= code >> (32 - offset);
  }
}

void unpack_bits(std::span<const uint32_t> words, int bits, int64_t first, std::span<uint8_t> codes) {
  require_bits(bits, 8);
  const auto count = static_cast<int64_t>(codes.size());
  require_range(words, first, count, bits);
  int64_t i = 0;
  for (; i < count && (first + i) % 32 != 0; ++i) codes[i] = code_at(words.data(), bits, first + i);
  const int64_t blocks = (count - i) / 32;
  if (blocks > 0) {
    kUnpackBlocks[bits - 1](words.data() + (first + i) / 32 * bits, blocks, codes.data() + i);
    i += blocks * 32;
  }
  for (; i < count; ++i) codes[i] = code_at(words.data(), bits, first + i);
}

void pack_wide_bits(std::span<const uint16_t> codes, int bits, std::span<uint32_t> words) {
  require_bits(bits, 16);
  const auto count = static_cast<int64_t>(codes.size());
  require_words(words, count, bits);
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t window = 0;  // bits that are not stored yet
  int held = 0;
  size_t word = 0;
  for (const uint16_t code : codes) {
    window |= (code & mask) << held;
    held += bits;
    if (held < 32) continue;
    words[word++] = static_cast<uint32_t>(window);
    window >>= 32;
    held -= 32;
  }
  if (held > 0) words[word] = static_cast<uint32_t>(window);
}

void unpack_wide_bits(std::span<const uint32_t> words, int bits, int64_t first, std::span<uint16_t> codes) {
  require_bits(bits, 16);
  const auto count = static_cast<int64_t>(codes.size());
  require_range(words, first, count, bits);
  const uint32_t mask = (1U << bits) - 1U;
  int64_t bit = first * bits;
  for (uint16_t& code : codes) {
    const auto word = static_cast<size_t>(bit / 32);
    const int offset = static_cast<int>(bit % 32);
    uint64_t window = words[word];
    // Never past the last word, as a code's bits end inside.
    if (offset + bits > 32) window |= static_cast<uint64_t>(words[word + 1]) << 32;
    code = static_cast<uint16_t>((window >> offset) & mask);
    bit += bits;
  }
}

void pack_row_tile(const uint8_t* tile, int64_t columns, int bits, int64_t rows, uint32_t* words,
                   int64_t stride) {
  // Words of the 32 columns at hand, [word][row]; all rows of a tile advance together, so that every
  // shift is the same for all lanes of a vector.
  uint32_t block[8][kRowTile];
  const uint32_t mask = (1U << bits) - 1U;
  for (int64_t first = 0; first < columns; first += 32) {
    const int count = static_cast<int>(std::min<int64_t>(32, columns - first));
    for (int w = 0; w < bits; ++w) std::fill(block[w], block[w] + kRowTile, 0U);
    for (int i = 0; i < count; ++i) {
      const uint8_t* codes = tile + (first + i) * kRowTile;
      const int word = i * bits / 32;
      const int offset = i * bits % 32;
      for (int64_t r = 0; r < kRowTile; ++r) block[word][r] |= (codes[r] & mask) << offset;
      if (offset + bits > 32) {
        for (int64_t r = 0; r < kRowTile; ++r) block[word + 1][r] |= (codes[r] & mask) >> (32 - offset);
      }
    }
    const int64_t used = packed_words(count, bits);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t w = 0; w < used; ++w) words[r * stride + first / 32 * bits + w] = block[w][r];
    }
  }
}

}  // namespace quantloom
