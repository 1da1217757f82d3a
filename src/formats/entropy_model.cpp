// Models of entropy coders: counts, frequencies in slots, lengths of prefix codes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "quantloom/checked_math.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kCountPiece = 1 << 18;

template <class Code>
std::vector<uint64_t> count_pieces(std::span<const Code> codes, int64_t alphabet, int threads) {
  if (alphabet < 0 || alphabet > kEntropyAlphabet) {
    throw InvalidArgument("alphabet", text_of(alphabet), text_of("0 to ", kEntropyAlphabet));
  }
  const int64_t count = std::ssize(codes);
  const int64_t pieces = ceil_div(count, kCountPiece);
  // A bin for each code that can be, and one for all others, which are looked for afterwards.
  constexpr size_t kBins = sizeof(Code) == 1 ? 256 : kEntropyAlphabet + 1;
  const auto bin_of = [](Code code) { return std::min<size_t>(code, kBins - 1); };
  std::vector<std::vector<uint32_t>> partial(static_cast<size_t>(pieces));
  parallel_for(pieces, threads, [&](int64_t piece) {
    const auto part = codes.subspan(static_cast<size_t>(piece * kCountPiece),
                                    static_cast<size_t>(std::min(kCountPiece, count - piece * kCountPiece)));
    // Four sets of bins, so that equal neighbours do not wait for each other.
    std::vector<uint32_t> bins(4 * kBins);
    size_t i = 0;
    for (; i + 4 <= part.size(); i += 4) {
      for (size_t j = 0; j < 4; ++j) ++bins[j * kBins + bin_of(part[i + j])];
    }
    for (; i < part.size(); ++i) ++bins[bin_of(part[i])];
    for (size_t j = 1; j < 4; ++j) {
      for (size_t b = 0; b < kBins; ++b) bins[b] += bins[j * kBins + b];
    }
    partial[static_cast<size_t>(piece)].assign(bins.begin(), bins.begin() + kBins);
  });
  std::vector<uint64_t> counts(static_cast<size_t>(alphabet));
  for (const auto& bins : partial) {
    for (size_t b = 0; b < kBins; ++b) {
      if (b < counts.size()) {
        counts[b] += bins[b];
      } else if (bins[b] != 0) {
        const auto found =
            std::find_if(codes.begin(), codes.end(), [&](Code code) { return code >= alphabet; });
        throw InvalidArgument("codes", text_of("the code ", int{*found}), text_of("codes below ", alphabet));
      }
    }
  }
  return counts;
}

}  // namespace

double entropy_of(std::span<const uint64_t> counts) {
  double total = 0;
  for (const uint64_t c : counts) total += static_cast<double>(c);
  double bits = 0;
  for (const uint64_t c : counts) {
    if (c != 0) bits += static_cast<double>(c) * std::log2(total / static_cast<double>(c));
  }
  return total > 0 ? bits / total : 0.0;
}

double cross_entropy_of(std::span<const uint64_t> counts, std::span<const uint32_t> model) {
  double total = 0;
  double model_total = 0;
  for (const uint64_t c : counts) total += static_cast<double>(c);
  for (const uint32_t f : model) model_total += f;
  double bits = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0) continue;
    if (i >= model.size() || model[i] == 0) return std::numeric_limits<double>::infinity();
    bits += static_cast<double>(counts[i]) * std::log2(model_total / model[i]);
  }
  return total > 0 ? bits / total : 0.0;
}

std::vector<uint64_t> count_codes(std::span<const uint8_t> codes, int64_t alphabet, int threads) {
  return count_pieces(codes, alphabet, threads);
}
std::vector<uint64_t> count_codes(std::span<const uint16_t> codes, int64_t alphabet, int threads) {
  return count_pieces(codes, alphabet, threads);
}

std::vector<uint32_t> quantize_frequencies(std::span<const uint64_t> counts, int table_bits) {
  if (table_bits < 0 || table_bits > 16) {
    throw InvalidArgument("table_bits", text_of(table_bits), "0 to 16");
  }
  const int64_t slots = int64_t{1} << table_bits;
  double total = 0;
  int64_t used = 0;
  for (const uint64_t c : counts) {
    total += static_cast<double>(c);
    used += static_cast<int64_t>(c != 0);
  }
  if (used == 0) throw InvalidArgument("frequencies", "no count above 0", "at least one");
  if (used > slots) {
    throw InvalidArgument("table_bits", text_of(table_bits, " for ", used, " symbols"),
                          "at least as many slots as symbols");
  }
  std::vector<uint32_t> frequencies(counts.size());
  int64_t sum = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0) continue;
    const double share = static_cast<double>(counts[i]) / total * static_cast<double>(slots);
    frequencies[i] = static_cast<uint32_t>(std::max(1.0, std::nearbyint(share)));
    sum += frequencies[i];
  }

  // The loss is convex in each frequency: single steps that gain the most, or lose the least, end in the
  // optimum, which is reached when no slot that moves from one symbol to another gains.
  std::vector<double> gains(counts.size(), -1.0);
  std::vector<double> losses(counts.size(), std::numeric_limits<double>::infinity());
  const auto refresh = [&](size_t i) {
    if (counts[i] == 0) return;
    const auto count = static_cast<double>(counts[i]);
    const double f = frequencies[i];
    gains[i] = count * std::log1p(1.0 / f);
    losses[i] = f > 1.5 ? count * std::log1p(1.0 / (f - 1.0)) : std::numeric_limits<double>::infinity();
  };
  for (size_t i = 0; i < counts.size(); ++i) refresh(i);
  const auto largest_gain = [&] {
    return static_cast<size_t>(std::max_element(gains.begin(), gains.end()) - gains.begin());
  };
  const auto smallest_loss = [&] {
    return static_cast<size_t>(std::min_element(losses.begin(), losses.end()) - losses.begin());
  };
  const auto change = [&](size_t i, int by) {
    frequencies[i] += static_cast<uint32_t>(by);
    refresh(i);
  };
  for (; sum < slots; ++sum) change(largest_gain(), 1);
  for (; sum > slots; --sum) change(smallest_loss(), -1);
  // Each exchange lowers the loss, so that this ends; the bound is against rounding errors alone.
  for (size_t exchanges = 0; exchanges < 4 * counts.size(); ++exchanges) {
    const size_t to = largest_gain();
    const size_t from = smallest_loss();
    if (to == from || !(gains[to] > losses[from])) break;
    change(to, 1);
    change(from, -1);
  }
  return frequencies;
}

