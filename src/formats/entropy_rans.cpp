#include <algorithm>
#include <bit>
#include <memory>

#include "formats/entropy_coding.hpp"
#include "formats/entropy_rows.hpp"
#include "quantloom/error.hpp"

namespace quantloom::entropy {
namespace {

constexpr size_t kFusedAlphabet = 256;
constexpr int kFusedBits = 12;
constexpr const char* kBeyond = "spells out a code beyond the alphabet";

// Steps of the encoder, which runs backwards, and writes words that do not fit a state any more downwards
// from `to`.
class Encoder {
 public:
  explicit Encoder(const RansModel& model) : bits_(model.bits), escape_bits_(model.escape_bits) {
    const bool escapes = model.escape >= 0;
    for (size_t code = 0; code < model.frequency.size(); ++code) {
      const bool spelled =
          escapes && (model.frequency[code] == 0 || code == static_cast<size_t>(model.escape));
      const size_t slots = spelled ? static_cast<size_t>(model.escape) : code;
      const uint32_t frequency = model.frequency[slots];
      // floor(x / f) = high half of x * (floor((2^64 - 1) / f) + 1), for 1 < f and x below 2^32 (Lemire et
      // al., 2019). By one it cannot be: there the factor is 0 and the state itself is added.
      const uint64_t reciprocal = frequency > 1 ? ~uint64_t{0} / frequency + 1 : 0;
      entries_.push_back({reciprocal, uint64_t{frequency} << (32 - model.bits), frequency, model.start[slots],
                          frequency == 1 ? ~uint32_t{0} : 0, spelled});
    }
    escapes_ = escapes;
  }

  // One step of lanes [0, lanes); code_of(lane) is negative where the lane rests.
  template <class CodeOf>
  void step(uint32_t* states, int64_t lanes, const CodeOf& code_of, uint16_t*& to) const {
    if (escapes_) {
      for (int64_t lane = lanes; lane-- > 0;) {
        const int32_t code = code_of(lane);
        if (code < 0 || !entries_[static_cast<size_t>(code)].spelled) continue;
        renormalize(states[lane], states[lane] >> (32 - escape_bits_) != 0, to);
        states[lane] = states[lane] << escape_bits_ | static_cast<uint32_t>(code);
      }
    }
    for (int64_t lane = lanes; lane-- > 0;) {
      const int32_t code = code_of(lane);
      if (code < 0) continue;
      const Entry& entry = entries_[static_cast<size_t>(code)];
      uint32_t state = states[lane];
      renormalize(state, state >= entry.bound, to);
      const auto quotient =
          static_cast<uint32_t>(static_cast<unsigned __int128>(entry.reciprocal) * state >> 64) +
          (state & entry.by_one);
      states[lane] = (quotient << bits_) + (state - quotient * entry.frequency) + entry.start;
    }
  }

 private:
  struct Entry {
    uint64_t reciprocal;
    uint64_t bound;  // of states to which the code can be added
    uint32_t frequency;
    uint32_t start;
    uint32_t by_one;
    bool spelled;  // after the escape, whose slots these are
  };

  static void renormalize(uint32_t& state, bool full, uint16_t*& to) {
    to[-1] = static_cast<uint16_t>(state);
    to -= full ? 1 : 0;
    state = full ? state >> 16 : state;
  }

  int bits_;
  int escape_bits_;
  bool escapes_ = false;
  std::vector<Entry> entries_;
};

// Codes the end of a chunk into at most 32 words; returns the number of codes, which is even.
template <class Code>
int64_t encode_tail(std::span<const Code> codes, const Encoder& encoder,
                    std::array<uint16_t, kTailWords>& words) {
  const int64_t count = std::ssize(codes);
  const int64_t most = std::min(count, kLongestTail) / kTailLanes * kTailLanes;
  std::array<uint32_t, kTailLanes> states{kLowestState, kLowestState};
  // A step adds up to two words per lane, and touches one more.
  std::array<uint16_t, kTailWords + 2 * kTailLanes + 1> stack{};
  uint16_t* const end = stack.data() + stack.size();
  uint16_t* to = end;
  int64_t tail = 0;
  for (; tail < most; tail += kTailLanes) {
    const auto states_before = states;
    uint16_t* const to_before = to;
    encoder.step(
        states.data(), kTailLanes,
        [&](int64_t lane) { return int32_t{codes[static_cast<size_t>(count - tail - kTailLanes + lane)]}; },
        to);
    if (end - to + 2 * kTailLanes > kTailWords) {
      states = states_before;
      to = to_before;
      break;
    }
  }
  words.fill(0);
  size_t next = 0;
  for (const uint32_t state : states) {
    words[next++] = static_cast<uint16_t>(state);
    words[next++] = static_cast<uint16_t>(state >> 16);
  }
  std::copy(to, end, words.begin() + static_cast<std::ptrdiff_t>(next));
  return tail;
}

struct FusedLookup {
  const uint32_t* fused;
  uint32_t mask;
  int bits;

