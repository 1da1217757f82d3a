// The codebooks of trellis_codebook(), by name.
#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "formats/description.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_tables.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

// The x that a standard normal number stays below with probability p, by Newton's method.
double normal_quantile(double p) {
  if (p > 0.5) return -normal_quantile(1 - p);
  if (p == 0.5) return 0;
  // Abramowitz and Stegun 26.2.22, off by less than 0.003.
  const double t = std::sqrt(-2 * std::log(p));
  double x = (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t) - t;
  for (int i = 0; i < 5; ++i) {
    const double below = 0.5 * std::erfc(-x / std::numbers::sqrt2);
    const double density = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
    x -= (below - p) / density;
  }
  return x;
}

// 2^window normal quantiles for each weight of a state, in random order.
std::vector<uint16_t> random_quantiles(int window, int weights) {
  const size_t states = size_t{1} << window;
  std::vector<uint16_t> quantiles(states);
  for (size_t i = 0; i < states; ++i) {
    const double p = (static_cast<double>(i) + 0.5) / static_cast<double>(states);
    quantiles[i] = f16_from_float(static_cast<float>(normal_quantile(p)));
  }
  std::vector<uint16_t> table(states * static_cast<size_t>(weights));
  for (int w = 0; w < weights; ++w) {
    const CounterRandom random(static_cast<uint64_t>(w) + 1);
    std::vector<uint16_t> order = quantiles;
    for (size_t i = states; i-- > 1;) std::swap(order[i], order[random.below(i, i + 1)]);
    for (size_t i = 0; i < states; ++i)
      table[i * static_cast<size_t>(weights) + static_cast<size_t>(w)] = order[i];
  }
  return table;
}

struct Named {
  std::string_view name;
  TrellisCode code;
  uint32_t multiplier;  // 0: the name takes none
  int weights;
};

constexpr std::array<Named, 8> kNamed = {{
    {"3inst", TrellisCode::lcg, 0, 1},
    {"mcg", TrellisCode::mcg, trellis::kExl3Mcg, 1},
    {"mul1", TrellisCode::mul1, trellis::kExl3Mul1, 1},
    {"1mad", TrellisCode::one_mad, 0, 1},
    {"octagon", TrellisCode::octagon, trellis::kOctagonMultiplier, 2},
    {"hyb", TrellisCode::hyb, 0, 2},
    {"rptc", TrellisCode::table, 0, 1},
    {"rptc2", TrellisCode::table, 0, 2},
}};

std::string hexadecimal(uint32_t value) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  std::string text;
  for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[value >> shift & 15U];
  return text;
}

[[noreturn]] void refuse_name(std::string_view name) {
  throw InvalidArgument("codebook", printable(name),
                        "3inst, mcg[-HEX], mul1[-HEX], 1mad, octagon[-HEX], hyb, rptc or rptc2, HEX an odd "
                        "multiplier of 8 hexadecimal digits");
}

uint32_t multiplier_of(std::string_view digits, std::string_view name) {
  uint32_t value = 0;
  if (digits.size() != 8) refuse_name(name);
  for (const char c : digits) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) refuse_name(name);
    value = value << 4 | static_cast<uint32_t>(digit);
  }
  if (value % 2 == 0) refuse_name(name);  // maps two states to one word
  return value;
}

}  // namespace

const std::vector<std::string>& trellis_codebook_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Named& known : kNamed) list.emplace_back(known.name);
    return list;
  }();
  return names;
}

TrellisCodebook trellis_codebook(std::string_view name, int window) {
  const size_t dash = std::min(name.find('-'), name.size());
  const auto known =
      std::ranges::find_if(kNamed, [&](const Named& entry) { return entry.name == name.substr(0, dash); });
  if (known == kNamed.end() || (dash < name.size() && known->multiplier == 0)) refuse_name(name);
  const int least = known->code == TrellisCode::hyb ? 15 : 4;
  if (window < least || window > 24) {
    throw InvalidArgument("window", text_of(window),
                          text_of(least, " to 24 bits for codebook ", known->name));
  }
  TrellisCodebook codebook;
  codebook.name = known->name;
  codebook.code = known->code;
  codebook.multiplier = known->multiplier;
  codebook.window = window;
  codebook.weights_per_step = known->weights;
  if (dash < name.size()) {
    codebook.multiplier = multiplier_of(name.substr(dash + 1), name);
    if (codebook.multiplier != known->multiplier)
      codebook.name += text_of("-", hexadecimal(codebook.multiplier));
  }
  if (codebook.code == TrellisCode::table) codebook.table = random_quantiles(window, known->weights);
  if (codebook.code == TrellisCode::hyb) {
    codebook.table.assign(trellis::kHybTable.begin(), trellis::kHybTable.end());
  }
  return codebook;
}

std::vector<float> TrellisCodebook::values() const {
  std::vector<float> values;
  const uint32_t states = uint32_t{1} << window;
  values.reserve(static_cast<size_t>(states) * static_cast<size_t>(weights_per_step));
  for (uint32_t state = 0; state < states; ++state) {
    for (int w = 0; w < weights_per_step; ++w) {
      values.push_back(
          float_from_f16(trellis::weight_at(code, multiplier, table.data(), weights_per_step, state, w)));
    }
  }
  return values;
}

double TrellisCodebook::rms() const {
  double squares = 0;
  const std::vector<float> all = values();
  for (const float value : all) squares += static_cast<double>(value) * static_cast<double>(value);
  return std::sqrt(squares / static_cast<double>(all.size()));
}

}  // namespace quantloom