namespace {

// Lengths for ascending weights, two or more: leaves and merged nodes are two queues in order.
std::vector<int> unbounded_lengths(const std::vector<double>& weights) {
  const size_t count = weights.size();
  std::vector<double> merged(count - 1);
  std::vector<size_t> parent_of_leaf(count);
  std::vector<size_t> parent_of_merged(count - 1);
  size_t leaf = 0;
  size_t node = 0;
  for (size_t next = 0; next < count - 1; ++next) {
    double sum = 0;
    for (int child = 0; child < 2; ++child) {
      if (node >= next || (leaf < count && weights[leaf] <= merged[node])) {
        parent_of_leaf[leaf] = next;
        sum += weights[leaf++];
      } else {
        parent_of_merged[node] = next;
        sum += merged[node++];
      }
    }
    merged[next] = sum;
  }
  std::vector<int> depth(count - 1);
  for (size_t i = count - 1; i-- > 0;) depth[i] = i == count - 2 ? 0 : depth[parent_of_merged[i]] + 1;
  std::vector<int> lengths(count);
  for (size_t i = 0; i < count; ++i) lengths[i] = depth[parent_of_leaf[i]] + 1;
  return lengths;
}

// The same, none above `longest`: package-merge. A level's list holds the leaves and the pairs of the level
// below, in order; of the last list the first 2 count - 2 are bought, which says how many of each below.
std::vector<int> bounded_lengths(const std::vector<double>& weights, int longest) {
  const size_t count = weights.size();
  std::vector<std::vector<bool>> is_leaf(static_cast<size_t>(longest));
  std::vector<double> below;
  for (auto& level : is_leaf) {
    std::vector<double> list;
    size_t leaf = 0;
    size_t pair = 0;
    while (leaf < count || 2 * pair + 1 < below.size()) {
      const bool has_pair = 2 * pair + 1 < below.size();
      const double value = has_pair ? below[2 * pair] + below[2 * pair + 1] : 0.0;
      const bool take_leaf = leaf < count && (!has_pair || weights[leaf] <= value);
      level.push_back(take_leaf);
      list.push_back(take_leaf ? weights[leaf] : value);
      take_leaf ? ++leaf : ++pair;
    }
    below = std::move(list);
  }
  std::vector<int> lengths(count);
  size_t bought = 2 * count - 2;
  for (size_t level = is_leaf.size(); level-- > 0;) {
    size_t leaves = 0;
    for (size_t i = 0; i < bought; ++i) leaves += static_cast<size_t>(is_leaf[level][i]);
    for (size_t i = 0; i < leaves; ++i) ++lengths[i];
    bought = 2 * (bought - leaves);
  }
  return lengths;
}

}  // namespace

std::vector<int> huffman_lengths(std::span<const double> weights, int longest) {
  std::vector<size_t> used;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] >= 0) || std::isinf(weights[i])) {
      throw InvalidArgument("weights", text_of(weights[i], " at ", i), "finite numbers >= 0");
    }
    if (weights[i] > 0) used.push_back(i);
  }
  if (longest < 0) throw InvalidArgument("longest", text_of(longest), "0 (no bound) or more");
  if (longest > 0 && longest < 62 && std::ssize(used) > int64_t{1} << longest) {
    throw InvalidArgument("longest", text_of(longest, " for ", used.size(), " symbols"),
                          "at most 2^longest symbols");
  }
  std::vector<int> lengths(weights.size());
  if (used.size() < 2) return lengths;
  std::stable_sort(used.begin(), used.end(), [&](size_t a, size_t b) { return weights[a] < weights[b]; });
  std::vector<double> sorted;
  sorted.reserve(used.size());
  for (const size_t i : used) sorted.push_back(weights[i]);
  std::vector<int> found = unbounded_lengths(sorted);
  if (longest > 0 && *std::max_element(found.begin(), found.end()) > longest) {
    found = bounded_lengths(sorted, longest);
  }
  for (size_t i = 0; i < used.size(); ++i) lengths[used[i]] = found[i];
  return lengths;
}

}  // namespace quantloom
