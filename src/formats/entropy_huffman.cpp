#include <algorithm>
#include <array>

#include "formats/entropy_coding.hpp"
#include "formats/entropy_rows.hpp"
#include "quantloom/error.hpp"

namespace quantloom::entropy {
namespace {

// The position of the code that `lane` decodes at `step` of the row that begins at `row`.
int64_t position(int64_t row, int64_t step, int64_t lane) {
  return row + kRun * lane + step;
}

}  // namespace

HuffmanModel huffman_model(std::span<const uint32_t> lengths, int longest) {
  HuffmanModel model;
  model.longest = longest;
  model.length.assign(lengths.begin(), lengths.end());
  model.code.resize(lengths.size());
  if (longest == 0) {  // a single code, of which nothing is written
    model.single = static_cast<size_t>(std::find(lengths.begin(), lengths.end(), 1U) - lengths.begin());
    std::fill(model.length.begin(), model.length.end(), 0U);
    return model;
  }
  // Canonical: shorter codes first, among equal lengths in order.
  uint32_t code = 0;
  for (int length = 1; length <= longest; ++length) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] == static_cast<uint32_t>(length)) model.code[i] = code++;
    }
    code <<= 1;
  }
  return model;
}

EntropyTables huffman_tables(const HuffmanModel& model) {
  EntropyTables tables;
  tables.prefixes.resize(size_t{1} << model.longest);
  if (model.longest == 0) tables.prefixes[0] = static_cast<uint32_t>(model.single) << 8;
  for (size_t i = 0; i < model.length.size(); ++i) {
    const uint32_t length = model.length[i];
    if (length == 0) continue;
    const uint32_t free = static_cast<uint32_t>(model.longest) - length;
    std::fill_n(tables.prefixes.begin() + (model.code[i] << free), size_t{1} << free,
                length | static_cast<uint32_t>(i) << 8);
  }
  return tables;
}

template <class Code>
std::vector<uint16_t> encode_huffman(std::span<const Code> codes, const HuffmanModel& model) {
  const int64_t count = std::ssize(codes);
  // The bits of each lane, in words of their own.
  std::array<std::vector<uint16_t>, kLanes> lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    auto& words = lanes[static_cast<size_t>(lane)];
    uint64_t pending = 0;
    uint32_t pending_bits = 0;
    for (int64_t row = 0; row < count; row += kRow) {
      const int64_t end = std::min(position(row, kRun, lane), count);
      for (int64_t at = position(row, 0, lane); at < end; ++at) {
        const Code code = codes[static_cast<size_t>(at)];
        pending = pending << model.length[code] | model.code[code];
        pending_bits += model.length[code];
        for (; pending_bits >= 16; pending_bits -= 16) {
          words.push_back(static_cast<uint16_t>(pending >> (pending_bits - 16)));
        }
      }
    }
    if (pending_bits > 0) words.push_back(static_cast<uint16_t>(pending << (16 - pending_bits)));
  }
  // In the order in which a decoder takes them.
  std::vector<uint16_t> words;
  std::array<uint32_t, kLanes> held{};
  std::array<size_t, kLanes> taken{};
  for (int64_t row = 0; row < count; row += kRow) {
    for (int64_t step = 0; step < kRun; ++step) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t at = position(row, step, lane);
        if (at >= count) continue;
        const auto l = static_cast<size_t>(lane);
        if (held[l] < static_cast<uint32_t>(model.longest)) {
          words.push_back(taken[l] < lanes[l].size() ? lanes[l][taken[l]] : uint16_t{0});
          ++taken[l];
          held[l] += 16;
        }
        held[l] -= model.length[codes[static_cast<size_t>(at)]];
      }
    }
  }
  return words;
}

template <class Code>
void decode_huffman(std::span<const std::byte> bytes, const EntropyTables& tables, int bits, int64_t chunk,
                    std::span<Code> codes) {
  const std::byte* words = bytes.data();
  const int64_t word_count = std::ssize(bytes) / 2;
  const int64_t count = std::ssize(codes);
  const uint32_t* prefixes = tables.prefixes.data();
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  const auto least = static_cast<uint32_t>(bits);
  // The low `held` bits of a window are the next ones of the lane, the first of them highest.
  std::array<uint32_t, kLanes> windows{};
  std::array<uint32_t, kLanes> held{};
  int64_t next = 0;
  int64_t row = 0;
  if constexpr (sizeof(Code) == 1) {
    HuffmanRows rows{&tables, bits, words, word_count, next, windows.data(), held.data()};
    row = decode_huffman_rows(rows, codes.data(), count);
    next = rows.next;
  }
  for (; row + kRow <= count && next + kRow <= word_count; row += kRow) {
    const std::byte* from = words + 2 * next;
    for (int step = 0; step < kRun; ++step) {
      Code* to = codes.data() + row + step;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        uint16_t word = 0;
        std::memcpy(&word, from, sizeof(word));
        const bool low = held[lane] < least;
        from += low ? 2 : 0;
        const uint32_t window = low ? windows[lane] << 16 | word : windows[lane];
        const uint32_t bits_held = held[lane] + (low ? 16U : 0U);
        const uint32_t entry = prefixes[window >> (bits_held - least) & mask];
        windows[lane] = window;
        held[lane] = bits_held - (entry & 0xffU);
        to[kRun * lane] = static_cast<Code>(entry >> 8);
      }
    }
    next = (from - words) / 2;
  }
  for (; row < count; row += kRow) {
    for (int64_t step = 0; step < kRun; ++step) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const int64_t at = position(row, step, static_cast<int64_t>(lane));
        if (at >= count) continue;
        if (held[lane] < least) {
          if (next >= word_count) refuse_chunk(chunk, "ends within its codes");
          windows[lane] = windows[lane] << 16 | load_word(words, next++);
          held[lane] += 16;
        }
        const uint32_t entry = prefixes[windows[lane] >> (held[lane] - least) & mask];
        held[lane] -= entry & 0xffU;
        codes[static_cast<size_t>(at)] = static_cast<Code>(entry >> 8);
      }
    }
  }
  if (next != word_count) refuse_chunk(chunk, "has words that no code takes");
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if ((windows[lane] & ((uint32_t{1} << held[lane]) - 1)) != 0) {
      refuse_chunk(chunk, "has bits that no code takes");
    }
  }
}

template std::vector<uint16_t> encode_huffman(std::span<const uint8_t>, const HuffmanModel&);
template std::vector<uint16_t> encode_huffman(std::span<const uint16_t>, const HuffmanModel&);
template void decode_huffman(std::span<const std::byte>, const EntropyTables&, int, int64_t,
                             std::span<uint8_t>);
template void decode_huffman(std::span<const std::byte>, const EntropyTables&, int, int64_t,
                             std::span<uint16_t>);

}  // namespace quantloom::entropy
