#include <algorithm>
#include <atomic>
#include <bit>

#include "quantloom/checked_math.hpp"
#include "quantloom/formats/elements.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kPieceWords = 4096;

// How codes below `count` lie in words of 64 bits.
struct CodeLayout {
  explicit CodeLayout(uint64_t count) : base(count) {
    if (count < 1 || count > (uint64_t{1} << 32)) {
      throw InvalidArgument("count", text_of(count), "1 to 2^32");
    }
    width = std::max(1, static_cast<int>(std::bit_width(count - 1)));
    if (std::has_single_bit(count)) return;
    uint64_t power = 1;
    while (power <= UINT64_MAX / count) {
      power *= count;
      ++per_word;
    }
    if (per_word * width <= 64) per_word = 0;
  }
  int64_t words(int64_t codes) const {
    return per_word > 0 ? ceil_div(codes, per_word) : ceil_div(checked_mul(codes, width), 64);
  }

  uint64_t base;
  int width = 0;     // bits of a code in the dense stream
  int per_word = 0;  // codes in a word of numbers in base `base`; 0: dense stream
};

void write_word(uint64_t word, uint8_t* out) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}

uint64_t read_word(const uint8_t* bytes) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

}  // namespace

int64_t packed_code_bytes(int64_t codes, uint64_t count) {
  if (codes < 0) throw InvalidArgument("codes", text_of(codes), "a number >= 0");
  return checked_mul(CodeLayout(count).words(codes), 8);
}

void pack_codes(std::span<const uint32_t> codes, uint64_t count, std::span<uint8_t> out, int threads) {
  const CodeLayout layout(count);
  const auto total = static_cast<int64_t>(codes.size());
  const int64_t words = layout.words(total);
  if (static_cast<int64_t>(out.size()) != words * 8) {
    throw InvalidArgument("out", text_of(out.size(), " bytes"), text_of(words * 8));
  }
  std::atomic<bool> bad = false;
  parallel_for(ceil_div(words, kPieceWords), threads, [&](int64_t piece) {
    bool piece_bad = false;
    for (int64_t w = piece * kPieceWords; w < std::min(words, (piece + 1) * kPieceWords); ++w) {
      uint64_t word = 0;
      if (layout.per_word > 0) {
        const int64_t first = w * layout.per_word;
        for (int64_t i = std::min<int64_t>(total, first + layout.per_word) - 1; i >= first; --i) {
          piece_bad |= codes[static_cast<size_t>(i)] >= count;
          word = word * layout.base + codes[static_cast<size_t>(i)];
        }
      } else {
        for (int64_t i = w * 64 / layout.width; i < total && i * layout.width < (w + 1) * 64; ++i) {
          const uint64_t code = codes[static_cast<size_t>(i)];
          piece_bad |= code >= count;
          const int64_t shift = i * layout.width - w * 64;
          word |= shift >= 0 ? code << shift : code >> -shift;
        }
      }
      write_word(word, out.data() + w * 8);
    }
    if (piece_bad) bad = true;
  });
  if (bad) throw InvalidArgument("codes", "one that is too large", text_of("codes below ", count));
}

void unpack_codes(std::span<const uint8_t> bytes, uint64_t count, std::span<uint32_t> codes, int threads) {
  const CodeLayout layout(count);
  const auto total = static_cast<int64_t>(codes.size());
  const int64_t words = layout.words(total);
  if (static_cast<int64_t>(bytes.size()) != words * 8) {
    throw InvalidArgument("codes", text_of(bytes.size(), " bytes"), text_of(words * 8));
  }
  std::atomic<bool> bad = false;
  const int64_t piece_codes = kPieceWords * (layout.per_word > 0 ? layout.per_word : 64 / layout.width);
  parallel_for(ceil_div(total, piece_codes), threads, [&](int64_t piece) {
    bool piece_bad = false;
    const int64_t first = piece * piece_codes;
    const int64_t end = std::min(total, first + piece_codes);
    if (layout.per_word > 0) {
      for (int64_t i = first; i < end;) {
        uint64_t word = read_word(bytes.data() + i / layout.per_word * 8);
        for (int j = 0; j < layout.per_word && i < end; ++j, ++i) {
          codes[static_cast<size_t>(i)] = static_cast<uint32_t>(word % layout.base);
          word /= layout.base;
        }
        piece_bad |= word != 0;
      }
    } else if (64 % layout.width == 0) {
      const uint64_t mask = (uint64_t{1} << layout.width) - 1;
      const int in_word = 64 / layout.width;
      for (int64_t i = first; i < end;) {
        uint64_t word = read_word(bytes.data() + i / in_word * 8);
        for (int j = 0; j < in_word && i < end; ++j, ++i, word >>= layout.width) {
          const uint64_t code = word & mask;
          piece_bad |= code >= count;
          codes[static_cast<size_t>(i)] = static_cast<uint32_t>(code);
        }
      }
    } else {
      const uint64_t mask = (uint64_t{1} << layout.width) - 1;
      for (int64_t i = first; i < end; ++i) {
        const int64_t bit = i * layout.width;
        uint64_t code = read_word(bytes.data() + bit / 64 * 8) >> (bit % 64);
        if (bit % 64 + layout.width > 64)
          code |= read_word(bytes.data() + bit / 64 * 8 + 8) << (64 - bit % 64);
        code &= mask;
        piece_bad |= code >= count;
        codes[static_cast<size_t>(i)] = static_cast<uint32_t>(code);
      }
    }
    if (piece_bad) bad = true;
  });
  if (bad) throw InvalidArgument("codes", "one that is too large", text_of("codes below ", count));
}

}  // namespace quantloom
