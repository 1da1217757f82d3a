// Sorting by 32-bit keys: least significant digits first, stable, so that the result does not depend on the
// number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

// Unsigned keys in the order of the floats, which must not be NaN; -0 counts as 0.
inline uint32_t key_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

inline float float_of_key(uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}

// The elements load(0), ..., load(count - 1), stably sorted by key(element). load may be called several times
// for an index.
template <class Element, class Load, class Key>
std::unique_ptr<Element[]> radix_sort(int64_t count, const Load& load, const Key& key, int threads) {
  constexpr int kDigitBits = 11;
  constexpr int kPasses = 3;
  constexpr uint32_t kBuckets = 1U << kDigitBits;
  constexpr int64_t kSmallestPart = 1 << 15;  // elements that are worth a thread
  const auto size = static_cast<size_t>(count);
  auto from = std::make_unique_for_overwrite<Element[]>(size);
  auto to = std::make_unique_for_overwrite<Element[]>(size);
  const int64_t parts =
      std::clamp<int64_t>(std::min<int64_t>(resolve_threads(threads), count / kSmallestPart), 1, 64);
  const int64_t part_size = ceil_div(count, parts);
  std::vector<std::array<int64_t, kBuckets>> next(static_cast<size_t>(parts));
  const auto pass = [&](const auto& source, int shift) {
    parallel_for(parts, threads, [&](int64_t part) {
      auto& counts = next[static_cast<size_t>(part)];
      counts.fill(0);
      const int64_t end = std::min(count, (part + 1) * part_size);
      for (int64_t i = part * part_size; i < end; ++i) {
        ++counts[(key(source(i)) >> shift) & (kBuckets - 1)];
      }
    });
    int64_t position = 0;
    for (uint32_t bucket = 0; bucket < kBuckets; ++bucket) {
      for (auto& counts : next) position += std::exchange(counts[bucket], position);
    }
    parallel_for(parts, threads, [&](int64_t part) {
      auto& places = next[static_cast<size_t>(part)];
      const int64_t end = std::min(count, (part + 1) * part_size);
      for (int64_t i = part * part_size; i < end; ++i) {
        const Element element = source(i);
        to[static_cast<size_t>(places[(key(element) >> shift) & (kBuckets - 1)]++)] = element;
      }
    });
    std::swap(from, to);
  };
  pass(load, 0);
  for (int digit = 1; digit < kPasses; ++digit) {
    pass([&](int64_t i) { return from[static_cast<size_t>(i)]; }, digit * kDigitBits);
  }
  return from;
}

}  // namespace quantloom
