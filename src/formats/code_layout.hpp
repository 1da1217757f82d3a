// How codes below a number lie in words of 64 bits: a dense stream of their bits, or numbers in that base.
#pragma once

#include <cstdint>

namespace quantloom {

class CodeLayout {
 public:
  // count: 1 to 2^32. Throws InvalidArgument.
  explicit CodeLayout(uint64_t count);

  int64_t words(int64_t codes) const;
  // Codes of a piece of work, which fill whole words: at most kPieceCodes.
  static constexpr int64_t kPieceCodes = 4096;
  int64_t piece_codes() const;

  // words(count) * 8 bytes. False if a code is too large; the bytes are unspecified then.
  bool pack(const uint32_t* codes, int64_t count, uint8_t* bytes) const;
  // `count` codes from the first of a word. False if one is too large; the codes are unspecified then.
  bool unpack(const uint8_t* bytes, int64_t count, uint32_t* codes) const;

 private:
  bool unpack_numbers(const uint8_t* bytes, int64_t count, uint32_t* codes) const;

  uint64_t base_;
  int width_ = 0;            // bits of a code in the dense stream
  int per_word_ = 0;         // codes in a word of numbers in base `base_`; 0: dense stream
  int per_chunk_ = 0;        // codes whose numbers are below 2^32
  uint64_t chunk_ = 1;       // base_^per_chunk_
  uint64_t reciprocal_ = 0;  // ceil(2^64 / base_)
};

}  // namespace quantloom
