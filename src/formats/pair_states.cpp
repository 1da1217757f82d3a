#include "formats/pair_states.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/coded_matrix.hpp"
#include "quantloom/formats/entropy.hpp"

namespace quantloom::coded {
namespace {

// Pairs whose share is a smaller part of a state are spelled out: each other one takes a whole state.
constexpr double kRareShare = 0.15;
constexpr int kSpelledBits = 16;
constexpr int kFewestBits = 10;
constexpr int kManyBits = 13;     // beyond, tables leave a processor room for few warps
constexpr int kCodesOfState = 9;  // log2
constexpr double kLittleLoss = 0.004;
constexpr double kLargeLoss = 0.02;
constexpr double kWeight = 0x1p48;  // of all pairs together, as counts

struct Fit {
  double loss = 0;
  std::vector<uint32_t> symbols;
  std::vector<uint32_t> frequencies;
};

Fit fit_bits(std::span<const double> shares, int bits) {
  const double states = std::exp2(bits);
  Fit fit;
  std::vector<uint64_t> weights;
  double rare = 0;
  double entropy = 0;
  const auto weight_of = [](double share) {
    return static_cast<uint64_t>(std::max(1.0, std::nearbyint(share * kWeight)));
  };
  for (size_t first = 0; first < shares.size(); ++first) {
    for (size_t second = 0; second < shares.size(); ++second) {
      const double share = shares[first] * shares[second];
      if (share == 0) continue;
      entropy -= share * std::log2(share);
      if (share * states < kRareShare) {
        rare += share;
      } else {
        fit.symbols.push_back(static_cast<uint32_t>(first | second << 8));
        weights.push_back(weight_of(share));
      }
    }
  }
  // A table cannot hold more pairs than states, whatever their shares.
  const size_t room = (size_t{1} << bits) - 1;
  if (weights.size() > room) {
    std::vector<size_t> order(weights.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
    std::vector<uint32_t> symbols;
    std::vector<uint64_t> kept;
    for (size_t i = 0; i < order.size(); ++i) {
      if (i < room) {
        symbols.push_back(fit.symbols[order[i]]);
        kept.push_back(weights[order[i]]);
      } else {
        rare += static_cast<double>(weights[order[i]]) / kWeight;
      }
    }
    fit.symbols = std::move(symbols);
    weights = std::move(kept);
  }
  if (rare > 0) {
    fit.symbols.push_back(kEscape);
    weights.push_back(weight_of(rare));
  }
  fit.frequencies = quantize_frequencies(weights, bits);
  fit.loss = (cross_entropy_of(weights, fit.frequencies) + rare * kSpelledBits - entropy) / 2;
  return fit;
}

// States of a symbol lie as evenly as they can: state i of f at (i + 1/2) / f of all.
std::vector<uint32_t> spread(const Fit& fit, int bits) {
  struct Place {
    uint64_t at;
    uint32_t symbol;
  };
  std::vector<Place> places;
  places.reserve(size_t{1} << bits);
  for (size_t s = 0; s < fit.symbols.size(); ++s) {
    const uint64_t frequency = fit.frequencies[s];
    for (uint64_t i = 0; i < frequency; ++i) {
      places.push_back({((2 * i + 1) << 40) / (2 * frequency), static_cast<uint32_t>(s)});
    }
  }
  std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.at < b.at; });
  std::vector<uint32_t> symbols;
  symbols.reserve(places.size());
  for (const Place& place : places) symbols.push_back(fit.symbols[place.symbol]);
  return symbols;
}

}  // namespace

PairStates fit_pair_states(std::span<const uint64_t> counts, int bits) {
  double total = 0;
  for (const uint64_t c : counts) total += static_cast<double>(c);
  std::vector<double> shares;
  for (const uint64_t c : counts) shares.push_back(static_cast<double>(c) / total);
  if (bits != 0) {
    const Fit fit = fit_bits(shares, bits);
    return {bits, fit.loss, spread(fit, bits)};
  }
  // A state takes 32 bits: for few codes a small table costs less than it loses.
  const int most =
      std::clamp(static_cast<int>(std::log2(total)) - kCodesOfState, kCodedSmallestTable, kCodedLargestTable);
  int tried = std::min(kFewestBits, most);
  Fit fit = fit_bits(shares, tried);
  while (tried < most && fit.loss > (tried < kManyBits ? kLittleLoss : kLargeLoss)) {
    fit = fit_bits(shares, ++tried);
  }
  return {tried, fit.loss, spread(fit, tried)};
}

std::vector<uint32_t> table_of(std::span<const uint32_t> symbols) {
  std::map<uint32_t, uint32_t> next;  // x of the symbol's next state
  for (const uint32_t s : symbols) ++next[s];
  std::vector<uint32_t> table;
  table.reserve(symbols.size());
  for (const uint32_t s : symbols) {
    const uint32_t escape = (s & kEscape) != 0 ? uint32_t{1} << 31 : 0;
    table.push_back((s & 0xffffU) | next[s]++ << 16 | escape);
  }
  return table;
}

PairEncoder::PairEncoder(std::span<const uint32_t> symbols)
    : size_(static_cast<uint32_t>(symbols.size())), numbers_(size_t{1} << 16, ~uint32_t{0}) {
  const int bits = static_cast<int>(std::bit_width(size_)) - 1;
  std::map<uint32_t, std::vector<uint16_t>> states;
  for (size_t i = 0; i < symbols.size(); ++i) states[symbols[i]].push_back(static_cast<uint16_t>(i));
  for (const auto& [symbol, list] : states) {
    const auto frequency = static_cast<uint32_t>(list.size());
    const auto number = static_cast<uint32_t>(entries_.size());
    entries_.push_back({frequency, static_cast<uint32_t>(slots_.size()),
                        bits + 1 - static_cast<int>(std::bit_width(frequency))});
    slots_.insert(slots_.end(), list.begin(), list.end());
    if (symbol == kEscape) {
      escape_ = number;
    } else {
      numbers_[symbol] = number;
    }
  }
  std::replace(numbers_.begin(), numbers_.end(), ~uint32_t{0}, escape_);
}

}  // namespace quantloom::coded
