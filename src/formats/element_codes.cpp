#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <utility>

#include "formats/code_layout.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/elements.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

void write_word(uint64_t word, uint8_t* out) {
  if constexpr (std::endian::native == std::endian::little) {
    std::memcpy(out, &word, 8);
  } else {
    for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

uint64_t read_word(const uint8_t* bytes) {
  uint64_t word = 0;
  if constexpr (std::endian::native == std::endian::little) {
    std::memcpy(&word, bytes, 8);
  } else {
    for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  }
  return word;
}

// The dense stream: 64 codes fill `width` words.
constexpr int kGroup = 64;

// Calls body(std::integral_constant<int, i>()) for i from 0 to kGroup - 1: all shifts are constants.
template <class Body>
void for_group(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
  }
  (std::make_integer_sequence<int, kGroup>());
}

template <int kWidth>
void pack_group(const uint32_t* codes, uint8_t* bytes) {
  uint64_t word = 0;
  for_group([&]<int i>(std::integral_constant<int, i>) {
    constexpr int kShift = i * kWidth % 64;
    const uint64_t code = codes[i];
    word |= code << kShift;
    if constexpr (kShift + kWidth >= 64) {
      write_word(word, bytes + i * kWidth / 64 * 8);
      word = 0;
      if constexpr (kShift + kWidth > 64) word = code >> (64 - kShift);
    }
  });
}

template <int kWidth>
void unpack_group(const uint8_t* bytes, uint32_t* codes) {
  constexpr uint64_t kMask = (uint64_t{1} << kWidth) - 1;
  uint64_t word = 0;
  for_group([&]<int i>(std::integral_constant<int, i>) {
    constexpr int kShift = i * kWidth % 64;
    if constexpr (kShift == 0) word = read_word(bytes + i * kWidth / 64 * 8);
    uint64_t code = word >> kShift;
    if constexpr (kShift + kWidth > 64) {
      word = read_word(bytes + i * kWidth / 64 * 8 + 8);
      code |= word << (64 - kShift);
    }
    codes[i] = static_cast<uint32_t>(code & kMask);
  });
}

using PackGroup = void (*)(const uint32_t*, uint8_t*);
using UnpackGroup = void (*)(const uint8_t*, uint32_t*);
constexpr PackGroup kPackGroup[] = {nullptr,        &pack_group<1>, &pack_group<2>,
                                    &pack_group<3>, &pack_group<4>, &pack_group<5>,
                                    &pack_group<6>, &pack_group<7>, &pack_group<8>};
constexpr UnpackGroup kUnpackGroup[] = {nullptr,          &unpack_group<1>, &unpack_group<2>,
                                        &unpack_group<3>, &unpack_group<4>, &unpack_group<5>,
                                        &unpack_group<6>, &unpack_group<7>, &unpack_group<8>};
constexpr int kMostGroupedWidth = 8;

// Any width, from the first bit of a word.
void pack_stream(const uint32_t* codes, int64_t count, int width, uint8_t* bytes) {
  uint64_t word = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t code = codes[i];
    word |= code << filled;
    filled += width;
    if (filled >= 64) {
      write_word(word, bytes);
      bytes += 8;
      filled -= 64;
      word = filled > 0 ? code >> (width - filled) : 0;
    }
  }
  if (filled > 0) write_word(word, bytes);
}

void unpack_stream(const uint8_t* bytes, int64_t count, int width, uint32_t* codes) {
  const uint64_t mask = (uint64_t{1} << width) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = i * width;
    uint64_t code = read_word(bytes + bit / 64 * 8) >> (bit % 64);
    if (bit % 64 + width > 64) code |= read_word(bytes + bit / 64 * 8 + 8) << (64 - bit % 64);
    codes[i] = static_cast<uint32_t>(code & mask);
  }
}

// Numbers in a base: `kWords` words side by side, because each multiplication waits for the one before.
template <int kWords>
void pack_numbers(const uint32_t* codes, uint64_t base, int per_word, uint8_t* bytes) {
  uint64_t words[kWords] = {};
  for (int i = per_word - 1; i >= 0; --i) {
    for (int w = 0; w < kWords; ++w) words[w] = words[w] * base + codes[w * per_word + i];
  }
  for (int w = 0; w < kWords; ++w) write_word(words[w], bytes + 8 * w);
}

__extension__ using Wide = unsigned __int128;

bool all_below(const uint32_t* codes, int64_t count, uint64_t limit) {
  if (limit > UINT32_MAX) return true;
  uint32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, codes[i]);
  return count == 0 || highest < limit;
}

}  // namespace

CodeLayout::CodeLayout(uint64_t count) : base_(count) {
  if (count < 1 || count > (uint64_t{1} << 32)) {
    throw InvalidArgument("count", text_of(count), "1 to 2^32");
  }
  width_ = std::max(1, static_cast<int>(std::bit_width(count - 1)));
  if (std::has_single_bit(count)) return;
  uint64_t power = 1;
  while (power <= UINT64_MAX / count) {
    power *= count;
    ++per_word_;
  }
  if (per_word_ * width_ <= 64) {
    per_word_ = 0;
    return;
  }
  while (chunk_ * base_ <= (uint64_t{1} << 32)) {
    chunk_ *= base_;
    ++per_chunk_;
  }
  reciprocal_ = UINT64_MAX / base_ + 1;
}

