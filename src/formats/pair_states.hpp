// The states of a tabled asymmetric numeral system over pairs of codes (formats/coded_matrix.hpp).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quantloom::coded {

inline constexpr uint32_t kEscape = uint32_t{1} << 16;  // of a symbol; its pair is spelled out elsewhere

struct PairStates {
  int bits = 0;
  double loss = 0;                // bits per code beyond the entropy, as expected
  std::vector<uint32_t> symbols;  // by state
};

// For codes that occur `counts` times, at least one of them: 2^bits states, or as few as lose little.
PairStates fit_pair_states(std::span<const uint64_t> counts, int bits);

// CodedMatrix::table() of symbols.
std::vector<uint32_t> table_of(std::span<const uint32_t> symbols);

// What an encoder looks up.
class PairEncoder {
 public:
  explicit PairEncoder(std::span<const uint32_t> symbols);

  // The symbol of a pair: the escape where it has none of its own.
  uint32_t symbol_of(uint32_t first, uint32_t second) const { return numbers_[first | second << 8]; }
  bool escapes(uint32_t symbol) const { return symbol == escape_; }
  // A state, plus 2^bits, in which a decoder ends that takes `symbol` last.
  uint32_t last_state(uint32_t symbol) const { return size_ + slots_[entries_[symbol].start]; }

  struct Step {
    uint32_t state;
    uint32_t value;  // of `bits` bits, which the decoder reads to come from `state` to the one given
    int bits;
  };
  // The state from which a decoder takes `symbol` and comes to `state`; both plus 2^bits.
  Step encode(uint32_t state, uint32_t symbol) const {
    const Entry& entry = entries_[symbol];
    const int bits = entry.most_bits - static_cast<int>((state >> entry.most_bits) < entry.frequency);
    const uint32_t small = state >> bits;
    return {size_ + slots_[entry.start + small - entry.frequency], state & ((uint32_t{1} << bits) - 1), bits};
  }

 private:
  struct Entry {
    uint32_t frequency;
    uint32_t start;
    int most_bits;
  };
  uint32_t size_;
  uint32_t escape_ = ~uint32_t{0};
  std::vector<Entry> entries_;
  std::vector<uint16_t> slots_;    // states of each symbol, ascending
  std::vector<uint32_t> numbers_;  // symbol by pair
};

}  // namespace quantloom::coded
