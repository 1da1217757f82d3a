#include "quantloom/fit/sorted_values.hpp"

#include <algorithm>
#include <cmath>

#include "fit/radix_sort.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;  // of the checks and the sums; a multiple of a block

// The lowest index i < count with bad(i), or count.
template <class Bad>
int64_t first_bad(int64_t count, int threads, const Bad& bad) {
  std::vector<int64_t> found(static_cast<size_t>(ceil_div(count, kChunk)), count);
  parallel_for(static_cast<int64_t>(found.size()), threads, [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    bool any = false;
    for (int64_t i = chunk * kChunk; i < end; ++i) any |= bad(i);
    for (int64_t i = chunk * kChunk; any && i < end; ++i) {
      if (bad(i)) {
        found[static_cast<size_t>(chunk)] = i;
        break;
      }
    }
  });
  return found.empty() ? count : *std::min_element(found.begin(), found.end());
}

void require_finite(std::span<const float> values, const char* argument, int threads) {
  const auto count = static_cast<int64_t>(values.size());
  const int64_t bad =
      first_bad(count, threads, [&](int64_t i) { return !std::isfinite(values[static_cast<size_t>(i)]); });
  if (bad < count) {
    throw NumericError(text_of(argument, ": got ", values[static_cast<size_t>(bad)], " at index ", bad,
                               ", expected finite numbers"));
  }
}

}  // namespace

double Moments::squared_error(double center) const {
  return std::max(0.0, second - 2 * center * first + center * center * weight);
}

SortedValues::SortedValues(std::span<const float> values, std::span<const float> weights, int threads)
    : count_(static_cast<int64_t>(values.size())) {
  resolve_threads(threads);
  if (!weights.empty() && weights.size() != values.size()) {
    throw InvalidArgument("weights", text_of(weights.size(), " of them"),
                          text_of("one for each of the ", values.size(), " values"));
  }
  require_finite(values, "values", threads);
  require_finite(weights, "weights", threads);
  const auto weight_count = static_cast<int64_t>(weights.size());
  const int64_t negative =
      first_bad(weight_count, threads, [&](int64_t i) { return weights[static_cast<size_t>(i)] < 0; });
  if (negative < weight_count) {
    throw InvalidArgument("weights", text_of(weights[static_cast<size_t>(negative)], " at index ", negative),
                          "numbers >= 0");
  }
  values_ = std::make_unique_for_overwrite<float[]>(values.size());
  if (weights.empty()) {
    const auto sorted = radix_sort<uint32_t>(
        count_, [&](int64_t i) { return key_of(values[static_cast<size_t>(i)]); },
        [](uint32_t key) { return key; }, threads);
    parallel_for(ceil_div(count_, kChunk), threads, [&](int64_t chunk) {
      const auto end = static_cast<size_t>(std::min(count_, (chunk + 1) * kChunk));
      for (auto i = static_cast<size_t>(chunk * kChunk); i < end; ++i) values_[i] = float_of_key(sorted[i]);
    });
  } else {
    weights_ = std::make_unique_for_overwrite<float[]>(values.size());
    const auto sorted = radix_sort<uint64_t>(
        count_,
        [&](int64_t i) {
          const auto at = static_cast<size_t>(i);
          return (static_cast<uint64_t>(key_of(values[at])) << 32) | std::bit_cast<uint32_t>(weights[at]);
        },
        [](uint64_t element) { return static_cast<uint32_t>(element >> 32); }, threads);
    parallel_for(ceil_div(count_, kChunk), threads, [&](int64_t chunk) {
      const auto end = static_cast<size_t>(std::min(count_, (chunk + 1) * kChunk));
      for (auto i = static_cast<size_t>(chunk * kChunk); i < end; ++i) {
        values_[i] = float_of_key(static_cast<uint32_t>(sorted[i] >> 32));
        weights_[i] = std::bit_cast<float>(static_cast<uint32_t>(sorted[i]));
      }
    });
  }
  add_up(threads);
}

void SortedValues::add_up(int threads) {
  zero_ = std::lower_bound(values_.get(), values_.get() + count_, 0.0F) - values_.get();
  const auto run = [&](std::vector<Moments>& running, int64_t length, const auto& block_begin) {
    const int64_t blocks = length / kBlock;  // a last, shorter one needs no sum
    running.resize(static_cast<size_t>(blocks + 1));
    parallel_for(ceil_div(blocks, kChunk / kBlock), threads, [&](int64_t chunk) {
      const int64_t end = std::min(blocks, (chunk + 1) * (kChunk / kBlock));
      for (int64_t b = chunk * (kChunk / kBlock); b < end; ++b) {
        const int64_t begin = block_begin(b);
        running[static_cast<size_t>(b + 1)] = visited(begin, begin + kBlock);
      }
    });
    for (size_t b = 1; b < running.size(); ++b) running[b] += running[b - 1];
  };
  run(above_, count_ - zero_, [&](int64_t b) { return zero_ + b * kBlock; });
  run(below_, zero_, [&](int64_t b) { return zero_ - (b + 1) * kBlock; });
}

Moments SortedValues::visited(int64_t first, int64_t last) const {
  // Two chains of additions each, which a processor runs side by side.
  Moments even;
  Moments odd;
  const auto add = [&](int64_t i, Moments& sum) {
    const double x = values_[static_cast<size_t>(i)];
    if (weights_ == nullptr) {
      sum.first += x;
      sum.second += x * x;
    } else {
      const double weight = weights_[static_cast<size_t>(i)];
      sum.weight += weight;
      sum.first += weight * x;
      sum.second += weight * x * x;
    }
  };
  int64_t i = first;
  for (; i + 1 < last; i += 2) {
    add(i, even);
    add(i + 1, odd);
  }
  if (i < last) add(i, even);
  even += odd;
  if (weights_ == nullptr) even.weight = static_cast<double>(last - first);
  return even;
}

// Sums over [zero, end), negative where end lies below zero.
Moments SortedValues::from_zero(int64_t end) const {
  Moments sum;
  if (end >= zero_) {
    const int64_t block = (end - zero_) / kBlock;
    sum = above_[static_cast<size_t>(block)];
    sum += visited(zero_ + block * kBlock, end);
  } else {
    const int64_t block = (zero_ - end) / kBlock;
    sum -= below_[static_cast<size_t>(block)];
    sum -= visited(end, zero_ - block * kBlock);
  }
  return sum;
}

Moments SortedValues::sums(int64_t first, int64_t last) const {
  if (last - first <= 2 * kBlock) return visited(first, std::max(first, last));
  Moments sum = from_zero(last);
  sum -= from_zero(first);
  return sum;
}

}  // namespace quantloom