  uint32_t pop(uint32_t& state) const {
    const uint32_t entry = fused[state & mask];
    state = (entry >> 8 & 0xfffU) * (state >> bits) + (entry >> 20);
    return entry & 0xffU;
  }
};

struct SlotLookup {
  const uint16_t* slots;
  const uint32_t* parameters;
  uint32_t mask;
  int bits;

  uint32_t pop(uint32_t& state) const {
    const uint32_t slot = state & mask;
    const uint32_t code = slots[slot];
    const uint32_t parameter = parameters[code];
    state = (parameter & 0xffffU) * (state >> bits) + slot - (parameter >> 16);
    return code;
  }
};

// Decodes one chunk. Words are read at `next`, which never passes word_count.
template <class Lookup, class Code>
class ChunkDecoder {
 public:
  ChunkDecoder(const Lookup& lookup, const EntropyTables& tables, std::span<const std::byte> bytes,
               int64_t chunk, std::span<Code> codes)
      : lookup_(lookup),
        tables_(tables),
        escape_(tables.escape >= 0 ? static_cast<uint32_t>(tables.escape) : ~uint32_t{0}),
        escape_bits_(tables.escape_bits),
        alphabet_(static_cast<uint32_t>(tables.alphabet)),
        words_(bytes.data()),
        word_count_(std::ssize(bytes) / 2),
        chunk_(chunk),
        codes_(codes) {}

  void decode() {
    if (word_count_ < kHeadWords) refuse_chunk(chunk_, "is shorter than its states");
    const int64_t tail = load_word(words_, 0);
    if (tail > kLongestTail || tail % kTailLanes != 0 || tail > std::ssize(codes_)) {
      refuse_chunk(chunk_, "has an impossible number of tail codes");
    }
    load_states();
    const int64_t main = std::ssize(codes_) - tail;
    int64_t row = 0;
    if constexpr (std::is_same_v<Lookup, FusedLookup> && sizeof(Code) == 1) {
      RansRows rows{&tables_, lookup_.bits, words_, word_count_, next_, states_.data()};
      row = decode_rans_rows(rows, codes_.data(), main);
      if (rows.beyond) refuse_chunk(chunk_, kBeyond);
      next_ = rows.next;
    }
    // A step takes at most two words per lane.
    for (; row + kRow <= main && next_ + 2 * kRow <= word_count_; row += kRow) fast_row(row);
    const auto take = [&] {
      if (next_ >= word_count_) refuse_chunk(chunk_, "ends within its codes");
      return load_word(words_, next_++);
    };
    for (; row < main; row += kRow) {
      for (int64_t step = 0; step < kRun; ++step) {
        slow_step(states_.data(), kLanes, main, row + step, kRun, take);
      }
    }
    if (next_ != word_count_) refuse_chunk(chunk_, "has words that no code takes");
    decode_tail(main);
  }

 private:
  // States: a leading one, up to 15 bits from a dense stream, a low word.
  void load_states() {
    constexpr int64_t kBegin = 16 * kHeadWords;
    int64_t bit = kBegin;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t length = load_word(words_, 1 + lane / 4) >> (4 * (lane % 4)) & 15U;
      if (bit + length > 16 * word_count_) refuse_chunk(chunk_, "ends within its states");
      uint32_t high = uint32_t{1} << length;
      for (uint32_t i = 0; i < length; ++i, ++bit) {
        high |= (load_word(words_, bit / 16) >> (bit % 16) & 1U) << i;
      }
      states_[static_cast<size_t>(lane)] = high << 16 | load_word(words_, 9 + lane);
    }
    next_ = (bit + 15) / 16;
  }