int64_t CodeLayout::words(int64_t codes) const {
  return per_word_ > 0 ? ceil_div(codes, per_word_) : ceil_div(checked_mul(codes, width_), 64);
}

int64_t CodeLayout::piece_codes() const {
  return per_word_ > 0 ? kPieceCodes / per_word_ * per_word_ : kPieceCodes;
}

bool CodeLayout::pack(const uint32_t* codes, int64_t count, uint8_t* bytes) const {
  if (!all_below(codes, count, base_)) return false;
  int64_t i = 0;
  if (per_word_ > 0) {
    constexpr int kSide = 8;
    for (; i + kSide * per_word_ <= count; i += kSide * per_word_, bytes += 8 * kSide) {
      pack_numbers<kSide>(codes + i, base_, per_word_, bytes);
    }
    for (; i < count; i += per_word_, bytes += 8) {
      const auto rest = static_cast<int>(std::min<int64_t>(per_word_, count - i));
      pack_numbers<1>(codes + i, base_, rest, bytes);
    }
    return true;
  }
  if (width_ <= kMostGroupedWidth) {
    for (; i + kGroup <= count; i += kGroup, bytes += 8 * width_) kPackGroup[width_](codes + i, bytes);
  }
  pack_stream(codes + i, count - i, width_, bytes);
  return true;
}

// A word is cut into numbers below 2^32, and those by exact products with the reciprocal of the base: with
// m = ceil(2^64 / base), floor(n m / 2^64) = floor(n / base) for all n below 2^32.
bool CodeLayout::unpack_numbers(const uint8_t* bytes, int64_t count, uint32_t* codes) const {
  bool good = true;
  for (int64_t i = 0; i < count; bytes += 8) {
    uint64_t word = read_word(bytes);
    const int64_t end = std::min(count, i + per_word_);
    while (i < end) {
      const uint64_t rest = word / chunk_;
      uint64_t number = word - rest * chunk_;
      word = rest;
      const int64_t chunk_end = std::min(end, i + per_chunk_);
      for (; i < chunk_end; ++i) {
        const auto quotient = static_cast<uint64_t>((Wide{number} * reciprocal_) >> 64);
        codes[i] = static_cast<uint32_t>(number - quotient * base_);
        number = quotient;
      }
      good &= number == 0;
    }
    good &= word == 0;
  }
  return good;
}

bool CodeLayout::unpack(const uint8_t* bytes, int64_t count, uint32_t* codes) const {
  if (per_word_ > 0) return unpack_numbers(bytes, count, codes);
  int64_t i = 0;
  if (width_ <= kMostGroupedWidth) {
    for (; i + kGroup <= count; i += kGroup, bytes += 8 * width_) kUnpackGroup[width_](bytes, codes + i);
  }
  unpack_stream(bytes, count - i, width_, codes + i);
  return all_below(codes, count, base_);
}

int64_t packed_code_bytes(int64_t codes, uint64_t count) {
  if (codes < 0) throw InvalidArgument("codes", text_of(codes), "a number >= 0");
  return checked_mul(CodeLayout(count).words(codes), 8);
}

void pack_codes(std::span<const uint32_t> codes, uint64_t count, std::span<uint8_t> out, int threads) {
  const CodeLayout layout(count);
  const auto total = static_cast<int64_t>(codes.size());
  const int64_t bytes = packed_code_bytes(total, count);
  if (static_cast<int64_t>(out.size()) != bytes) {
    throw InvalidArgument("out", text_of(out.size(), " bytes"), text_of(bytes));
  }
  std::atomic<bool> bad = false;
  const int64_t piece_codes = layout.piece_codes();
  parallel_for(ceil_div(total, piece_codes), threads, [&](int64_t piece) {
    const int64_t first = piece * piece_codes;
    const int64_t here = std::min(piece_codes, total - first);
    if (!layout.pack(codes.data() + first, here, out.data() + 8 * layout.words(first))) bad = true;
  });
  if (bad) throw InvalidArgument("codes", "one that is too large", text_of("codes below ", count));
}

void unpack_codes(std::span<const uint8_t> bytes, uint64_t count, std::span<uint32_t> codes, int threads) {
  const CodeLayout layout(count);
  const auto total = static_cast<int64_t>(codes.size());
  const int64_t expected = packed_code_bytes(total, count);
  if (static_cast<int64_t>(bytes.size()) != expected) {
    throw InvalidArgument("codes", text_of(bytes.size(), " bytes"), text_of(expected));
  }
  std::atomic<bool> bad = false;
  const int64_t piece_codes = layout.piece_codes();
  parallel_for(ceil_div(total, piece_codes), threads, [&](int64_t piece) {
    const int64_t first = piece * piece_codes;
    const int64_t here = std::min(piece_codes, total - first);
    if (!layout.unpack(bytes.data() + 8 * layout.words(first), here, codes.data() + first)) bad = true;
  });
  if (bad) throw InvalidArgument("codes", "one that is too large", text_of("codes below ", count));
}

}  // namespace quantloom
