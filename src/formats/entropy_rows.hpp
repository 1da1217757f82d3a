// Whole rows of a chunk with vectors: the same codes as the steps of entropy_rans.cpp and
// entropy_huffman.cpp.
#pragma once

#include "formats/entropy_coding.hpp"

namespace quantloom::entropy {

struct RansRows {
  const EntropyTables* tables = nullptr;  // with a fused table
  int bits = 0;
  const std::byte* words = nullptr;
  int64_t word_count = 0;
  int64_t next = 0;            // of the words; updated
  uint32_t* states = nullptr;  // [kLanes]; updated
  bool beyond = false;         // set if a code beyond the alphabet was spelled out
};

// Decodes rows of codes[0, count) while whole rows and the words for any codes are left; returns how many
// codes it decoded.
int64_t decode_rans_rows(RansRows& rows, uint8_t* codes, int64_t count);

struct HuffmanRows {
  const EntropyTables* tables = nullptr;
  int bits = 0;
  const std::byte* words = nullptr;
  int64_t word_count = 0;
  int64_t next = 0;             // of the words; updated
  uint32_t* windows = nullptr;  // [kLanes], the bits that each lane holds; updated
  uint32_t* held = nullptr;     // [kLanes], how many these are; updated
};

// The same for Huffman.
int64_t decode_huffman_rows(HuffmanRows& rows, uint8_t* codes, int64_t count);

}  // namespace quantloom::entropy
