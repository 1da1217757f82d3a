#include "formats/coded_stream.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "quantloom/error.hpp"

namespace quantloom::coded {
namespace {

constexpr size_t kLanes = kCodedLanes;
constexpr size_t kSlots = kLanes * kStates;

// Where lane and state have their codes in a block.
int64_t row_of(size_t lane, size_t state) {
  return static_cast<int64_t>(lane / 4 + 8 * state);
}
int64_t column_of(size_t lane) {
  return static_cast<int64_t>(8 * (lane % 4));
}

class BitWriter {
 public:
  void put(uint32_t value, int bits) {
    pending_ |= uint64_t{value} << filled_;
    filled_ += bits;
    if (filled_ >= 32) {
      words_.push_back(static_cast<uint32_t>(pending_));
      pending_ >>= 32;
      filled_ -= 32;
    }
  }
  // Fills up the last word.
  std::vector<uint32_t> finish() {
    if (filled_ > 0) words_.push_back(static_cast<uint32_t>(pending_));
    return std::move(words_);
  }

 private:
  std::vector<uint32_t> words_;
  uint64_t pending_ = 0;
  int filled_ = 0;
};

// Reads past the end give zeros, which `ok` tells.
class BitReader {
 public:
  BitReader(std::span<const uint32_t> words, size_t first) : words_(words), at_(first) {}
  uint32_t take(int bits) {
    if (filled_ < bits) {
      ok_ = ok_ && at_ < words_.size();
      pending_ |= uint64_t{at_ < words_.size() ? words_[at_] : 0} << filled_;
      ++at_;
      filled_ += 32;
    }
    const auto value = static_cast<uint32_t>(pending_ & ((uint64_t{1} << bits) - 1));
    pending_ >>= bits;
    filled_ -= bits;
    return value;
  }
  // Whether the rest of the last word is zero.
  bool clean() const { return pending_ == 0; }
  bool ok() const { return ok_; }
  size_t next() const { return at_; }