  void fast_row(int64_t row) {
    const std::byte* from = words_ + 2 * next_;
    for (int step = 0; step < kRun; ++step) {
      Code* to = codes_.data() + row + step;
      uint32_t escaped = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t state = states_[static_cast<size_t>(lane)];
        const uint32_t code = lookup_.pop(state);
        to[kRun * lane] = static_cast<Code>(code);
        escaped |= static_cast<uint32_t>(code == escape_) << lane;
        uint16_t word = 0;
        std::memcpy(&word, from, sizeof(word));
        const bool low = state < kLowestState;
        from += low ? 2 : 0;
        states_[static_cast<size_t>(lane)] = low ? state << 16 | word : state;
      }
      for (; escaped != 0; escaped &= escaped - 1) {
        const int lane = std::countr_zero(escaped);
        to[kRun * lane] = spelled(states_[static_cast<size_t>(lane)], [&] {
          const uint32_t word = load_word(from, 0);
          from += 2;
          return word;
        });
      }
    }
    next_ = (from - words_) / 2;
  }

  template <class Take>
  Code spelled(uint32_t& state, const Take& take) const {
    const uint32_t code = state & ((uint32_t{1} << escape_bits_) - 1);
    if (code >= alphabet_) refuse_chunk(chunk_, kBeyond);
    state >>= escape_bits_;
    if (state < kLowestState) state = state << 16 | take();
    return static_cast<Code>(code);
  }

  // Lane l decodes the code at first + l * stride, if that is before `end`.
  template <class Take>
  void slow_step(uint32_t* states, int64_t lanes, int64_t end, int64_t first, int64_t stride,
                 const Take& take) {
    const int64_t active = first >= end ? 0 : std::min(lanes, (end - first + stride - 1) / stride);
    uint32_t escaped = 0;
    for (int64_t lane = 0; lane < active; ++lane) {
      const uint32_t code = lookup_.pop(states[lane]);
      if (states[lane] < kLowestState) states[lane] = states[lane] << 16 | take();
      codes_[static_cast<size_t>(first + lane * stride)] = static_cast<Code>(code);
      escaped |= static_cast<uint32_t>(code == escape_) << lane;
    }
    for (; escaped != 0; escaped &= escaped - 1) {
      const int lane = std::countr_zero(escaped);
      codes_[static_cast<size_t>(first + lane * stride)] = spelled(states[lane], take);
    }
  }

  // The states have become the words of the tail.
  void decode_tail(int64_t main) {
    for (const uint32_t state : states_) {
      if (state >> 16 != 1) refuse_chunk(chunk_, "ends in states where no encoder begins");
    }
    int64_t next = 0;
    const auto take = [&] {
      if (next >= kTailWords) refuse_chunk(chunk_, "ends within its tail");
      return states_[static_cast<size_t>(next++)] & 0xffffU;
    };
    std::array<uint32_t, kTailLanes> states{};
    for (uint32_t& state : states) {
      state = take();
      state |= take() << 16;
    }
    for (int64_t at = main; at < std::ssize(codes_); at += kTailLanes) {
      slow_step(states.data(), kTailLanes, std::ssize(codes_), at, 1, take);
    }
    for (const uint32_t state : states) {
      if (state != kLowestState) refuse_chunk(chunk_, "ends in states where no encoder begins");
    }
    while (next < kTailWords) {
      if (take() != 0) refuse_chunk(chunk_, "has words that no code takes");
    }
  }

  Lookup lookup_;
  const EntropyTables& tables_;
  uint32_t escape_;
  int escape_bits_;
  uint32_t alphabet_;
  const std::byte* words_;
  int64_t word_count_;
  int64_t chunk_;
  std::span<Code> codes_;
  int64_t next_ = 0;
  std::array<uint32_t, kLanes> states_{};
};

}  // namespace

int bits_of_alphabet(int64_t alphabet) {
  return std::max(
      1, static_cast<int>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(alphabet, 1) - 1))));
}

RansModel rans_model(std::span<const uint32_t> frequencies, int bits, int32_t escape) {
  RansModel model;
  model.bits = bits;
  model.escape = escape;
  model.escape_bits = bits_of_alphabet(std::ssize(frequencies));
  model.frequency.assign(frequencies.begin(), frequencies.end());
  uint32_t start = 0;
  for (const uint32_t f : frequencies) {
    model.start.push_back(start);
    start += f;
  }
  return model;
}

