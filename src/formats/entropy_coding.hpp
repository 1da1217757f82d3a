// One chunk of an entropy coded stream: the order of codes and words that encoders and decoders share.
//
// Codes are dealt to 32 lanes in rows of 128: lane l holds codes 4l to 4l + 3 of each row, so that a warp
// stores four codes per lane at once. The lanes decode their first code, then their second, and so on; at
// each step the lanes that need a word take the next ones, in the order of the lanes.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "quantloom/formats/entropy.hpp"

namespace quantloom::entropy {

inline constexpr int kLanes = 32;
inline constexpr int kRun = 4;
inline constexpr int64_t kRow = kLanes * kRun;

// rANS: states are in [2^16, 2^32) between steps.
inline constexpr uint32_t kLowestState = uint32_t{1} << 16;
// The state in which a lane begins to encode, and which its decoder reaches at the end, may hold 16 bits of
// data beside its leading one. The last codes of a chunk are coded into these 32 words by two lanes more.
inline constexpr int64_t kTailLanes = 2;
inline constexpr int64_t kTailWords = 32;
inline constexpr int64_t kLongestTail = 256;
// The number of tail codes, the bit lengths of the states above their low words, the low words.
inline constexpr int64_t kHeadWords = 1 + 8 + kLanes;

struct RansModel {
  int bits = 0;
  int32_t escape = -1;  // the code that stands for all with frequency 0
  int escape_bits = 0;  // in which those are spelled out
  std::vector<uint32_t> frequency;
  std::vector<uint32_t> start;  // the first slot of each code
};
RansModel rans_model(std::span<const uint32_t> frequencies, int bits, int32_t escape);
// Bits that spell out a code below `alphabet`.
int bits_of_alphabet(int64_t alphabet);

struct HuffmanModel {
  int longest = 0;
  std::vector<uint32_t> length;
  std::vector<uint32_t> code;  // its first bit highest
  size_t single = 0;           // with longest = 0, the only code
};
// Lengths must make a complete code, or be a single 1 with longest = 0.
HuffmanModel huffman_model(std::span<const uint32_t> lengths, int longest);

EntropyTables rans_tables(const RansModel& model);
EntropyTables huffman_tables(const HuffmanModel& model);

// Codes must have a frequency (a length) above 0, but for rANS with an escape.
template <class Code>
std::vector<uint16_t> encode_rans(std::span<const Code> codes, const RansModel& model);
template <class Code>
std::vector<uint16_t> encode_huffman(std::span<const Code> codes, const HuffmanModel& model);

// Words at any alignment. `chunk` is for messages. Each throws FileFormatError for words that no encoder
// writes.
template <class Code>
void decode_rans(std::span<const std::byte> words, const EntropyTables& tables, int bits, int64_t chunk,
                 std::span<Code> codes);
template <class Code>
void decode_huffman(std::span<const std::byte> words, const EntropyTables& tables, int bits, int64_t chunk,
                    std::span<Code> codes);

inline uint32_t load_word(const std::byte* words, int64_t i) {
  uint16_t word = 0;
  std::memcpy(&word, words + 2 * i, sizeof(word));
  return word;
}

[[noreturn]] void refuse_chunk(int64_t chunk, const char* why);

}  // namespace quantloom::entropy
