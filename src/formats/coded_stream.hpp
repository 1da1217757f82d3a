// One stream of a CodedMatrix: the order of its codes, bits and words.
//
// A stream holds blocks of 16 rows x 32 columns. In each, lane 4 g + t has columns 8 t to 8 t + 7 of the rows
// g (state 0) and g + 8 (state 1): four pairs each. A step decodes one pair with either state, the first one
// reading its bits first. Behind the last step nothing is read.
//
// Words: the bits of the lane that reads the fewest, and the width of what the others read beyond that << 27;
// the lanes' excesses in so many bits; the states, of table_bits bits, state 0 of a lane before state 1; the
// bits of each lane that fill no word, in the order in which they are read from the highest one; whole words;
// escaped pairs, from the end of the stream backwards, two in a word.
// Packed numbers begin in the lowest bits of their words.
//
// A lane holds three words, of which a step reads the first two, and takes another one when it has read a
// word to its end. Whole words are in the order in which lanes take them: their first ones where no bits were
// left over, their second ones, their third ones, then step by step; lanes in order each time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "formats/pair_states.hpp"
#include "quantloom/formats/coded_matrix.hpp"

namespace quantloom::coded {

inline constexpr int kStates = 2;
inline constexpr int kPairs = 4;  // of a state in a block
inline constexpr int kLengthBits = 27;

// Codes as a stream sees them: 16 rows of whole blocks, `stride` codes between rows.
std::vector<uint32_t> encode_stream(const uint8_t* codes, int64_t stride, int64_t blocks,
                                    const PairEncoder& encoder, int table_bits);

// The inverse. Reads nothing outside `words` and returns a reason if they are not those of an encoder, else
// nullptr.
const char* decode_stream(std::span<const uint32_t> words, std::span<const uint32_t> table, int table_bits,
                          int64_t blocks, uint8_t* codes, int64_t stride);

}  // namespace quantloom::coded