 private:
  std::span<const uint32_t> words_;
  size_t at_;
  uint64_t pending_ = 0;
  int filled_ = 0;
  bool ok_ = true;
};

struct Read {
  uint16_t value;
  uint8_t bits;
};

}  // namespace

std::vector<uint32_t> encode_stream(const uint8_t* codes, int64_t stride, int64_t blocks,
                                    const PairEncoder& encoder, int table_bits) {
  const auto steps = static_cast<size_t>(blocks * kPairs);
  // What is read behind each step, by step, lane and state.
  std::vector<Read> reads(steps * kSlots);
  std::vector<uint16_t> escaped;
  std::array<uint32_t, kSlots> states{};
  const auto pair_at = [&](size_t step, size_t lane, size_t state) {
    const auto block = static_cast<int64_t>(step / kPairs);
    const auto pair = static_cast<int64_t>(step % kPairs);
    return codes + row_of(lane, state) * stride + kCodedColumns * block + column_of(lane) + 2 * pair;
  };
  for (size_t step = steps; step-- > 0;) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t s = 0; s < kStates; ++s) {
        const uint8_t* pair = pair_at(step, lane, s);
        const uint32_t symbol = encoder.symbol_of(pair[0], pair[1]);
        uint32_t& state = states[kStates * lane + s];
        if (step + 1 == steps) {
          state = encoder.last_state(symbol);
          continue;
        }
        const PairEncoder::Step coded = encoder.encode(state, symbol);
        reads[step * kSlots + kStates * lane + s] = {static_cast<uint16_t>(coded.value),
                                                     static_cast<uint8_t>(coded.bits)};
        state = coded.state;
      }
    }
  }
  for (size_t step = 0; step < steps; ++step) {
    for (size_t s = 0; s < kStates; ++s) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const uint8_t* pair = pair_at(step, lane, s);
        if (!encoder.escapes(encoder.symbol_of(pair[0], pair[1]))) continue;
        escaped.push_back(static_cast<uint16_t>(pair[0] | pair[1] << 8));
      }
    }
  }

  std::array<uint32_t, kLanes> lengths{};
  for (size_t i = 0; i < reads.size(); ++i) lengths[i % kSlots / kStates] += reads[i].bits;
  const uint32_t shortest = *std::min_element(lengths.begin(), lengths.end());
  const uint32_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (longest >> kLengthBits != 0) {
    throw InvalidArgument("codes", text_of("a lane with ", longest, " bits"), "more splits");
  }
  const int width = std::bit_width(longest - shortest);
  BitWriter header;
  header.put(shortest | static_cast<uint32_t>(width) << kLengthBits, 32);
  for (const uint32_t length : lengths) header.put(length - shortest, width);
  for (const uint32_t state : states) header.put(state - (uint32_t{1} << table_bits), table_bits);

  // The words of each lane, the bits read first being the highest; the first one holds what fills no word.
  std::array<std::vector<uint32_t>, kLanes> strings;
  std::array<uint32_t, kLanes> at{};  // bits from the start of the first word
  for (size_t lane = 0; lane < kLanes; ++lane) {
    at[lane] = (32 - lengths[lane] % 32) % 32;
    strings[lane].resize((at[lane] + lengths[lane]) / 32);
  }
  std::array<uint32_t, kLanes> place = at;
  for (size_t i = 0; i < reads.size(); ++i) {
    const size_t lane = i % kSlots / kStates;
    const uint32_t bits = reads[i].bits;
    if (bits == 0) continue;
    const uint32_t first = place[lane] / 32;
    const uint32_t end = place[lane] % 32 + bits;
    if (end <= 32) {
      strings[lane][first] |= uint32_t{reads[i].value} << (32 - end);
    } else {
      strings[lane][first] |= uint32_t{reads[i].value} >> (end - 32);
      strings[lane][first + 1] |= uint32_t{reads[i].value} << (64 - end);
    }
    place[lane] += bits;
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (at[lane] != 0) header.put(strings[lane][0], static_cast<int>(lengths[lane] % 32));
  }
  std::vector<uint32_t> words = header.finish();

  std::array<size_t, kLanes> next{};
  for (size_t lane = 0; lane < kLanes; ++lane) next[lane] = at[lane] != 0 ? 1 : 0;
  const auto take = [&](size_t lane) {
    if (next[lane] < strings[lane].size()) words.push_back(strings[lane][next[lane]++]);
  };
  for (size_t round = 0; round < 3; ++round) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (round > 0 || at[lane] == 0) take(lane);
    }
  }
  place = at;
  for (size_t step = 0; step + 1 < steps; ++step) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const Read* read = &reads[step * kSlots + kStates * lane];
      const uint32_t before = place[lane];
      place[lane] += static_cast<uint32_t>(read[0].bits) + read[1].bits;
      if (before / 32 != place[lane] / 32) take(lane);
    }
  }
  const size_t whole = words.size();
  words.resize(whole + (escaped.size() + 1) / 2);
  for (size_t i = 0; i < escaped.size(); ++i) {
    words[words.size() - 1 - i / 2] |= uint32_t{escaped[i]} << (i % 2 == 0 ? 16 : 0);
  }
  return words;
}