EntropyTables rans_tables(const RansModel& model) {
  EntropyTables tables;
  tables.escape = model.escape;
  tables.escape_bits = model.escape_bits;
  tables.alphabet = std::ssize(model.frequency);
  if (model.frequency.size() <= kFusedAlphabet && model.bits <= kFusedBits) {
    for (size_t code = 0; code < model.frequency.size(); ++code) {
      const uint32_t frequency = model.frequency[code];
      for (uint32_t place = 0; place < frequency; ++place) {
        tables.fused.push_back(static_cast<uint32_t>(code) | frequency << 8 | place << 20);
      }
    }
    return tables;
  }
  for (size_t code = 0; code < model.frequency.size(); ++code) {
    tables.slots.insert(tables.slots.end(), model.frequency[code], static_cast<uint16_t>(code));
    tables.parameters.push_back(model.frequency[code] | model.start[code] << 16);
  }
  return tables;
}

template <class Code>
std::vector<uint16_t> encode_rans(std::span<const Code> codes, const RansModel& model) {
  const Encoder encoder(model);
  std::array<uint16_t, kTailWords> tail_words{};
  const int64_t tail = encode_tail(codes, encoder, tail_words);
  const int64_t main = std::ssize(codes) - tail;

  std::array<uint32_t, kLanes> states{};
  for (size_t lane = 0; lane < kLanes; ++lane) states[lane] = kLowestState + tail_words[lane];
  // At most two words per code, and one more is touched.
  const auto most = static_cast<size_t>(2 * main + 1);
  const std::unique_ptr<uint16_t[]> stack(new uint16_t[most]);
  uint16_t* const end = stack.get() + most;
  uint16_t* to = end;
  const Code* from = codes.data();
  int64_t row = (main + kRow - 1) / kRow * kRow - kRow;
  for (; row >= 0; row -= kRow) {
    const bool whole = row + kRow <= main;
    for (int64_t step = kRun; step-- > 0;) {
      const Code* first = from + row + step;
      if (whole) {
        encoder.step(
            states.data(), kLanes, [&](int64_t lane) { return int32_t{first[kRun * lane]}; }, to);
        continue;
      }
      const auto code_of = [&](int64_t lane) {
        return row + kRun * lane + step < main ? int32_t{first[kRun * lane]} : -1;
      };
      encoder.step(states.data(), kLanes, code_of, to);
    }
  }

  std::vector<uint16_t> words(kHeadWords);
  words.reserve(static_cast<size_t>(end - to) + kHeadWords + kLanes);
  words[0] = static_cast<uint16_t>(tail);
  uint64_t pending = 0;
  int pending_bits = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t high = states[lane] >> 16;
    const int length = std::bit_width(high) - 1;
    words[1 + lane / 4] |= static_cast<uint16_t>(length << (4 * (lane % 4)));
    words[9 + lane] = static_cast<uint16_t>(states[lane]);
    pending |= uint64_t{high ^ uint32_t{1} << length} << pending_bits;
    pending_bits += length;
    for (; pending_bits >= 16; pending_bits -= 16, pending >>= 16) {
      words.push_back(static_cast<uint16_t>(pending));
    }
  }
  if (pending_bits > 0) words.push_back(static_cast<uint16_t>(pending));
  words.insert(words.end(), to, end);
  return words;
}

template <class Code>
void decode_rans(std::span<const std::byte> words, const EntropyTables& tables, int bits, int64_t chunk,
                 std::span<Code> codes) {
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  if (!tables.fused.empty()) {
    ChunkDecoder<FusedLookup, Code>({tables.fused.data(), mask, bits}, tables, words, chunk, codes).decode();
  } else {
    ChunkDecoder<SlotLookup, Code>({tables.slots.data(), tables.parameters.data(), mask, bits}, tables, words,
                                   chunk, codes)
        .decode();
  }
}

template std::vector<uint16_t> encode_rans(std::span<const uint8_t>, const RansModel&);
template std::vector<uint16_t> encode_rans(std::span<const uint16_t>, const RansModel&);
template void decode_rans(std::span<const std::byte>, const EntropyTables&, int, int64_t, std::span<uint8_t>);
template void decode_rans(std::span<const std::byte>, const EntropyTables&, int, int64_t,
                          std::span<uint16_t>);

}  // namespace quantloom::entropy
