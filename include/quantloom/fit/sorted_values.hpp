// A sample of numbers, sorted once, that answers sums over ranges of values at the cost of a look-up. The
// fits of scalar tables (Lloyd-Max, scale search, entropy of a grid) are exact searches over such a sample.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace quantloom {

// Sums over some values x with weights w, in float64.
struct Moments {
  double weight = 0;  // of w; their count without weights
  double first = 0;   // of w * x
  double second = 0;  // of w * x * x

  Moments& operator+=(const Moments& other) {
    weight += other.weight;
    first += other.first;
    second += other.second;
    return *this;
  }
  Moments& operator-=(const Moments& other) {
    weight -= other.weight;
    first -= other.first;
    second -= other.second;
    return *this;
  }
  // The sum of w * (x - center)^2.
  double squared_error(double center) const;
};

// The values in ascending order with their weights. The same sample gives the same object, bit for bit,
// whatever the number of threads; the order of equal values is that of the input.
class SortedValues {
 public:
  // Copies. weights: empty, or one for each value, finite and >= 0. Throws InvalidArgument for a wrong number
  // of weights or a negative one, NumericError for NaN or infinity; both name the index.
  explicit SortedValues(std::span<const float> values, std::span<const float> weights = {}, int threads = 0);

  int64_t count() const { return count_; }
  bool weighted() const { return weights_ != nullptr; }
  std::span<const float> values() const { return {values_.get(), static_cast<size_t>(count_)}; }
  // In the order of values(); empty without weights.
  std::span<const float> weights() const {
    return {weights_.get(), weights_ == nullptr ? 0 : static_cast<size_t>(count_)};
  }
  // Sums over the values at [first, last) of the order. O(1): some 128 values are visited at most.
  Moments sums(int64_t first, int64_t last) const;
  Moments total() const { return sums(0, count_); }

 private:
  static constexpr int64_t kBlock = 64;

  void add_up(int threads);
  Moments visited(int64_t first, int64_t last) const;
  Moments from_zero(int64_t end) const;

  int64_t count_ = 0;
  int64_t zero_ = 0;  // of the first value >= 0
  std::unique_ptr<float[]> values_;
  std::unique_ptr<float[]> weights_;
  // Running sums by blocks, outwards from zero on both sides: an outlier comes last, so that its square never
  // drowns those of small values.
  std::vector<Moments> above_;  // [b]: sums over [zero, zero + b * kBlock)
  std::vector<Moments> below_;  // [b]: sums over [zero - b * kBlock, zero)
};

}  // namespace quantloom