const char* decode_stream(std::span<const uint32_t> words, std::span<const uint32_t> table, int table_bits,
                          int64_t blocks, uint8_t* codes, int64_t stride) {
  const uint32_t size = uint32_t{1} << table_bits;
  if (words.empty()) return "is empty";
  BitReader header(words, 0);
  const uint32_t first_word = header.take(32);
  const uint32_t shortest = first_word & ((uint32_t{1} << kLengthBits) - 1);
  const auto width = static_cast<int>(first_word >> kLengthBits);
  if (width > kLengthBits) return "has lengths that are too wide";
  struct Lane {
    std::array<uint32_t, 3> held{};
    uint32_t place = 0;   // bits from the start of the first word
    uint32_t length = 0;  // bits in all
    uint32_t end = 0;     // of the words of which a lane takes no more, in bits
    std::array<uint32_t, kStates> states{};
  };
  std::array<Lane, kLanes> lanes{};
  for (Lane& lane : lanes) {
    lane.length = shortest + header.take(width);
    if (lane.length >> kLengthBits != 0) return "has a lane that is too long";
  }
  for (Lane& lane : lanes) {
    for (uint32_t& state : lane.states) state = header.take(table_bits);
  }
  for (Lane& lane : lanes) {
    const uint32_t left = lane.length % 32;
    lane.place = (32 - left) % 32;
    lane.held[0] = left == 0 ? 0 : header.take(static_cast<int>(left));
    const uint32_t count = (lane.place + lane.length) / 32;
    lane.end = count < 3 ? 0 : 32 * (count - 2);
  }
  if (!header.ok()) return "ends within its header";
  if (!header.clean()) return "has a header with bits behind its end";
  size_t next = header.next();
  bool early = false;
  const auto take = [&] {
    early = early || next >= words.size();
    return early ? 0 : words[next++];
  };
  for (uint32_t round = 0; round < 3; ++round) {
    for (Lane& lane : lanes) {
      if (round == 0 && lane.place != 0) continue;
      if (lane.place + lane.length > 32 * round) lane.held[round] = take();
    }
  }

  std::array<std::pair<uint32_t, uint32_t>, kSlots * kPairs> escaped{};
  size_t spelled = 0;
  const int64_t steps = blocks * kPairs;
  for (int64_t block = 0; block < blocks; ++block) {
    size_t found = 0;
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const bool last = block * kPairs + pair + 1 == steps;
      for (size_t l = 0; l < kLanes; ++l) {
        Lane& lane = lanes[l];
        const uint32_t shift = lane.place % 32;
        uint64_t window = (uint64_t{lane.held[0]} << 32 | lane.held[1]) << shift;
        const uint32_t before = lane.place;
        for (size_t s = 0; s < kStates; ++s) {
          const uint32_t entry = table[lane.states[s]];
          uint8_t* to = codes + row_of(l, s) * stride + kCodedColumns * block + column_of(l) + 2 * pair;
          to[0] = static_cast<uint8_t>(entry);
          to[1] = static_cast<uint8_t>(entry >> 8);
          if (entry >> 31 != 0) {
            // In the order of steps, states and lanes.
            escaped[found++] = {static_cast<uint32_t>((pair * kStates + static_cast<int64_t>(s)) * 32) +
                                    static_cast<uint32_t>(l),
                                0};
          }
          if (last) continue;
          const uint32_t x = entry >> 16 & 0x7fffU;
          const int bits = table_bits + 1 - std::bit_width(x);
          lane.states[s] = (x << bits) - size;
          if (bits > 0) lane.states[s] += static_cast<uint32_t>(window >> (64 - bits));
          window <<= bits;
          lane.place += static_cast<uint32_t>(bits);
        }
        if (before / 32 != lane.place / 32) {
          lane.held[0] = lane.held[1];
          lane.held[1] = lane.held[2];
          lane.held[2] = lane.place < lane.end ? take() : 0;
        }
      }
    }
    std::sort(escaped.begin(), escaped.begin() + static_cast<std::ptrdiff_t>(found));
    for (size_t i = 0; i < found; ++i, ++spelled) {
      const uint32_t slot = escaped[i].first;
      const size_t l = slot % 32;
      const size_t s = slot / 32 % kStates;
      const int64_t pair = slot / 32 / kStates;
      if (words.size() < 1 + spelled / 2) return "ends within its escaped pairs";
      const uint32_t word = words[words.size() - 1 - spelled / 2] >> (spelled % 2 == 0 ? 16 : 0);
      uint8_t* to = codes + row_of(l, s) * stride + kCodedColumns * block + column_of(l) + 2 * pair;
      to[0] = static_cast<uint8_t>(word);
      to[1] = static_cast<uint8_t>(word >> 8);
    }
    if (early) return "ends early";
  }
  for (const Lane& lane : lanes) {
    if (lane.place % 32 != 0 || lane.place / 32 != ((32 - lane.length % 32) % 32 + lane.length) / 32) {
      return "has lanes of other lengths than it says";
    }
  }
  if (next + (spelled + 1) / 2 != words.size()) return "has words that no lane takes";
  if (spelled % 2 != 0 && (words[words.size() - 1 - spelled / 2] & 0xffffU) != 0) {
    return "has an escaped pair that nothing asks for";
  }
  return nullptr;
}

}  // namespace quantloom::coded
